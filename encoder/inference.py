"""Texts in, unit vectors out, in the order of the texts, whatever pack each travelled in.

A text that is there twice is run once. Texts are sorted by length over a wide window and run in packs of a token budget.
A pack that does not fit in memory halves the budget, for good: the run goes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from encoder.engine import Engine, Floats, Pace
from encoder.errors import EncoderError, TowerError
from encoder.memory import Footprint, free_bytes
from encoder.registry import AS_SAVED, TowerOptions, read_card
from encoder.tokens import Kind, Texts, Tokenizer, Tokens
from encoder.tower import Tower

# Tokens in a pack. On a CPU 1 k stay in its cache: 8 k run at two thirds of the speed (docs/experiments.md).
_TOKEN_BUDGETS = {"cpu": 1024, "mps": 8192, "cuda": 65536}
# So many lanes of one thread each keep Python's lock free enough; more threads go into the lanes.
_MOST_LANES = 8
# Of the memory that a GPU has left: the rest is for what cannot be foreseen, such as fragments.
_ROOM = 0.8
# Texts that are sorted together. Their ids take 16 bytes a token, some 60 MB.
_WINDOW_TEXTS = 65_536

EngineName = Literal["auto", "packed", "padded"]


@dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """How to run, never what comes out.

    Tokens in a pack, CPU threads of this process, packs side by side on a CPU, device. The engine `padded` runs the model
    as it was loaded, in padded batches: slow, and what the others are compared with.
    """

    token_budget: int | None = None
    threads: int | None = None
    lanes: int | None = None
    device: str = "auto"
    engine: EngineName = "auto"

    def __post_init__(self) -> None:
        for name, value, most in (
            ("token_budget", self.token_budget, 1 << 30),
            ("threads", self.threads, 1024),
            ("lanes", self.lanes, 1024),
        ):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most):
                raise EncoderError(f"{name} is {value!r}. Give a whole number from 1 to {most:,}, or leave it out.")
        if self.engine not in get_args(EngineName):
            raise EncoderError(f"engine is {self.engine!r}. Choose one of {', '.join(get_args(EngineName))}.")


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
        directory = Path(directory)
        self.card = read_card(directory, tower)
        if fingerprint is not None and fingerprint != self.card.fingerprint:
            raise TowerError(f"{directory}: expected the tower {fingerprint}, found {self.card.fingerprint}. Give the tower of that name.")
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        self._tokenizer = Tokenizer(directory, card=self.card)
        way = None if options.engine == "auto" else options.engine
        self._tower = Tower(directory, self.card, device=options.device, way=way, plain=options.engine == "padded")
        if self._tokenizer.vocabulary > self._tower.vocabulary:
            sizes = f"{self._tokenizer.vocabulary} ids, the model {self._tower.vocabulary}"
            raise TowerError(f"{directory}: the tokenizer knows {sizes}. They are not of one tower.")
        self._engine = Engine(self._tower, pad_id=self._tokenizer.pad_id, pace=_pace(options, self._tower))
        self.tokens_encoded = 0
        self.texts_encoded = 0

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

    @property
    def dtype(self) -> str:
        """Return the number format that the model computes in."""
        return str(self._tower.dtype).removeprefix("torch.")

    @property
    def vocabulary(self) -> int:
        """Return one more than the highest token id that the model knows."""
        return self._tower.vocabulary

    @property
    def footprint(self) -> Footprint:
        """Return how much memory the weights take, and a token on its way."""
        return self._tower.footprint

    def fits(self, token_budget: int) -> bool:
        """Say whether packs of a budget have room in the memory of the device, as far as that is known."""
        free = free_bytes(self._tower.device)
        return free is None or self.footprint.of_pack(token_budget) < _ROOM * free

    @property
    def engine(self) -> str:
        """Return how the model runs: packed or padded."""
        return self._tower.way

    @property
    def pace(self) -> Pace:
        """Return how packs are run; its budget is what memory has left of it."""
        return self._engine.pace

    @pace.setter
    def pace(self, pace: Pace) -> None:
        self._engine.pace = pace

    @property
    def token_budget(self) -> int:
        """Return how many tokens a pack may have."""
        return self.pace.token_budget

    @property
    def lanes(self) -> int:
        """Return how many packs run side by side."""
        return self.pace.lanes

    @property
    def halvings(self) -> int:
        """Return how often the budget was halved because a pack did not fit in memory."""
        return self._engine.halvings

    def tokenize(self, texts: Texts, *, kind: Kind = "document") -> Tokens:
        """Return the token ids of texts, prompt included."""
        return self._tokenizer.tokenize(texts, kind=kind)

    def encode(self, texts: Texts, *, kind: Kind = "document") -> Floats:
        """Return a unit vector for each text, in order. Numbers that are not finite are the caller's to find."""
        distinct, places = _distinct(texts)
        windows = [self.encode_tokens(tokens) for tokens in self._ahead(distinct, kind)]
        vectors = windows[0] if len(windows) == 1 else np.concatenate(windows)
        return vectors if places is None else vectors[places]

    def encode_arrow(self, texts: Texts, *, kind: Kind = "document") -> pa.FixedSizeListArray:
        """Return what `encode` does, as Arrow, without a copy."""
        return pa.FixedSizeListArray.from_arrays(pa.array(self.encode(texts, kind=kind).reshape(-1)), self.dims)

    def encode_tokens(self, tokens: Tokens) -> Floats:
        """Return a unit vector for each text, in order."""
        if tokens.ids.size and not 0 <= int(tokens.ids.min()) <= int(tokens.ids.max()) < self._tower.vocabulary:
            raise EncoderError(
                f"Token ids reach {tokens.ids.max()}, and the tower knows {self._tower.vocabulary}: another tower made them."
            )
        if len(tokens) and (longest := int(tokens.lengths.max())) > self.card.max_tokens:
            raise EncoderError(f"A text has {longest} token ids, and the tower reads {self.card.max_tokens}. Let its own tokenizer cut it.")
        vectors = self._engine.run(tokens)
        self.tokens_encoded += tokens.ids.size
        self.texts_encoded += len(tokens)
        return vectors

    def _ahead(self, texts: pa.Array, kind: Kind) -> Iterator[Tokens]:
        """Yield the ids of texts, a window at a time: while one is embedded, the next is made."""
        pieces = [texts[start : start + _WINDOW_TEXTS] for start in range(0, len(texts), _WINDOW_TEXTS)]
        if len(pieces) < 2:  # noqa: PLR2004 - nothing to make ahead
            yield self.tokenize(texts, kind=kind)
            return
        with ThreadPoolExecutor(1, thread_name_prefix="tokenizer") as pool:
            made = pool.submit(self.tokenize, pieces[0], kind=kind)
            for piece in pieces[1:]:
                tokens, made = made.result(), pool.submit(self.tokenize, piece, kind=kind)
                yield tokens
            yield made.result()


def _pace(options: EncodeOptions, tower: Tower) -> Pace:
    """Return the pace that was asked for, and what is usual for the device where nothing was."""
    budget = options.token_budget or _budget(tower)
    threads = torch.get_num_threads()
    lanes = options.lanes or (min(threads, _MOST_LANES) if tower.device.type == "cpu" else 1)
    return Pace(token_budget=budget, lanes=min(lanes, threads), threads=threads)


def _budget(tower: Tower) -> int:
    """Return the usual budget, or the half, quarter ... of it that memory has room for."""
    budget, free = _TOKEN_BUDGETS.get(tower.device.type, _TOKEN_BUDGETS["cpu"]), free_bytes(tower.device)
    while free is not None and budget > tower.card.max_tokens and tower.footprint.of_pack(budget) > _ROOM * free:
        budget //= 2
    return budget


def _distinct(texts: Texts) -> tuple[pa.Array, npt.NDArray[np.int64] | None]:
    """Return each text once, and which of them stands where; nothing where all differ."""
    array = _as_arrow(texts)
    if array.null_count:
        raise EncoderError(f"{array.null_count} texts are null, not a string. Leave such rows out before encoding.")
    coded = array.dictionary_encode()
    if len(coded.dictionary) == len(coded):
        return coded.dictionary, None
    return coded.dictionary, coded.indices.to_numpy()


def _as_arrow(texts: Texts) -> pa.Array:
    """Return texts as one Arrow array of strings, whatever Arrow calls them."""
    if isinstance(texts, str | bytes | set | frozenset | dict):
        raise EncoderError(f"A {type(texts).__name__} was given for texts. Give a list or an Arrow array of strings.")
    try:
        array = texts if isinstance(texts, pa.Array | pa.ChunkedArray) else pa.array(texts)
    except UnicodeEncodeError as error:
        raise EncoderError(f"A text holds half of a character ({error.reason}). Repair such texts before encoding.") from error
    except (pa.ArrowInvalid, pa.ArrowTypeError, TypeError) as error:
        raise EncoderError(f"Some texts are not a string: {str(error)[:200]}. Give a list or an Arrow array of strings.") from error
    kind = array.type.value_type if pa.types.is_dictionary(array.type) else array.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind) or array.null_count == len(array)):
        raise EncoderError(f"The texts are {array.type}, not a string each. Leave such rows out before encoding.")
    array = array.cast(pa.large_string())
    return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
