"""An Arrow table as a catalog: for tests, notebooks and pipelines that already hold their rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipelines.contracts import PinnedObject, Shard, SourcePin, Window
from pipelines.sources.batches import emit, limited
from pipelines.sources.projection import Projection
from pipelines.sources.spec import SourceSpec
from pipelines.sources.windowing import effective

_SHARD_ROWS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class MemoryShard:
    """A slice of the table, which travels with it: the one shard that holds rows."""

    first_row: int
    rows: pa.Table
    projection: Projection
    window: Window | None

    @property
    def name(self) -> str:
        """The range of rows."""
        return f"memory#{self.first_row}-{self.first_row + self.rows.num_rows}"

    def __reduce__(self) -> tuple[Any, ...]:
        # A slice of a table pickles all of its parent's bytes; IPC takes the slice only.
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self.rows.schema) as writer:
            writer.write_table(self.rows)
        return _restored, (self.first_row, sink.getvalue().to_pybytes(), self.projection, self.window)

    def open(self) -> Iterator[pa.RecordBatch]:
        """Stream the window's rows."""
        return emit(self.rows.to_batches(), projection=self.projection, window=self.window)


def _restored(first_row: int, rows: bytes, projection: Projection, window: Window | None) -> MemoryShard:
    return MemoryShard(first_row=first_row, rows=pa.ipc.open_stream(rows).read_all(), projection=projection, window=window)


@dataclass(frozen=True, kw_only=True)
class MemorySource:
    """Reads an Arrow table, which nobody can change."""

    data: pa.Table
    projection: Projection
    limit: int | None = None

    def snapshot(self) -> SourcePin:
        """Pin the table by a hash of its bytes; how it was chunked does not matter."""
        hasher = hashlib.sha256()
        for batch in self.data.combine_chunks().to_batches(max_chunksize=_SHARD_ROWS):
            hasher.update(batch.serialize())
        etag = hashlib.sha256(self.data.schema.serialize().to_pybytes() + hasher.digest()).hexdigest()
        return SourcePin(kind="memory", address="memory", objects=(PinnedObject(name="table", size=self.data.nbytes, etag=etag),))

    def read(self, window: Window) -> Sequence[Shard]:
        """Return shards of about a million rows, in order."""
        return self._shards(self.projection, effective(window, updated_at=self.projection.updated_at))

    def ids(self) -> Sequence[Shard]:
        """Return shards with the id and the tombstone column."""
        return self._shards(self.projection.for_ids(), None)

    def _shards(self, projection: Projection, window: Window | None) -> Sequence[Shard]:
        names = self.data.schema.names
        projection.require(names, where="the table")
        projection.refuse_twins(names, where="the table")
        rows = self.data.select(projection.wanted(names))
        early = window if self.limit is None else None
        shards = [
            MemoryShard(first_row=start, rows=rows.slice(start, _SHARD_ROWS), projection=projection, window=early)
            for start in range(0, rows.num_rows, _SHARD_ROWS)
        ]
        return limited(shards, limit=self.limit, window=window)


def make(spec: SourceSpec, projection: Projection) -> MemorySource:
    """Return the table of the description as a catalog."""
    assert spec.data is not None  # SourceSpec checked it
    return MemorySource(data=spec.data, projection=projection, limit=spec.limit)
