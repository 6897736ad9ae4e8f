"""Texts in, unit vectors out, in the order of the texts, whatever batch each travelled in.

Texts are sorted by length and run in batches of a token budget, padding counted. A batch that does not fit in memory
halves the budget, for good: the run goes on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from encoder.errors import EncoderError, TowerError
from encoder.registry import AS_SAVED, TowerOptions, read_card
from encoder.tokens import Kind, Texts, Tokenizer, Tokens
from encoder.tower import Tower

# Padded tokens in a batch. On a CPU 1-2 k stay in its cache: 8 k run at half the speed.
_TOKEN_BUDGETS = {"cpu": 1536, "mps": 8192, "cuda": 65536}


@dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """How to run, never what comes out: padded tokens in a batch, CPU threads of this process, device."""

    token_budget: int | None = None
    threads: int | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, value in (("token_budget", self.token_budget), ("threads", self.threads)):
            if value is not None and value < 1:
                raise EncoderError(f"{name} is {value}. Give 1 or more, or leave it out.")


_PLAIN = EncodeOptions()


class Encoder:
    """A tower that is loaded and ready. Not for several threads at once."""

    def __init__(
        self,
        directory: Path,
        *,
        tower: TowerOptions = AS_SAVED,
        fingerprint: str | None = None,
        options: EncodeOptions = _PLAIN,
    ) -> None:
        self.card = read_card(directory, tower)
        if fingerprint is not None and fingerprint != self.card.fingerprint:
            raise TowerError(f"{directory}: expected the tower {fingerprint}, found {self.card.fingerprint}. Give the tower of that name.")
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        self._tokenizer = Tokenizer(directory, card=self.card)
        self._tower = Tower(directory, self.card, device=options.device)
        if self._tokenizer.vocabulary > self._tower.vocabulary:
            sizes = f"{self._tokenizer.vocabulary} ids, the model {self._tower.vocabulary}"
            raise TowerError(f"{directory}: the tokenizer knows {sizes}. They are not of one tower.")
        self.token_budget = options.token_budget or _TOKEN_BUDGETS.get(self._tower.device.type, _TOKEN_BUDGETS["cpu"])
        self.halvings = 0
        self.tokens_encoded = 0

    @property
    def dims(self) -> int:
        """Return how many numbers a vector has."""
        return self.card.dims

    @property
    def fingerprint(self) -> str:
        """Return the fingerprint of the tower."""
        return self.card.fingerprint

    @property
    def device(self) -> str:
        """Return the device that the model is on."""
        return str(self._tower.device)

    def tokenize(self, texts: Texts, *, kind: Kind = "document") -> Tokens:
        """Return the token ids of texts, prompt included."""
        return self._tokenizer.tokenize(texts, kind=kind)

    def encode(self, texts: Texts, *, kind: Kind = "document") -> npt.NDArray[np.float32]:
        """Return a unit vector for each text, in order. Numbers that are not finite are the caller's to find."""
        return self.encode_tokens(self.tokenize(texts, kind=kind))

    def encode_tokens(self, tokens: Tokens) -> npt.NDArray[np.float32]:
        """Return a unit vector for each text, in order."""
        if tokens.ids.size and not 0 <= int(tokens.ids.min()) <= int(tokens.ids.max()) < self._tower.vocabulary:
            raise EncoderError(
                f"Token ids reach {tokens.ids.max()}, and the tower knows {self._tower.vocabulary}: another tower made them."
            )
        vectors = np.empty((len(tokens), self.dims), np.float32)
        lengths = tokens.lengths
        order = np.argsort(-lengths, kind="stable")  # the longest first: what does not fit shows at once
        start = 0
        while start < len(order):
            longest = max(1, int(lengths[order[start]]))
            rows = order[start : start + max(1, self.token_budget // longest)]
            found = self._try(tokens, rows)
            if found is None:
                self._halve(longest, len(rows))
                continue
            vectors[rows] = found
            start += len(rows)
        self.tokens_encoded += tokens.ids.size
        return vectors

    def _try(self, tokens: Tokens, rows: npt.NDArray[np.intp]) -> npt.NDArray[np.float32] | None:
        """Return the vectors of some texts, or nothing where they do not fit in memory. One text must fit."""
        try:
            return self._forward(*_padded(tokens, rows, pad_id=self._tokenizer.pad_id))
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                raise
            return None  # the exception, which holds the tensors of the batch, ends here

    def _forward(self, ids: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Run one padded batch."""
        with torch.inference_mode():
            vectors = self._tower(torch.from_numpy(ids).to(self._tower.device), torch.from_numpy(lengths).to(self._tower.device))
            return np.asarray(vectors.cpu().numpy(), np.float32)

    def _halve(self, longest: int, texts: int) -> None:
        """Halve the budget until the batch that failed gets smaller, and give cached memory back."""
        while self.token_budget // longest >= texts:
            self.token_budget //= 2
            self.halvings += 1
        if self._tower.device.type == "cuda":
            torch.cuda.empty_cache()


def _padded(tokens: Tokens, rows: npt.NDArray[np.intp], *, pad_id: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the ids of some texts as one matrix, padded on the right, and their lengths."""
    lengths = tokens.lengths[rows]
    columns = np.arange(max(1, int(lengths.max())))
    inside = columns < lengths[:, None]
    ids = np.full(inside.shape, pad_id, np.int64)
    ids[inside] = tokens.ids[(tokens.offsets[rows, None] + columns)[inside]]
    return ids, lengths
