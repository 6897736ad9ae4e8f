"""The vector log: append-only Parquet parts that any reader opens without us, and from which a table can be rebuilt.

A part has `part_schema` columns, is sorted by id hash, has the same bytes for the same rows in any order, and checks its
pages when it is read. `replay` gives the table that a sequence of parts amounts to; `export` writes rows as a clean copy.
"""

from __future__ import annotations

import io
import re
import tempfile
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.disk import ObjectInfo
from pipelines.errors import CorruptObject, InputError, ManifestError
from pipelines.hashes import vids
from pipelines.manifest import ManifestObject, canonical
from pipelines.schema import ACTION, DELETE, HASH, ID, ID_HASH, TEXT_HASH, VECTOR, VID
from pipelines.storage import Store

EXPORT_FORMAT = 1
EXPORT_MANIFEST = "manifest.json"
_ROW_GROUP_ROWS = 65_536
# 1 costs 0.08 s for 16 Ki vectors of 384 floats; 3 costs 0.11 s and saves nothing.
_ZSTD_LEVEL = 1
# What a part's metadata says of it, beside the key of its content.
CONTENT, FINGERPRINT, KIND = "content", "fingerprint", "kind"
WITH_VECTORS = ("embed", "copy")
_PART_NAME = re.compile(r"vectors/[^/]+/part-[0-9]{5,}\.parquet")
_VECTOR_ROW, _ATTR_ROW, _DELETE_ROW = 0, 1, 2
_NONE = -1


def write_part(table: pa.Table, *, metadata: Mapping[str, str]) -> bytes:
    """Return a part as Parquet bytes: rows sorted by id hash, pages with checksums, `metadata` in the footer."""
    return write_rows(table.take(pc.sort_indices(table.column(ID_HASH))), metadata=metadata, sorted_by=ID_HASH)


def write_rows(table: pa.Table, *, metadata: Mapping[str, str] | None = None, sorted_by: str | None = None) -> bytes:
    """Return a table as Parquet bytes in the order that it has."""
    sink = pa.BufferOutputStream()
    _write(sink, table.schema.with_metadata(dict(sorted((metadata or {}).items()))), [table.combine_chunks()], sorted_by=sorted_by)
    return bytes(sink.getvalue())


def read_part(store: Store, part: ManifestObject, columns: Sequence[str] | None = None) -> pa.Table:
    """Read the rows of a part, or some of its columns, after comparing its size and sha256."""
    return decode(store.read_verified(part), columns=columns, where=store.uri(part.key))


def decode(data: bytes | io.RawIOBase, *, columns: Sequence[str] | None = None, where: str) -> pa.Table:
    """Read what `write_part` or `write_rows` wrote; the schema carries the metadata. A page with a wrong checksum is refused."""
    source = pa.BufferReader(data) if isinstance(data, bytes) else pa.PythonFile(data, mode="r")
    # Not `read_table`: it reads ahead in threads that may let go of Python's bytes as the interpreter ends, and abort it.
    with _explained(where), pq.ParquetFile(source, pre_buffer=False, page_checksum_verification=True) as file:
        return file.read(columns=None if columns is None else [*columns])


def metadata_of(data: bytes | io.RawIOBase, *, where: str) -> Mapping[str, str]:
    """Return the metadata in the footer, without reading rows."""
    with _explained(where):
        found = pq.read_metadata(pa.BufferReader(data) if isinstance(data, bytes) else pa.PythonFile(data, mode="r")).metadata or {}
    return {name.decode(): value.decode() for name, value in found.items() if name != b"ARROW:schema"}


@contextmanager
def _explained(where: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise CorruptObject(f"{where}: cannot be read as Parquet ({error}). Restore it from a copy, or start a new run.") from error


def paid_texts(
    store: Store, *, fingerprint: str, vector: str, skip: Container[str], own: str, runs: Container[str] | None = None
) -> tuple[list[str], pa.Table]:
    """Find texts whose vectors runs paid for and never published: the parts' keys, and (text_hash, number of the key).

    Looks at parts of this tower and vector type that are neither in `skip` nor below `own`, of these runs or of all. Reads footers and text
    hashes, no vector. A damaged part is passed over: it was never promised, and its texts are embedded again.
    """
    keys: list[str] = []
    found = [pa.table({TEXT_HASH: pa.array([], HASH), "part": pa.array([], pa.int64())})]
    for info in store.list("vectors"):
        if info.key in skip or info.key.startswith(own) or not _PART_NAME.fullmatch(info.key):
            continue
        if runs is not None and info.key.split("/")[1] not in runs:
            continue
        with suppress(CorruptObject):
            metadata = metadata_of(_Ranges(store, info), where=info.key)
            if (metadata.get(FINGERPRINT), metadata.get(VECTOR)) != (fingerprint, vector) or metadata.get(KIND) not in WITH_VECTORS:
                continue
            hashes = pc.unique(decode(_Ranges(store, info), columns=[TEXT_HASH], where=info.key).column(TEXT_HASH))
            found.append(pa.table({TEXT_HASH: hashes, "part": pa.repeat(pa.scalar(len(keys), pa.int64()), len(hashes))}))
            keys.append(info.key)
    return keys, pa.concat_tables(found)


def vectors_in(store: Store, key: str, *, text_hashes: pa.Array) -> pa.Table:
    """Return (text_hash, vector) of those texts that a part has, each once."""
    table = decode(store.get(key), columns=[TEXT_HASH, VECTOR], where=store.uri(key))
    table = table.filter(pc.is_valid(table.column(VECTOR)))
    values = text_hashes.combine_chunks() if isinstance(text_hashes, pa.ChunkedArray) else text_hashes
    places = pc.index_in(_chunk(table.column(TEXT_HASH)), values).to_numpy(zero_copy_only=False)
    rows = np.flatnonzero(~np.isnan(places))
    _, first = np.unique(places[rows], return_index=True)
    return table.take(pa.array(rows[np.sort(first)])).replace_schema_metadata(None)


class _Ranges(io.RawIOBase):
    """A stored object as a file of which only the wanted ranges are read."""

    def __init__(self, store: Store, info: ObjectInfo) -> None:
        self._store = store
        self._info = info
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._info.size}[whence]
        return self._place

    def read(self, size: int = -1) -> bytes:
        left = self._info.size - self._place
        wanted = left if size < 0 else min(size, left)
        data = self._store.get_range(self._info.key, start=self._place, length=wanted)
        self._place += wanted
        return data


def _write(sink: pa.NativeFile | Path, schema: pa.Schema, tables: Iterable[pa.Table], *, sorted_by: str | None = None) -> int:
    """Write tables as one Parquet file and return its rows."""
    # Splitting the bytes of floats saves 9 %, and costs no time. DuckDB 2.0 cannot read float16 that way, so those stay plain.
    split = [f"{VECTOR}.list.element"] if VECTOR in schema.names and schema.field(VECTOR).type.value_type == pa.float32() else False
    # Ids, hashes and vectors are all distinct: a dictionary of them is built for nothing.
    repeated = [name for name in schema.names if name not in (ID, ID_HASH, VECTOR)]
    columns = None if sorted_by is None else [pq.SortingColumn(schema.names.index(sorted_by))]
    written = 0
    with pq.ParquetWriter(
        sink,
        schema,
        compression="zstd",
        compression_level=_ZSTD_LEVEL,
        use_dictionary=repeated,
        use_byte_stream_split=split,
        write_page_checksum=True,
        write_page_index=True,
        sorting_columns=columns,
    ) as writer:
        for table in tables:
            writer.write_table(table.cast(schema), row_group_size=_ROW_GROUP_ROWS)
            written += table.num_rows
    return written


def replay(store: Store, parts: Sequence[ManifestObject], schema: pa.Schema) -> Iterator[pa.Table]:
    """Yield the table, in `table_schema` columns, that these parts amount to, in the order in which they were written.

    The last row of a product wins; an attribute change takes the vector that the product already had. Parts are read
    twice, one at a time: memory holds some 60 bytes for each row of the log, and the columns of attribute changes.
    """
    last, source, starts = _winners(store, parts)
    updates = _updates(store, parts, last=last, source=source, starts=starts, schema=schema)
    vector_rows = np.sort(source[source >= 0])
    for number, part in enumerate(parts):
        begin, end = np.searchsorted(vector_rows, [starts[number], starts[number + 1]])
        if begin == end:
            continue
        wanted = pa.array(vector_rows[begin:end] - starts[number])
        rows = read_part(store, part).take(wanted)
        yield _current(rows, updates, part, schema)


def _winners(store: Store, parts: Sequence[ManifestObject]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return, for each product that is left, the log row of its attributes and that of its vector; and where each part starts."""
    hashes, codes = [], []
    starts = np.zeros(len(parts) + 1, np.int64)
    for number, part in enumerate(parts):
        data = store.read_verified(part)
        table = decode(data, columns=[ID_HASH, ACTION], where=part.key)
        hashes.append(_words(table.column(ID_HASH)))
        # A rewritten table copies vectors into rows whose attributes changed, so it is the part that says what its rows have.
        whole = metadata_of(data, where=part.key).get(KIND) in WITH_VECTORS
        gone = pc.equal(table.column(ACTION), DELETE).to_numpy()
        codes.append(np.where(gone, _DELETE_ROW, _VECTOR_ROW if whole else _ATTR_ROW).astype(np.int8))
        starts[number + 1] = starts[number] + table.num_rows
    if not starts[-1]:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), starts
    words, code = np.concatenate(hashes), np.concatenate(codes)
    # A stable order by hash: the rows of one product stand together, in the order in which they were written.
    order = np.lexsort((words[:, 1], words[:, 0]))
    grouped = words[order]
    ends = np.flatnonzero(np.append(np.any(grouped[1:] != grouped[:-1], axis=1), True))
    places = np.arange(len(order))
    kind = code[order]
    # The latest row at or before each place that settles where the vector is: one with a vector, or a delete.
    settled = np.maximum.accumulate(np.where(kind == _ATTR_ROW, _NONE, places))
    firsts = np.append(0, ends[:-1] + 1)
    vector, alive = settled[ends], kind[ends] != _DELETE_ROW
    orphaned = alive & ((vector < firsts) | (kind[np.maximum(vector, 0)] == _DELETE_ROW))
    if orphaned.any():
        raise ManifestError(
            f"the vector log changes attributes of {int(orphaned.sum())} products that have no vector before. "
            "Pass every part of the generation, in the order of its manifest."
        )
    return order[ends[alive]], order[vector[alive]], starts


def _updates(
    store: Store,
    parts: Sequence[ManifestObject],
    *,
    last: npt.NDArray[np.int64],
    source: npt.NDArray[np.int64],
    starts: npt.NDArray[np.int64],
    schema: pa.Schema,
) -> pa.Table:
    """Return the rows whose attributes are newer than their vector."""
    names = [field.name for field in schema if field.name not in (VID, VECTOR)]
    newer = np.sort(last[last != source])
    found = []
    for number, part in enumerate(parts):
        begin, end = np.searchsorted(newer, [starts[number], starts[number + 1]])
        if begin != end:
            found.append(read_part(store, part, names).select(names).take(pa.array(newer[begin:end] - starts[number])))
    return pa.concat_tables(found).combine_chunks() if found else pa.table({name: pa.array([], schema.field(name).type) for name in names})


def _current(rows: pa.Table, updates: pa.Table, part: ManifestObject, schema: pa.Schema) -> pa.Table:
    """Return the rows of one part with newer attributes in the place of their own."""
    newer = pc.index_in(rows.column(ID_HASH), updates.column(ID_HASH).combine_chunks()).combine_chunks()
    stale = newer.is_valid()
    if pc.any(stale).as_py():
        fresh = updates.take(newer.drop_null())
        if not fresh.column(TEXT_HASH).equals(rows.column(TEXT_HASH).filter(stale)):
            raise ManifestError(f"{part.key}: a later part changes attributes of another text than the vector's. Do not use this log.")
        kept = rows.filter(pc.invert(stale))
        fresh = fresh.append_column(rows.schema.field(VECTOR), rows.column(VECTOR).filter(stale)).select([*updates.schema.names, VECTOR])
        rows = pa.concat_tables([kept.select(fresh.schema.names), fresh])
        rows = rows.take(pc.sort_indices(rows.column(ID_HASH)))
    rows = rows.combine_chunks()
    numbers = pa.array(vids(_chunk(rows.column(ID_HASH))))
    return rows.append_column(VID, numbers).select(schema.names).cast(schema)


def _chunk(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


def _words(hashes: pa.ChunkedArray) -> npt.NDArray[np.uint64]:
    """Return hashes as rows of two numbers, which compare in any fixed order."""
    flat = _chunk(hashes) if hashes.num_chunks else pa.array([], hashes.type)
    return np.frombuffer(flat.buffers()[1] or b"", np.uint64)[flat.offset * 2 :][: len(flat) * 2].reshape(-1, 2)


def export(batches: Iterable[pa.Table], target: Store, *, file_rows: int = 250_000) -> tuple[ManifestObject, ...]:
    """Write table rows as a clean copy into an empty root: `part-00000.parquet`, ..., and `manifest.json` when all is there.

    The columns are those that mean something elsewhere: the id, both hashes, the filters, the vector. Memory holds one
    batch; a folder without `manifest.json` is a copy that was cut off.
    """
    if file_rows < 1:
        raise InputError(f"file_rows is {file_rows}. Use at least 1.")
    if next(target.list(), None) is not None:
        raise InputError(f"{target.root} is not empty. Export into a new folder, so that no older file mixes with the copy.")
    files: list[ManifestObject] = []
    schema: pa.Schema | None = None
    with tempfile.TemporaryDirectory(prefix="catalog-embed-export-") as scratch:
        path = Path(scratch) / "part.parquet"
        for number, group in groupby(_sliced(batches, file_rows), key=itemgetter(0)):
            tables = (table for _, table in group)
            first = next(tables)
            schema = schema or first.schema.remove_metadata()
            rows = _write(path, schema, chain([first], tables))
            files.append(ManifestObject.of(target.put(f"part-{number:05d}.parquet", path), role="vectors", rows=rows))
    listed = [{"name": item.key, "rows": item.rows, "size": item.size, "sha256": item.sha256} for item in files]
    columns = [{"name": field.name, "type": str(field.type)} for field in schema or ()]
    total = sum(item.rows or 0 for item in files)
    target.put(EXPORT_MANIFEST, canonical({"format_version": EXPORT_FORMAT, "rows": total, "columns": columns, "files": listed}))
    return tuple(files)


def _sliced(batches: Iterable[pa.Table], file_rows: int) -> Iterator[tuple[int, pa.Table]]:
    """Yield the columns that go out, each slice with the number of its file."""
    done = 0
    for batch in batches:
        rows = batch.drop_columns([name for name in (ID_HASH, VID) if name in batch.schema.names])
        start = 0
        while start < rows.num_rows:
            piece = rows.slice(start, file_rows - done % file_rows)
            yield done // file_rows, piece
            start += piece.num_rows
            done += piece.num_rows
