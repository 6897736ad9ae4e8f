"""Product ids: valid and unchanged, or rejected with a reason. An id is never repaired, save whole floats such as `12.0`."""

from __future__ import annotations

from collections import Counter
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from pipelines.normalize.reasons import QUARANTINE_REASONS
from pipelines.normalize.sanitize import BIDIS, CONTROLS, SPACES, VALID_UTF8, ZERO_WIDTHS, as_mask, character_class
from pipelines.normalize.scalars import count, is_text, plain, text

Faults = npt.NDArray[np.uint8]
UnsafeIds = Literal["quarantine", "accept"]

# Most ids match this, which spares them every other look. One regular expression costs about 0.1 us an id.
PLAIN = r"\A\.?[A-Za-z0-9_~:,+=@#!*()|]+(?:\.?[A-Za-z0-9_~:,+=@#!*()|-])*\.?\z"
HIDDEN = character_class((*CONTROLS, *BIDIS, *ZERO_WIDTHS, (0x09, 0x0D), (0x85, 0x85), (0x2028, 0x2029)))
UNSAFE = character_class(SPACES, also=r" /\\'\"`<>") + r"|\.\.|\A-"
BLANK = r"\A" + character_class(SPACES, also=" ") + r"*\z"
WHOLE = r"\A-?[0-9]+\z"
# Above 2**53 a float no longer tells neighbouring integers apart, so it may name another product.
EXACT_FLOAT = 2.0**53


def fault(reason: str) -> int:
    """Return the number of a quarantine reason; 0 is no fault, and of two faults the lower number is the more severe."""
    return QUARANTINE_REASONS.index(reason) + 1


def ids(column: pa.Array, *, max_bytes: int, unsafe: UnsafeIds, repaired: Counter[str]) -> tuple[pa.BinaryArray, Faults]:
    """Return ids as bytes, as far as they can be spelled, and the fault of each."""
    column = plain(column)
    spelled = _spelled(column)
    faults = np.zeros(len(column), np.uint8)
    present = as_mask(column.is_valid())
    faults[~present] = fault("null_id")
    if not is_text(column.type) and not pt.is_integer(column.type):
        whole = _whole(column, spelled)
        faults[present & ~whole] = fault("id_wrong_type")
        count("id_from_float", int(whole.sum()), repaired)
    odd = faults == 0
    odd &= ~as_mask(pc.match_substring_regex(spelled, PLAIN)) | (as_mask(pc.greater(pc.binary_length(spelled), max_bytes)))
    if odd.any():
        faults[odd] = _odd_faults(spelled.filter(pa.array(odd)), max_bytes, unsafe)
    return spelled, faults


def _spelled(column: pa.Array) -> pa.BinaryArray:
    """Spell every value, for ids and for excerpts alike; its counters are nobody's concern."""
    if pt.is_nested(column.type):
        return pa.array([None if value is None else str(value).encode() for value in column.to_pylist()], pa.binary())
    if pt.is_floating(column.type):
        exact = column.cast(pa.float64())
        whole = pc.fill_null(pc.and_(pc.less(pc.abs(exact), EXACT_FLOAT), pc.equal(exact, pc.floor(exact))), fill_value=False)
        integers = pc.if_else(whole, exact, 0.0).cast(pa.int64())
        return pc.if_else(whole, integers.cast(pa.string()), exact.cast(pa.string())).cast(pa.binary())
    return text(column, scalar=None, repaired=Counter())


def _whole(column: pa.Array, spelled: pa.BinaryArray) -> npt.NDArray[np.bool_]:
    """Return which floats or decimals are integers, exactly; no other type has any."""
    if pt.is_floating(column.type) or pt.is_decimal(column.type):
        return as_mask(pc.match_substring_regex(spelled, WHOLE))
    return np.zeros(len(column), np.bool_)


def _odd_faults(spelled: pa.BinaryArray, max_bytes: int, unsafe: UnsafeIds) -> Faults:
    """Return the most severe fault of every id that is not plainly good."""
    faults = np.zeros(len(spelled), np.uint8)
    valid = as_mask(pc.match_substring_regex(spelled, VALID_UTF8))
    characters = pc.if_else(pa.array(valid), spelled, b"").cast(pa.string())
    if unsafe == "quarantine":
        faults[as_mask(pc.match_substring_regex(characters, UNSAFE))] = fault("unsafe_id")
    faults[as_mask(pc.match_substring_regex(characters, HIDDEN))] = fault("control_id")
    faults[as_mask(pc.greater(pc.binary_length(spelled), max_bytes))] = fault("long_id")
    faults[as_mask(pc.match_substring_regex(characters, BLANK))] = fault("empty_id")
    faults[~valid] = fault("invalid_utf8_id")
    return faults
