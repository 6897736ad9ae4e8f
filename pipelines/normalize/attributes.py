"""Attributes of any shape as one map per row: text keys in byte order, each once, no empty value.

A map, a list of key-value structs, a struct, a JSON text, or one column per attribute: all become the same flat list of
(row, key, value) items, which is cleaned, sorted and cut once. The same attributes give the same map, whatever their shape.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from pipelines.normalize.flatjson import parse_objects
from pipelines.normalize.sanitize import as_mask, clean_text, decode
from pipelines.normalize.scalars import count, plain, text
from pipelines.schema import ATTRIBUTE_MAP

Int64s = npt.NDArray[np.int64]
KEY, VALUE = "key", "value"


@dataclass(frozen=True, kw_only=True)
class Items:
    """Flat attributes: the row of each, its key as an index into `names`, and its value. Later items win."""

    rows: Int64s
    codes: Int64s
    names: pa.BinaryArray
    values: pa.BinaryArray


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How many attributes a row keeps, and how long a key or a value may be."""

    max_attributes: int
    max_bytes: int


def attribute_map(
    column: pa.Array | None, columns: Mapping[str, pa.Array], *, num_rows: int, limits: Limits, repaired: Counter[str]
) -> pa.MapArray:
    """Return one map per row from an attributes column and from columns named by key; null where nothing is left."""
    found = [] if column is None else _items(plain(column), repaired)
    found += [_column_items(name, values, repaired) for name, values in columns.items()]
    found = [items for items in found if len(items.rows)]
    if not found:
        return pa.nulls(num_rows, ATTRIBUTE_MAP)
    items = _clean(_concatenate(found), limits.max_bytes, repaired)
    items = _order(items, repaired)
    starts = np.searchsorted(items.rows, np.arange(num_rows + 1))
    if (np.diff(starts) > limits.max_attributes).any():
        count("too_many_attributes", int((np.diff(starts) > limits.max_attributes).sum()), repaired)
        items = _filter(items, np.arange(len(items.rows)) - starts[items.rows] < limits.max_attributes)
        starts = np.searchsorted(items.rows, np.arange(num_rows + 1))
    keys = items.names.take(pa.array(items.codes))
    empty = pa.array(starts[1:] == starts[:-1])
    return pa.MapArray.from_arrays(pa.array(starts, pa.int32()), keys, items.values, mask=empty)


def _items(column: pa.Array, repaired: Counter[str]) -> list[Items]:
    """Flatten an attributes column of any type; what is no flat object is counted and gives nothing."""
    kind = column.type
    if pt.is_map(kind):
        return [_list_items(column, column.keys, column.items, repaired)]
    if (pt.is_list(kind) or pt.is_large_list(kind)) and pt.is_struct(kind.value_type) and {f.name for f in kind.value_type} >= {KEY, VALUE}:
        keys, values = (pc.struct_field(column.values, name) for name in (KEY, VALUE))
        return [_list_items(column, keys, values, repaired)]
    if pt.is_struct(kind):
        return [_column_items(field.name, pc.struct_field(column, i), repaired) for i, field in enumerate(kind)]
    if pt.is_binary(kind):
        members = parse_objects(decode(column, repaired), repaired=repaired)
        return [_coded(part.rows, part.keys, part.values) for part in members]
    count("bad_attributes", len(column) - column.null_count, repaired)
    return []


def _list_items(column: pa.Array, keys: pa.Array, values: pa.Array, repaired: Counter[str]) -> Items:
    """Flatten lists; children may reach beyond the slice on both sides, and a null list may still own items."""
    offsets = column.offsets.to_numpy().astype(np.int64)
    owned = slice(int(offsets[0]), int(offsets[-1]))
    rows = np.repeat(np.arange(len(column)), np.diff(offsets))
    kept = as_mask(column.is_valid())[rows]
    rows, keys, values = rows[kept], *(child[owned].filter(pa.array(kept)) for child in (keys, values))
    return _coded(rows, _value_text(keys, repaired), _value_text(values, repaired))


def _coded(rows: Int64s, keys: pa.BinaryArray, values: pa.BinaryArray) -> Items:
    """Replace keys by their index into the distinct ones."""
    coded = keys.dictionary_encode()
    codes = coded.indices.fill_null(-1).to_numpy().astype(np.int64)
    names = pa.concat_arrays([coded.dictionary, pa.nulls(1, pa.binary())])  # code -1 is the null key
    return Items(rows=rows, codes=codes % len(names), names=names, values=values)


def _column_items(name: str, column: pa.Array, repaired: Counter[str]) -> Items:
    """Flatten one column that holds the values of one key."""
    values = _value_text(column, repaired)
    kept = as_mask(values.is_valid())
    rows = np.flatnonzero(kept)
    names = pa.array([name.encode()], pa.binary())
    return Items(rows=rows, codes=np.zeros(len(rows), np.int64), names=names, values=values.filter(pa.array(kept)))


def _value_text(column: pa.Array, repaired: Counter[str]) -> pa.BinaryArray:
    return text(column, scalar=None, nested="nested_attribute", repaired=repaired)


def _concatenate(found: Sequence[Items]) -> Items:
    if len(found) == 1:
        return found[0]
    shifts = np.cumsum([0, *(len(items.names) for items in found[:-1])])
    return Items(
        rows=np.concatenate([items.rows for items in found]),
        codes=np.concatenate([items.codes + shift for items, shift in zip(found, shifts, strict=True)]),
        names=pa.concat_arrays([items.names for items in found]),
        values=pa.concat_arrays([items.values for items in found]),
    )


def _filter(items: Items, mask: npt.NDArray[np.bool_]) -> Items:
    return Items(rows=items.rows[mask], codes=items.codes[mask], names=items.names, values=items.values.filter(pa.array(mask)))


def _clean(items: Items, max_bytes: int, repaired: Counter[str]) -> Items:
    """Clean keys and values like any text; drop what has no value, and what has no name."""
    trial: Counter[str] = Counter()
    names = clean_text(items.names, max_bytes=max_bytes, repaired=trial)
    if trial:  # counted by item, not by distinct key, so that counters add up whatever the block size
        clean_text(items.names.take(pa.array(items.codes)), max_bytes=max_bytes, repaired=repaired)
    values = clean_text(items.values, max_bytes=max_bytes, repaired=repaired)
    named = as_mask(names.is_valid())[items.codes]
    valued = as_mask(values.is_valid())
    count("nameless_attribute", int((valued & ~named).sum()), repaired)
    items = Items(rows=items.rows, codes=items.codes, names=names, values=values)
    return items if (named & valued).all() else _filter(items, named & valued)


def _order(items: Items, repaired: Counter[str]) -> Items:
    """Sort by row and key bytes; of equal keys in one row keep the last. Names become the sorted distinct keys."""
    names = items.names.unique().drop_null()
    names = names.take(pc.sort_indices(names))
    ranks = pc.index_in(items.names, names).fill_null(0).to_numpy().astype(np.int64)
    places = items.rows * len(names) + ranks[items.codes]
    if (places[1:] > places[:-1]).all():
        return Items(rows=items.rows, codes=ranks[items.codes], names=names, values=items.values)
    order = np.argsort(places, kind="stable")
    places = places[order]
    last = np.append(places[1:] != places[:-1], [True])[: len(places)]
    count("duplicate_attribute", len(places) - int(last.sum()), repaired)
    order, places = order[last], places[last]
    return Items(rows=places // len(names), codes=places % len(names), names=names, values=items.values.take(pa.array(order)))
