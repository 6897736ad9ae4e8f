"""Catalogs to embed without a planner, and encoders that fail in the ways in which towers fail."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from encoder.errors import TowerError
from encoder.registry import TowerOptions, read_card
from encoder.tokens import Tokenizer, Tokens
from pipelines.embed import EmbedJob, PartDone, PartWork, run_parts
from pipelines.normalize import NormalizeOptions
from pipelines.prepare import Preparer
from pipelines.schema import (
    ACTION,
    ADD,
    CHANGES,
    DELETE,
    ID,
    ID_HASH,
    LIVE,
    STATE,
    VECTOR,
    ProductSchema,
)
from pipelines.storage import Store
from pipelines.stores.parquet import read_part
from pipelines.text import parse
from pipelines.towers import install, open_encoder
from tests.towers import tiny_tower

Floats = npt.NDArray[np.float32]

SCHEMA = ProductSchema(text=("title", "brand"), filters={"brand": "string", "price": "float"}, attributes=False)
NORMALIZING = NormalizeOptions(schema=SCHEMA, deleted=None, now=datetime(2024, 1, 2, tzinfo=UTC))
PREPARER = Preparer(normalizing=NORMALIZING, template=parse('{{ title }}{{ brand | prefix(" by ") }}'))
POISON = "zyzzyva"
DIMS = 32


@dataclass(frozen=True)
class TableShard:
    """Rows of a catalog, as Arrow IPC; `marks` counts how often it was opened."""

    name: str
    data: bytes
    batch_rows: int = 50

    def open(self) -> Iterator[pa.RecordBatch]:
        yield from pa.ipc.open_stream(self.data).read_all().to_batches(max_chunksize=self.batch_rows)

    @classmethod
    def of(cls, name: str, rows: pa.Table, batch_rows: int = 50) -> TableShard:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, rows.schema) as writer:
            writer.write_table(rows)
        return cls(name, sink.getvalue().to_pybytes(), batch_rows)


def catalog(titles: Sequence[str], *, first: int = 0) -> pa.Table:
    """Return products with these titles."""
    count = len(titles)
    columns = {
        "id": [f"p{number:06d}" for number in range(first, first + count)],
        "title": list(titles),
        "brand": [f"brand {number % 7}" for number in range(first, first + count)],
        "price": [float(number % 90) for number in range(first, first + count)],
    }
    return pa.table(columns)


def titles(count: int, *, poison: Mapping[int, str] | None = None) -> list[str]:
    """Return different titles; `poison` says which of them carry a word that faulty encoders fail on, and how."""
    colours, things = ("red", "black", "green", "blue"), ("shoe", "lamp", "chair", "mug", "drill")
    plain = [f"{colours[number % 4]} {things[number % 5]} {number} cm" for number in range(count)]
    for number, kind in (poison or {}).items():
        plain[number] += f" {POISON}-{kind}"
    return plain


def changes(shards: Sequence[TableShard], *, action: str = ADD, preparer: Preparer = PREPARER) -> pa.Table:
    """Return every live row as a change, as a plan would have it."""
    found = []
    for shard in shards:
        first = 0
        for batch in shard.open():
            found.append(preparer(batch, shard=shard.name, first_row=first).rows)
            first += batch.num_rows
    rows = pa.concat_tables(found)
    rows = rows.filter(pc.equal(rows.column(STATE), LIVE))
    columns = [rows.column(name) if name in rows.schema.names else pa.repeat(action, rows.num_rows) for name in CHANGES.names]
    return pa.Table.from_arrays(columns, schema=CHANGES)


def gone(rows: pa.Table) -> pa.Table:
    """Return the same products as deletes: an id, and nothing else."""
    columns = [
        pa.repeat(DELETE, rows.num_rows)
        if f.name == ACTION
        else rows.column(f.name)
        if f.name in (ID, ID_HASH)
        else pa.nulls(rows.num_rows, f.type)
        for f in CHANGES
    ]
    return pa.Table.from_arrays(columns, schema=CHANGES)


def dealt(rows: pa.Table, part_rows: int, *, first: int = 0) -> list[PartWork]:
    """Cut changes into parts that are embedded."""
    starts = range(0, rows.num_rows, part_rows)
    return [PartWork(number=first + place, kind="embed", rows=rows.slice(start, part_rows)) for place, start in enumerate(starts)]


class WordEncoder:
    """A tower without a model: each text has a vector of its own, the same in every batch."""

    def __init__(self) -> None:
        self.tokens_encoded = 0
        self.halvings = 0

    def encode(self, texts: Sequence[str]) -> Floats:
        self.tokens_encoded += sum(len(text.split()) for text in texts)
        return word_vectors(texts)

    def encode_tokens(self, tokens: Tokens) -> Floats:
        return self.encode(["".join(map(chr, tokens[row : row + 1].ids)) for row in range(len(tokens))])


def spelled(texts: Sequence[str]) -> Tokens:
    """Return texts as ids that `WordEncoder` reads: one for each character."""
    return Tokens(ids=np.array([ord(letter) for text in texts for letter in text], np.int32), offsets=np.cumsum([0, *map(len, texts)]))


def word_vectors(texts: Sequence[str]) -> Floats:
    digests = b"".join(blake2b(text.encode(), digest_size=DIMS).digest() for text in texts)
    vectors = np.frombuffer(digests, np.uint8).reshape(-1, DIMS).astype(np.float32) - np.float32(127.5)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


@dataclass(frozen=True, kw_only=True)
class Faults:
    """Opens encoders that fail on texts with a word such as `zyzzyva-kill`. In the folder `marks` every call leaves its size.

    `raise`, `nan`, `zero`, `tower` (a TowerError), `kill` (SIGKILL), `once` (SIGKILL the first time), `stuck` (this and
    every later call raises). With `small`, a forward of more tokens is out of memory. No encoder opens before `together` do.
    """

    marks: Path
    real: bool = False
    every: bool = False
    small: int | None = None
    together: int = 1

    def __call__(self, directory: Path, **how: Any) -> FaultyEncoder:
        (self.marks / f"opened-{os.getpid()}").write_text(str(how["device"]))
        deadline = time.monotonic() + 60
        while len(list(self.marks.glob("opened-*"))) < self.together:
            if time.monotonic() > deadline:
                raise TowerError(f"{self.together} encoders were to be open at one time")
            time.sleep(0.05)
        # A cluster of these tests may say that it has GPUs.
        inner = open_encoder(directory, **how | {"device": "cpu"}) if self.real else WordEncoder()
        if self.small is not None:
            _make_small(inner, self.small)
        return FaultyEncoder(self, inner, Tokenizer(directory, how["tower"]) if self.real else None)


def _make_small(encoder: Any, tokens: int) -> None:
    import torch

    model = encoder._tower.model

    def limited(*, input_ids: torch.Tensor, **options: Any) -> Any:
        if input_ids.numel() > tokens:
            raise torch.OutOfMemoryError
        return model(input_ids=input_ids, **options)

    encoder._tower.model = limited


class FaultyEncoder:
    """An encoder whose faults are its own, and whose vectors are another's."""

    def __init__(self, faults: Faults, inner: Any, tokenizer: Tokenizer | None) -> None:
        self._faults = faults
        self._inner = inner
        self._tokenizer = tokenizer
        self._stuck = False

    @property
    def tokens_encoded(self) -> int:
        return int(self._inner.tokens_encoded)

    @property
    def halvings(self) -> int:
        return int(self._inner.halvings)

    def encode(self, texts: Sequence[str]) -> Floats:
        return self._encode(texts, lambda: self._inner.encode(texts))

    def encode_tokens(self, tokens: Tokens) -> Floats:
        (self._faults.marks / "ids-came").touch()
        return self._encode([*map(self._said, tokens.to_arrow().to_pylist())], lambda: self._inner.encode_tokens(tokens))

    def _said(self, ids: Sequence[int]) -> str:
        """Return the words of a text, which faults are known by."""
        if self._tokenizer is None:
            return ""
        return " ".join(map(self._tokenizer._backend.id_to_token, ids)).replace(" ##", "").replace(" - ", "-")

    def _encode(self, texts: Sequence[str], forward: Callable[[], Floats]) -> Floats:
        marks = self._faults.marks
        with (marks / "calls").open("a") as file:
            file.write(f"{len(texts)}\n")

        def poisoned(kind: str) -> list[int]:
            return [index for index, text in enumerate(texts) if f"{POISON}-{kind}" in text]

        once = bool(poisoned("once")) and not (marks / "died").exists()
        if once:
            (marks / "died").touch()
        if once or poisoned("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        self._stuck |= bool(poisoned("stuck"))
        if self._stuck or poisoned("raise"):
            raise RuntimeError("CUDA error: device-side assert triggered")
        if poisoned("tower"):
            raise TowerError("the tower is not as it was")
        vectors = forward()
        vectors[poisoned("nan")] = np.nan
        vectors[poisoned("zero")] = 0
        if self._faults.every and list(texts) != ["a"]:
            vectors[:] = np.nan
        return vectors


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A store with a tower, and a job that embeds into it."""

    job: EmbedJob
    tower: Path
    store: Store

    def run(self, work: Iterable[PartWork], **changed: Any) -> list[PartDone]:
        """Make parts, in the order of their numbers."""
        return sorted(run_parts(work, replace(self.job, **changed)), key=lambda done: done.number)

    def read(self, done: Iterable[PartDone]) -> pa.Table:
        """Return the rows of these parts, by id."""
        tables = [read_part(self.store, item.object).replace_schema_metadata(None) for item in done if item.object]
        return pa.concat_tables(tables).sort_by(ID)


def setup(root: Path, shards: Sequence[TableShard], *, vector: str = "float32", tower: Path | None = None, **faults: Any) -> Setup:
    """Prepare a store and a job for these shards."""
    tower, marks = tower or tiny_tower(root / "tower", dims=DIMS), root / "marks"
    marks.mkdir()
    store = Store.open(root / "store")
    options = TowerOptions(template_digest=PREPARER.template.digest)
    card = read_card(tower, options)
    job = EmbedJob(
        store=store,
        run_id="r1",
        shards=shards,
        preparer=PREPARER,
        tower_objects=install(store, tower, card),
        tower=options,
        fingerprint=card.fingerprint,
        dims=card.dims,
        vector=vector,
        encoder_factory=Faults(marks=marks, **faults),
    )
    return Setup(job=job, tower=tower, store=store)


def matrix(table: pa.Table) -> Floats:
    """Return the vectors of a table as rows."""
    column = table.column(VECTOR).combine_chunks()
    column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    return np.asarray(column.flatten().to_numpy(zero_copy_only=False), np.float32).reshape(table.num_rows, -1)


def forwarded(root: Path) -> int:
    """Return how many texts went through the encoder, the control text aside."""
    path = root / "marks" / "calls"
    return sum(int(line) for line in path.read_text().split()) - len(list((root / "marks").glob("opened-*"))) if path.exists() else 0
