"""Batches as they leave a shard: our names, the window's rows, plain types, and a size that no file can choose."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from pipelines.contracts import Shard, Window
from pipelines.errors import SourceError
from pipelines.sources.projection import Projection
from pipelines.sources.windowing import within

MAX_ROWS = 65_536
MAX_BYTES = 64 << 20
# Below this, nothing is a bomb: one worker can hold it, and small files of one repeated value compress a thousandfold.
_HARMLESS_BYTES = 1 << 30


def emit(batches: Iterable[pa.RecordBatch], *, projection: Projection, window: Window | None) -> Iterator[pa.RecordBatch]:
    """Rename, filter, cut to size and decode what a reader gave, in this order, so that dropped rows are never decoded."""
    for batch in batches:
        for piece in bounded(within(projection.apply(batch), window)):
            yield decoded(piece)


def bounded(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """Cut a batch into slices of at most MAX_ROWS rows and MAX_BYTES decoded bytes; a single row is never cut."""
    if batch.num_rows == 0:
        return
    if batch.num_rows <= MAX_ROWS and (batch.num_rows == 1 or decoded_bytes(batch) <= MAX_BYTES):
        yield batch
        return
    half = batch.num_rows // 2
    yield from bounded(batch.slice(0, half))
    yield from bounded(batch.slice(half))


def decoded_bytes(batch: pa.RecordBatch) -> int:
    """Return the memory that a batch takes once its dictionaries are spelled out."""
    return sum(_decoded_bytes(column) for column in batch.columns)


def _decoded_bytes(column: pa.Array) -> int:
    if not pt.is_dictionary(column.type) or not _is_text(column.type.value_type):
        return int(column.nbytes)
    lengths = pc.binary_length(column.dictionary).cast(pa.int64())
    return (pc.sum(lengths.take(column.indices)).as_py() or 0) + 4 * len(column)


def decoded(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Spell out dictionary columns: a dictionary is how a reader saves memory, not a type of the catalog."""
    columns = [column.dictionary_decode() if pt.is_dictionary(column.type) else column for column in batch.columns]
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _is_text(kind: pa.DataType) -> bool:
    return bool(pt.is_string(kind) or pt.is_binary(kind) or pt.is_large_string(kind) or pt.is_large_binary(kind))


@dataclass(kw_only=True)
class Expansion:
    """Counts what a stored file grew to, and stops a decompression bomb."""

    name: str
    stored_bytes: int
    max_expansion: int
    seen_bytes: int = 0

    def count(self, size: int) -> None:
        """Add decoded bytes; refuse the file once they pass both the ratio and a gibibyte."""
        self.seen_bytes += size
        if self.seen_bytes > max(_HARMLESS_BYTES, self.max_expansion * self.stored_bytes):
            raise SourceError(
                f"{self.name}: {self.stored_bytes} stored bytes grew to more than {self.seen_bytes}, over {self.max_expansion} times. "
                "If the file is genuine, raise `source.max_expansion`."
            )


@dataclass(frozen=True, kw_only=True)
class LimitedShard:
    """The first rows of a catalog, as one shard. The limit counts before the window, so that windows and ids agree on it."""

    shards: Sequence[Shard]
    limit: int
    window: Window | None

    @property
    def name(self) -> str:
        """The limit and the first shard's name."""
        return f"first {self.limit} rows from {self.shards[0].name}"

    def open(self) -> Iterator[pa.RecordBatch]:
        """Stream rows of the shards in their order until the limit is reached."""
        left = self.limit
        for shard in self.shards:
            for batch in shard.open():
                rows = within(batch.slice(0, left), self.window)
                if rows.num_rows:
                    yield rows
                left -= batch.num_rows
                if left <= 0:
                    return


def limited(shards: Sequence[Shard], *, limit: int | None, window: Window | None) -> Sequence[Shard]:
    """Return the shards themselves, or the one shard that gives their first rows."""
    return [LimitedShard(shards=tuple(shards), limit=limit, window=window)] if limit is not None and shards else shards
