"""The three 128-bit hashes that decide what a run must do, defined byte by byte in docs/formats.md.

All are BLAKE2b: whoever could craft two ids, or two texts, with one hash could push another seller's product out.
It costs 0.5 us a row more than XXH3, and saves a dependency (docs/experiments.md).
"""

from __future__ import annotations

from hashlib import blake2b
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.schema import HASH, LOCALE, ProductSchema

_ID_PERSON = b"catalog-embed-id"
_TEXT_PERSON = b"catalog-embed-tx"
# DuckDB joins UUID four times faster than the same 16 bytes as BLOB (docs/experiments.md).
_UUID = pa.uuid()
_ABSENT, _PRESENT = b"\x00", b"\x01"


def id_hashes(ids: pa.StringArray) -> pa.FixedSizeBinaryArray:
    """Hash product ids over their UTF-8 bytes. A null id has a null hash."""
    hashes = _hash(ids, person=_ID_PERSON)
    return pc.if_else(ids.is_valid(), hashes, pa.scalar(None, HASH)) if ids.null_count else hashes


def text_hashes(texts: pa.StringArray) -> pa.FixedSizeBinaryArray:
    """Hash rendered texts over their UTF-8 bytes."""
    return _hash(texts, person=_TEXT_PERSON)


def attr_hashes(products: pa.Table, schema: ProductSchema) -> pa.FixedSizeBinaryArray:
    """Hash what the table keeps beside the vector: locale and every filter column, in the byte order of their names."""
    types = {LOCALE: "string", **schema.filters}
    names = sorted(types, key=lambda name: name.encode())
    layout = "\n".join(f"{name}:{types[name]}" for name in names)
    parts = [part for name in names for part in _encode(products.column(name).combine_chunks())]
    rows = pc.binary_join_element_wise(*parts, b"")
    return _hash(rows, person=blake2b(layout.encode(), digest_size=16).digest())


def vids(hashes: pa.FixedSizeBinaryArray) -> npt.NDArray[np.int64]:
    """Return the number of each product: the first 63 bits of its id hash, so that it never changes and needs no register."""
    words = np.frombuffer(hashes.buffers()[1], dtype="<i8")[hashes.offset * 2 :: 2][: len(hashes)]
    return words & np.int64(2**63 - 1)


def as_uuids(table: pa.Table) -> pa.Table:
    """Give every hash column the type that joins fastest; the bytes stay."""
    for index, field in enumerate(table.schema):
        if field.type == HASH:
            chunks = [pa.ExtensionArray.from_storage(_UUID, chunk) for chunk in table.column(index).chunks]
            table = table.set_column(index, field.name, pa.chunked_array(chunks, type=_UUID))
    return table


def _encode(column: pa.Array) -> list[pa.Array]:
    """Return the parts of one column's bytes: a presence byte, then the value little-endian, a text behind its length."""
    valid = column.is_valid()
    parts = [pa.array([_ABSENT, _PRESENT]).take(valid.cast(pa.int8()))]
    kind = column.type
    if pa.types.is_string(kind):
        values = pc.fill_null(pc.binary_length(column), 0).to_numpy(zero_copy_only=False).astype("<u4")
    elif pa.types.is_boolean(kind):
        values = pc.fill_null(column, fill_value=False).to_numpy(zero_copy_only=False).astype("u1")
    elif pa.types.is_floating(kind):
        # Adding zero makes -0.0 and 0.0 one price.
        values = pc.fill_null(column, 0.0).to_numpy(zero_copy_only=False).astype("<f8") + 0.0
    else:
        values = pc.fill_null(column.cast(pa.int64()), 0).to_numpy(zero_copy_only=False).astype("<i8")
    parts.append(pc.if_else(valid, _fixed_width_bytes(values), b"") if column.null_count else _fixed_width_bytes(values))
    if pa.types.is_string(kind):
        parts.append(pc.fill_null(column.cast(pa.binary()), b""))
    return parts


def _fixed_width_bytes(values: npt.NDArray[np.generic]) -> pa.BinaryArray:
    """View numbers as binary values of their own width, without copying."""
    offsets = np.arange(len(values) + 1, dtype=np.int32) * values.itemsize
    return pa.BinaryArray.from_buffers(pa.binary(), len(values), [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(values))])


def _hash(rows: pa.Array, *, person: bytes) -> pa.FixedSizeBinaryArray:
    """Hash every value of a text or binary array, in one tight loop: 0.7 us for 400 bytes."""
    if not len(rows):
        return pa.array([], HASH)
    offsets = np.frombuffer(rows.buffers()[1], dtype=np.int32)[rows.offset : rows.offset + len(rows) + 1].tolist()
    data = memoryview(rows.buffers()[2] or b"")
    fresh = blake2b(digest_size=16, person=person).copy
    digests = []
    for start, end in pairwise(offsets):
        state = fresh()
        state.update(data[start:end])
        digests.append(state.digest())
    return pa.FixedSizeBinaryArray.from_buffers(HASH, len(rows), [None, pa.py_buffer(b"".join(digests))])
