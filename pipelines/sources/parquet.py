"""Parquet files: only mapped column chunks are fetched, row groups are skipped by statistics, and decoding is bounded.

A footer's sizes are no guard: two megabytes of dictionary indices can decode to 20 GB. So each row group's dictionaries are
looked at first, and so few rows are decoded at once that even their longest values fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pyarrow.types as pt

from pipelines.contracts import PinnedObject, Shard, Window
from pipelines.sources.batches import MAX_BYTES, MAX_ROWS, Expansion, decoded_bytes, emit
from pipelines.sources.files import FileSource
from pipelines.sources.objects import Place, opened
from pipelines.sources.projection import Projection
from pipelines.sources.spec import SourceSpec
from pipelines.sources.windowing import expression

SHARD_BYTES = 128 << 20
_DECODE_BYTES = 32 << 20
# A nested column's dictionary cannot be looked at (Arrow cannot read one), so fewer of its rows are decoded at once.
_NESTED_ROWS = 4096
# Decoding everything as dictionaries would be bounded too, but costs ten times as much where a writer fell back to plain
# pages: 1.40 s, not 0.13 s, for 300,000 rows. So only the dictionaries themselves are read this way, in small pieces.
_PROBE_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class ParquetShard:
    """Row groups `start` to `stop` of one file; all of them where `stop` is None.

    `constants` are columns that the file's table knows and the file does not hold (partition values).
    """

    place: Place
    path: str
    expected: PinnedObject | None
    projection: Projection
    window: Window | None
    max_expansion: int
    start: int = 0
    stop: int | None = None
    constants: tuple[tuple[str, pa.DataType, Any], ...] = ()

    @property
    def name(self) -> str:
        """The file, and the row groups where it was split."""
        return self.path if self.stop is None else f"{self.path}#{self.start}-{self.stop}"

    def open(self) -> Iterator[pa.RecordBatch]:
        """Stream the window's rows."""
        with opened(self.place, self.path, expected=self.expected) as file:
            meter = Expansion(name=self.path, stored_bytes=file.size(), max_expansion=self.max_expansion)
            for batch in emit(self._batches(file), projection=self.projection, window=self.window):
                meter.count(decoded_bytes(batch))
                yield batch

    def _batches(self, file: pa.NativeFile) -> Iterator[pa.RecordBatch]:
        footer = pq.read_metadata(file)
        schema = footer.schema.to_arrow_schema()
        wanted = self.projection.wanted(schema.names)
        texts = [name for name in wanted if _is_text(schema.field(schema.names.index(name)).type)]
        reader = pq.ParquetFile(file, metadata=footer, pre_buffer=self.place.remote)
        probe = pq.ParquetFile(file, metadata=footer, read_dictionary=texts, buffer_size=_PROBE_BYTES)
        for group in self._groups(file, footer, schema):
            rows = _batch_rows(footer.row_group(group), schema, wanted, longest=_longest(probe, group, texts))
            for batch in reader.iter_batches(batch_size=rows, row_groups=[group], columns=wanted, use_threads=False):
                yield self._complete(batch)

    def _groups(self, file: pa.NativeFile, footer: pq.FileMetaData, schema: pa.Schema) -> list[int]:
        """Return the row groups whose statistics admit a row of the window."""
        stop = footer.num_row_groups if self.stop is None else self.stop
        groups = list(range(self.start, stop))
        name = self.projection.updated_at
        if self.window is None or name is None or schema.names.count(name) != 1 or not groups:
            return groups
        test = expression(name, schema.field(name).type, self.window)
        if test is None:
            return groups
        fragment = ds.ParquetFileFormat().make_fragment(file, row_groups=groups)
        return [group.id for group in fragment.subset(filter=test).row_groups]

    def _complete(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        for name, kind, value in self.constants:
            if name not in batch.schema.names:
                batch = batch.append_column(name, pa.repeat(pa.scalar(value, kind), batch.num_rows))
        return batch


def _is_text(kind: pa.DataType) -> bool:
    return bool(pt.is_string(kind) or pt.is_binary(kind) or pt.is_large_string(kind) or pt.is_large_binary(kind))


def _longest(reader: pq.ParquetFile, group: int, texts: Sequence[str]) -> int:
    """Return how many bytes one row can decode to, by the longest values in a row group's dictionaries."""
    if not texts:
        return 0
    first = next(reader.iter_batches(batch_size=1, row_groups=[group], columns=texts, use_threads=False), None)
    dictionaries = [] if first is None else [column.dictionary for column in first.columns if pt.is_dictionary(column.type)]
    return sum(pc.max(pc.binary_length(values)).as_py() or 0 for values in dictionaries)


def _batch_rows(group: pq.RowGroupMetaData, schema: pa.Schema, wanted: Sequence[str], *, longest: int) -> int:
    """Return how many rows to decode at once: by the footer's average for plain values, by the longest for dictionaries."""
    chunks = (group.column(index) for index in range(group.num_columns))
    size = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] in wanted)
    rows: int = _DECODE_BYTES * max(group.num_rows, 1) // max(size, 1)
    rows = min(rows, MAX_BYTES // max(longest, 1))
    nested = any(pt.is_nested(schema.field(schema.names.index(name)).type) for name in wanted)
    return max(1, min(rows, _NESTED_ROWS if nested else MAX_ROWS))


@dataclass(frozen=True, kw_only=True)
class ParquetFormat:
    """Knows footers. Files beyond `shard_bytes` are split by row groups."""

    max_expansion: int
    shard_bytes: int = SHARD_BYTES

    def names(self, place: Place, pinned: PinnedObject) -> Sequence[str]:
        """Return the columns that the footer lists."""
        with opened(place, pinned.name, expected=pinned) as file:
            names: list[str] = pq.read_schema(file).names
            return names

    def shards(self, place: Place, pinned: PinnedObject, *, projection: Projection, window: Window | None) -> Sequence[Shard]:
        """Return one shard, or several for a large file."""
        whole = ParquetShard(
            place=place, path=pinned.name, expected=pinned, projection=projection, window=window, max_expansion=self.max_expansion
        )
        if pinned.size <= self.shard_bytes:
            return [whole]
        with opened(place, pinned.name, expected=pinned) as file:
            footer = pq.read_metadata(file)
        sizes = [_stored_bytes(footer.row_group(index)) for index in range(footer.num_row_groups)]
        return [replace(whole, start=start, stop=stop) for start, stop in _runs(sizes, self.shard_bytes)]


def _stored_bytes(group: pq.RowGroupMetaData) -> int:
    return sum(group.column(index).total_compressed_size for index in range(group.num_columns))


def _runs(sizes: Sequence[int], target: int) -> Iterator[tuple[int, int]]:
    """Group consecutive sizes into half-open ranges that reach the target."""
    start, total = 0, 0
    for index, size in enumerate(sizes):
        total += size
        if total >= target or index == len(sizes) - 1:
            yield start, index + 1
            start, total = index + 1, 0


def make(spec: SourceSpec, projection: Projection) -> FileSource:
    """Return a catalog of Parquet files."""
    return FileSource(spec, projection, ParquetFormat(max_expansion=spec.max_expansion))
