"""Raw Arrow columns of any type as text, numbers and booleans; what cannot be converted becomes null, with a counter.

Whole columns at a time: a type is looked at once, text is matched by one RE2 pass, and nothing raises on any value.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from pipelines.normalize.sanitize import as_mask, replace

Mask = npt.NDArray[np.bool_]

NUMBER = r"\A\s*[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?\s*\z"
INTEGER = r"\A\s*[+-]?[0-9]+(?:\.0*)?\s*\z"
NOT_FINITE = r"(?i)\A\s*[+-]?(?:nan|inf|infinity)\s*\z"
BLANK = r"\A\s*\z"
TRUE = r"(?i)\A\s*(?:true|t|yes|y|on|1)\s*\z"
FALSE = r"(?i)\A\s*(?:false|f|no|n|off|0)\s*\z"

INT64_MAX = 2**63 - 1
HEX = np.frombuffer(b"0123456789abcdef", np.uint8)


def plain(column: pa.Array) -> pa.Array:
    """Return the column without dictionary, run-end, view or extension wrapping; text of every kind becomes binary."""
    kind = column.type
    if isinstance(kind, pa.UuidType):
        return _spell_uuids(column.storage)
    if isinstance(kind, pa.BaseExtensionType):
        return plain(column.storage)
    if pt.is_dictionary(kind):
        return plain(column.dictionary_decode())
    if pt.is_run_end_encoded(kind):
        return plain(pc.run_end_decode(column))
    if is_text(kind) and kind != pa.binary():
        return column.cast(pa.binary())
    return column


def is_text(kind: pa.DataType) -> bool:
    """Whether values of this type are bytes or text."""
    return bool(
        pt.is_string(kind)
        or pt.is_binary(kind)
        or pt.is_large_string(kind)
        or pt.is_large_binary(kind)
        or pt.is_string_view(kind)
        or pt.is_binary_view(kind)
        or pt.is_fixed_size_binary(kind)
    )


def text(column: pa.Array, *, repaired: Counter[str], scalar: str | None, nested: str = "wrong_type") -> pa.BinaryArray:
    """Return scalars as UTF-8 candidates in one spelling: `true`, `12`, `12.5`, ISO 8601. `scalar` and `nested` name the counters."""
    column = plain(column)
    kind = column.type
    if pt.is_binary(kind):
        return column
    if pt.is_floating(kind):
        spelled = spell_floats(finite(column, repaired))
    elif pt.is_decimal(kind):
        spelled = _spell_decimals(column)
    elif pt.is_boolean(kind) or pt.is_integer(kind) or pt.is_date(kind) or pt.is_time(kind):
        spelled = column.cast(pa.string())
    elif pt.is_timestamp(kind):
        zoned = kind.tz is not None
        moments = column.cast(pa.timestamp(kind.unit, "UTC" if zoned else None)).cast(pa.string())
        spelled = pc.replace_substring_regex(moments, r"\.0+(Z?)$", r"\1")
    else:
        count(nested, len(column) - column.null_count, repaired)
        return pa.nulls(len(column), pa.binary())
    if scalar:
        count(scalar, len(column) - column.null_count, repaired)
    return spelled.cast(pa.binary())


def floats(column: pa.Array, *, repaired: Counter[str]) -> pa.DoubleArray:
    """Return a column as finite float64; -0.0 becomes 0.0, because columns are compared by their bits."""
    column = plain(column)
    kind = column.type
    if pt.is_decimal(kind):  # by way of text: Arrow's own cast makes 19.990000000000002 of 19.99
        numbers = _spell_decimals(column).cast(pa.float64())
    elif pt.is_binary(kind):
        numbers = finite(_floats_from_text(column, repaired), repaired)
        count("number_from_text", len(numbers) - numbers.null_count, repaired)
    elif pt.is_floating(kind) or pt.is_integer(kind):
        numbers = finite(column.cast(pa.float64(), safe=False), repaired)
    else:
        return _wrong_type(column, pa.float64(), repaired)
    return pc.add(numbers, 0.0)


def integers(column: pa.Array, *, repaired: Counter[str]) -> pa.Int64Array:
    """Return a column as int64; a fraction is a bad number, not a number to round."""
    column = plain(column)
    kind = column.type
    if pt.is_uint64(kind):
        return keep(column, as_mask(pc.less_equal(column, pa.scalar(INT64_MAX, pa.uint64()))), "integer_overflow", repaired).cast(
            pa.int64()
        )
    if pt.is_integer(kind):
        return column.cast(pa.int64())
    if pt.is_floating(kind):
        return _integers_from_floats(column.cast(pa.float64()), repaired)
    if pt.is_decimal(kind):
        return _integers_from_text(_spell_decimals(column).cast(pa.binary()), repaired)
    if pt.is_binary(kind):
        numbers = _integers_from_text(column, repaired)
        count("number_from_text", len(numbers) - numbers.null_count, repaired)
        return numbers
    return _wrong_type(column, pa.int64(), repaired)


def booleans(column: pa.Array, *, repaired: Counter[str]) -> pa.BooleanArray:
    """Return a column as booleans: true/false, yes/no, on/off and 1/0 in any case; blank text is null."""
    column = plain(column)
    kind = column.type
    if pt.is_boolean(kind):
        return column
    if pt.is_null(kind):
        return column.cast(pa.bool_())
    if pt.is_binary(kind):
        yes, no = (as_mask(pc.match_substring_regex(column, pattern)) for pattern in (TRUE, FALSE))
        given = as_mask(column.is_valid()) & ~as_mask(pc.match_substring_regex(column, BLANK))
    elif pt.is_integer(kind) or pt.is_floating(kind) or pt.is_decimal(kind):
        numbers = column.cast(pa.float64(), safe=False)
        yes, no = as_mask(pc.equal(numbers, 1.0)), as_mask(pc.equal(numbers, 0.0))
        given = as_mask(column.is_valid())
    else:
        return _wrong_type(column, pa.bool_(), repaired)
    known = yes | no
    count("bool_from_other", int(known.sum()), repaired)
    count("bad_bool", int((given & ~known).sum()), repaired)
    return pa.array(yes, mask=~known)


def spell_floats(column: pa.Array) -> pa.StringArray:
    """Spell floats by their shortest digits, whole ones without a point."""
    return (
        pc.add(column, pa.scalar(0.0).cast(column.type)).cast(pa.string())
        if column.type != pa.float16()
        else spell_floats(column.cast(pa.float32()))
    )


def finite(column: pa.Array, repaired: Counter[str]) -> pa.Array:
    """Return a float column with null for NaN and the infinities; other types pass."""
    return keep(column, as_mask(pc.is_finite(column)), "not_finite", repaired) if pt.is_floating(column.type) else column


def keep(column: pa.Array, mask: Mask, reason: str, repaired: Counter[str]) -> pa.Array:
    """Return the column with null wherever a value is outside `mask`; those values are counted."""
    lost = as_mask(column.is_valid()) & ~mask
    if not lost.any():
        return column
    repaired[reason] += int(lost.sum())
    return pc.if_else(pa.array(lost), pa.scalar(None, column.type), column)


def count(reason: str, cells: int, repaired: Counter[str]) -> None:
    """Add to a counter, without leaving a zero behind."""
    if cells:
        repaired[reason] += cells


def scatter(values: pa.Array, mask: Mask) -> pa.Array:
    """Return a column of the mask's length with `values` where the mask holds and null elsewhere."""
    return replace(pa.nulls(len(mask), values.type), mask, values)


def ascii_text(column: pa.BinaryArray, mask: Mask) -> pa.StringArray:
    """Return the masked cells, which a pattern has shown to be ASCII, as trimmed text."""
    return pc.ascii_trim_whitespace(column.filter(mask).cast(pa.string()))


def _wrong_type(column: pa.Array, kind: pa.DataType, repaired: Counter[str]) -> pa.Array:
    count("wrong_type", len(column) - column.null_count, repaired)
    return pa.nulls(len(column), kind)


def _floats_from_text(column: pa.BinaryArray, repaired: Counter[str]) -> pa.DoubleArray:
    numeric = as_mask(pc.match_substring_regex(column, NUMBER))
    infinite = as_mask(pc.match_substring_regex(column, NOT_FINITE))
    blank = as_mask(pc.match_substring_regex(column, BLANK), null=True)
    count("not_finite", int(infinite.sum()), repaired)
    count("bad_number", int((~(numeric | infinite | blank)).sum()), repaired)
    return scatter(ascii_text(column, numeric).cast(pa.float64()), numeric)


def _integers_from_floats(column: pa.DoubleArray, repaired: Counter[str]) -> pa.Int64Array:
    column = finite(column, repaired)
    column = keep(column, as_mask(pc.equal(column, pc.floor(column))), "bad_number", repaired)
    # 2**63 is the first float that does not fit; -2**63 still does.
    fits = as_mask(pc.and_(pc.less(column, 2.0**63), pc.greater_equal(column, -(2.0**63))))
    return keep(column, fits, "integer_overflow", repaired).cast(pa.int64(), safe=False)


def _integers_from_text(column: pa.BinaryArray, repaired: Counter[str]) -> pa.Int64Array:
    whole = as_mask(pc.match_substring_regex(column, INTEGER))
    digits = pc.replace_substring_regex(ascii_text(column, whole), r"\A\+?(-?)0*([0-9]*?)(?:\.0*)?\z", r"\1\2")
    digits = pc.replace_substring_regex(digits, r"\A-?\z", "0")
    short = pc.less_equal(pc.binary_length(digits), 38)  # all that a decimal128 holds; longer ones overflow anyway
    wide = pc.if_else(short, digits, "9" * 38).cast(pa.decimal128(38, 0))
    fits = as_mask(
        pc.and_(pc.less_equal(wide, pa.scalar(INT64_MAX, wide.type)), pc.greater_equal(wide, pa.scalar(-INT64_MAX - 1, wide.type)))
    )
    exact = scatter(keep(wide, fits, "integer_overflow", repaired).cast(pa.int64()), whole)
    rest = pc.if_else(pa.array(whole), pa.scalar(None, pa.binary()), column)
    if rest.null_count == len(rest):
        return exact
    return pc.coalesce(exact, _integers_from_floats(_floats_from_text(rest, repaired), repaired))


def _spell_decimals(column: pa.Array) -> pa.StringArray:
    """Spell decimals exactly, without trailing zeros."""
    spelled = pc.replace_substring_regex(column.cast(pa.string()), r"(\.[0-9]*?)0+$", r"\1")
    return pc.replace_substring_regex(spelled, r"\.$", "")


def _spell_uuids(column: pa.Array) -> pa.BinaryArray:
    """Spell 16-byte UUIDs in the usual 8-4-4-4-12 form."""
    if len(column) == 0:
        return pa.array([], pa.binary())
    raw = np.frombuffer(column.buffers()[1], np.uint8)[column.offset * 16 : (column.offset + len(column)) * 16].reshape(-1, 16)
    nibbles = HEX[np.stack([raw >> 4, raw & 15], axis=-1).reshape(-1, 32)]
    parts: list[Any] = np.split(nibbles, [8, 12, 16, 20], axis=1)
    dash = np.full((len(raw), 1), ord("-"), np.uint8)
    joined = np.concatenate([parts[0], *(piece for part in parts[1:] for piece in (dash, part))], axis=1)
    return pa.array(joined.view("S36").ravel(), pa.binary(), mask=~as_mask(column.is_valid()))
