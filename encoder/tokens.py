"""Texts to token ids, apart from the model: a CPU task can do it ahead, and hand the ids over as Arrow or NumPy.

The tokenizer is the one that sentence-transformers would use, because transformers rebuilds some tokenizers from their
class instead of reading tokenizer.json to the letter. What transformers made of it travels as JSON (`to_json`).
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import tokenizers

from encoder.errors import EncoderError, TowerError
from encoder.registry import AS_SAVED, TowerCard, TowerOptions, read_card

Kind = Literal["document", "query"]
Texts: TypeAlias = pa.StringArray | pa.LargeStringArray | pa.ChunkedArray | Sequence[str]

# Strings and encodings of so many texts live at a time; ids are 4 bytes a token. 256 to 1024 are the fastest by 2-3 %.
_CHUNK_TEXTS = 1024


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokens:
    """The token ids of texts, end to end: text `i` is `ids[offsets[i]:offsets[i + 1]]`."""

    ids: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        if self.ids.dtype.kind != "i" or self.offsets.dtype.kind != "i":
            raise EncoderError(f"Token ids are {self.ids.dtype} and offsets {self.offsets.dtype}: both are whole numbers.")
        ordered = self.offsets.size > 0 and self.offsets[0] == 0 and bool((np.diff(self.offsets) >= 0).all())
        if not ordered or self.offsets[-1] != self.ids.size:
            raise EncoderError(f"The offsets do not fit {self.ids.size} token ids: they begin at 0, never fall, and end there.")

    def __len__(self) -> int:
        return self.offsets.size - 1

    def __getitem__(self, rows: slice) -> Tokens:
        """Return a run of texts; their ids are not copied."""
        begin, end, step = rows.indices(len(self))
        if step != 1:
            return self.take(np.arange(begin, end, step))
        offsets = self.offsets[begin : max(begin, end) + 1]
        return Tokens(ids=self.ids[offsets[0] : offsets[-1]], offsets=offsets - offsets[0])

    def take(self, rows: npt.ArrayLike) -> Tokens:
        """Return the texts with these numbers, in their order, any of them as often as it is named."""
        chosen = np.asarray(rows, np.int64)
        lengths = self.lengths[chosen]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        places = np.repeat(self.offsets[chosen] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return Tokens(ids=self.ids[places], offsets=offsets)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Return the number of tokens of each text."""
        return np.diff(self.offsets)

    def to_arrow(self) -> pa.LargeListArray:
        """Return one list of ids for each text, without a copy."""
        return pa.LargeListArray.from_arrays(pa.array(self.offsets), pa.array(self.ids))

    @classmethod
    def from_arrow(cls, lists: pa.LargeListArray) -> Tokens:
        """Read what `to_arrow` gave, also from a slice of it."""
        offsets = lists.offsets.to_numpy()
        ids = lists.values.slice(offsets[0], offsets[-1] - offsets[0]).to_numpy(zero_copy_only=False)
        return cls(ids=ids, offsets=offsets - offsets[0])


class Tokenizer:
    """The tokenizer of a tower, with its prompts and its length limit. Needs no torch."""

    def __init__(self, directory: Path, tower: TowerOptions = AS_SAVED, *, card: TowerCard | None = None) -> None:
        self.card = card or read_card(directory, tower)
        self._backend, self.pad_id = _load(directory, self.card)

    def to_json(self) -> bytes:
        """Return all of it as bytes: who opens them pays 0.02 s, where opening the tower imports transformers for 2 s."""
        try:
            backend = self._backend.to_str()
        except Exception as error:  # the library raises nothing narrower
            raise TowerError(f"The tokenizer cannot be written down ({str(error)[:200]}). Use it where the tower is.") from error
        return json.dumps({"card": self.card.to_json().decode(), "pad_id": self.pad_id, "backend": backend}).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Tokenizer:
        """Open what `to_json` wrote, without the tower's files."""
        tree = json.loads(data)
        opened = cls.__new__(cls)
        opened.card = TowerCard.from_json(tree["card"].encode())
        opened.pad_id = tree["pad_id"]
        opened._backend = tokenizers.Tokenizer.from_str(tree["backend"])  # noqa: SLF001  its own
        return opened

    @property
    def vocabulary(self) -> int:
        """Return one more than the highest id that can come out."""
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def tokenize(self, texts: Texts, *, kind: Kind = "document") -> Tokens:
        """Return the ids of texts, cut as sentence-transformers cuts them, special tokens included."""
        prompt = {"document": self.card.document_prompt, "query": self.card.query_prompt}.get(kind)
        if prompt is None:
            raise EncoderError(f"kind is {kind!r}. Choose document or query.")
        ids, offsets = array("i"), array("q", [0])
        for chunk in _chunks(texts):
            prompted = [prompt + text for text in chunk] if prompt else chunk
            # The library offers ids as lists only; of one text at a time they cost a third of what lists of lists do.
            for encoding in self._backend.encode_batch_fast(prompted, add_special_tokens=True):
                ids.fromlist(encoding.ids)
                offsets.append(len(ids))
        return Tokens(ids=np.asarray(ids, np.int32), offsets=np.asarray(offsets, np.int64))


def _load(directory: Path, card: TowerCard) -> tuple[Any, int]:
    """Return the fast tokenizer, set to cut and not to pad, and the id to pad with."""
    from transformers import AutoTokenizer  # noqa: PLC0415  brings torch along, which `Tokens` and `from_json` do without

    folder = directory / card.model_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True, use_fast=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise TowerError(f"{folder}: the tokenizer cannot be read: {str(error)[:300]}. Save the tower again.") from error
    if not tokenizer.is_fast:
        raise TowerError(f"{folder}: {type(tokenizer).__name__} is no fast tokenizer. Save it with tokenizer.json.")
    backend = tokenizer.backend_tokenizer
    if card.lowercase:
        backend.normalizer = _lowercased(backend.normalizer)
    backend.no_padding()
    backend.enable_truncation(card.max_tokens, stride=0, strategy="longest_first", direction=tokenizer.truncation_side)
    return backend, int(tokenizer.pad_token_id or 0)


def _lowercased(normalizer: Any) -> Any:
    """Put lower-casing before what is there, as sentence-transformers does; twice does no harm."""
    steps: list[Any] = [] if normalizer is None else [normalizer]
    return tokenizers.normalizers.Sequence([tokenizers.normalizers.Lowercase(), *steps])


def _chunks(texts: Texts) -> Iterator[list[str]]:
    """Yield texts as Python strings, some thousands at a time."""
    if isinstance(texts, str):
        raise EncoderError("One string was given for texts. Give a list or an Arrow array of strings.")
    for start in range(0, len(texts), _CHUNK_TEXTS):
        piece = texts[start : start + _CHUNK_TEXTS]
        chunk = piece.to_pylist() if isinstance(piece, pa.Array | pa.ChunkedArray) else list(piece)
        for number, text in enumerate(chunk):
            if not isinstance(text, str):
                raise EncoderError(f"Text {start + number} is {type(text).__name__}, not a string. Leave such rows out before encoding.")
        yield chunk
