"""Raw Arrow columns of any type as UTC timestamps in microseconds. Nothing raises on any value.

A time without a zone is UTC. A number counts from 1970, and its magnitude tells seconds from milli-, micro- and nanoseconds.
"""

from __future__ import annotations

from collections import Counter
from datetime import datetime, timedelta

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from pipelines.normalize.sanitize import as_mask
from pipelines.normalize.scalars import BLANK, ascii_text, count, finite, keep, plain, scatter
from pipelines.schema import TIMESTAMP

Int64s = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

ISO = (
    r"\A\s*(?P<year>[0-9]{4})-(?P<month>[0-9]{2})-(?P<day>[0-9]{2})"
    r"(?:[Tt ](?P<hour>[0-9]{2}):(?P<minute>[0-9]{2})(?::(?P<second>[0-9]{2})(?:[.,](?P<fraction>[0-9]{1,6})[0-9]*)?)?"
    r" ?(?P<zone>[Zz]|UTC|(?P<sign>[+-])(?P<zone_hour>[0-9]{2})(?::?(?P<zone_minute>[0-9]{2}))?)?)?\s*\z"
)
EPOCH = r"\A\s*[0-9]{9,19}\s*\z"

SECOND_US = 1_000_000
DAY_H, HOUR_M = 24, 60
FIRST_US = int(np.datetime64("0001-01-01", "us").astype(np.int64))
LAST_US = int(np.datetime64("9999-12-31T23:59:59.999999", "us").astype(np.int64))
UNITS_PER_S = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
# Below 1e11 a number counts seconds (until the year 5138), below 1e14 milliseconds (from 1973), and so on.
MAGNITUDES = ((1e11, "s"), (1e14, "ms"), (1e17, "us"), (np.inf, "ns"))


def moments(column: pa.Array, *, repaired: Counter[str]) -> pa.TimestampArray:
    """Return a column as UTC microseconds; null where it cannot be read."""
    column = plain(column)
    kind = column.type
    if pt.is_timestamp(kind):
        if kind.tz is None:
            count("naive_timestamp", len(column) - column.null_count, repaired)
        return _from_epoch(column.cast(pa.int64()), kind.unit, repaired)
    if pt.is_date(kind):
        count("naive_timestamp", len(column) - column.null_count, repaired)
        return _from_epoch(column.cast(pa.timestamp("ms")).cast(pa.int64()), "ms", repaired)
    if pt.is_binary(kind):
        return _from_text(column, repaired)
    if pt.is_integer(kind) or pt.is_floating(kind) or pt.is_decimal(kind):
        return _from_numbers(column, repaired)
    count("wrong_type", len(column) - column.null_count, repaired)
    return pa.nulls(len(column), TIMESTAMP)


def update_times(column: pa.Array, *, now: datetime, skew_s: int, repaired: Counter[str]) -> pa.TimestampArray:
    """Return `updated_at` between 1970 and `now`: earlier becomes null (always re-read), later than the skew becomes `now`."""
    times = moments(column, repaired=repaired)
    if times.null_count == len(times):
        return times
    limits = pc.min_max(times)
    if limits["min"].value < 0:
        times = keep(times, as_mask(pc.greater_equal(times, pa.scalar(0, TIMESTAMP))), "ancient_timestamp", repaired)
    latest = pa.scalar(now + timedelta(seconds=skew_s), TIMESTAMP)
    if limits["max"].value > latest.value:
        future = pc.greater(times, latest)
        count("future_timestamp", int(as_mask(future).sum()), repaired)
        times = pc.if_else(future, pa.scalar(now, TIMESTAMP), times)
    return times


def _from_epoch(column: pa.Int64Array, unit: str, repaired: Counter[str]) -> pa.TimestampArray:
    """Rescale counts of `unit` since 1970 to microseconds, within the years 1 to 9999."""
    valid = as_mask(column.is_valid())
    values = column.fill_null(0).to_numpy()
    per_s = UNITS_PER_S[unit]
    if per_s > SECOND_US:
        values = values // (per_s // SECOND_US)
    else:
        scale = SECOND_US // per_s
        values = np.clip(values, FIRST_US // scale - 1, LAST_US // scale + 1) * scale
    return _in_calendar(values, valid, repaired)


def _in_calendar(values_us: Int64s, valid: Mask, repaired: Counter[str]) -> pa.TimestampArray:
    inside = (values_us >= FIRST_US) & (values_us <= LAST_US)
    count("timestamp_overflow", int((valid & ~inside).sum()), repaired)
    return pa.array(values_us, pa.int64(), mask=~(valid & inside)).cast(TIMESTAMP)


def _from_numbers(column: pa.Array, repaired: Counter[str]) -> pa.TimestampArray:
    """Read epoch numbers; float64 keeps microseconds of present-day seconds, and integers stay exact."""
    exact = pt.is_integer(column.type) and not pt.is_uint64(column.type)
    numbers = column.cast(pa.int64()) if exact else finite(column.cast(pa.float64(), safe=False), repaired)
    valid = as_mask(numbers.is_valid())
    values = numbers.fill_null(0).to_numpy()
    magnitudes = np.abs(values.astype(np.float64))
    result = np.zeros(len(values), np.int64)
    floor = -1.0
    for ceiling, unit in MAGNITUDES:
        mask = (magnitudes > floor) & (magnitudes <= ceiling)
        ratio = UNITS_PER_S[unit] / SECOND_US
        if ratio > 1:
            result[mask] = np.clip(values[mask] // int(ratio), FIRST_US - SECOND_US, LAST_US + SECOND_US)
        else:
            result[mask] = values[mask] * round(1 / ratio)
        floor = ceiling
    times = _in_calendar(result, valid, repaired)
    count("timestamp_from_number", len(times) - times.null_count, repaired)
    return times


def _from_text(column: pa.BinaryArray, repaired: Counter[str]) -> pa.TimestampArray:
    """Read ISO 8601, and epoch numbers in text."""
    iso, epoch = (as_mask(pc.match_substring_regex(column, pattern)) for pattern in (ISO, EPOCH))
    blank = as_mask(pc.match_substring_regex(column, BLANK), null=True)
    count("bad_timestamp", int((~(iso | epoch | blank)).sum()), repaired)
    times = scatter(_from_iso(ascii_text(column, iso), repaired), iso)
    if not epoch.any():
        return times
    # Nineteen digits may pass 2**63; such a number is beyond year 9999 in any unit.
    numbers = pc.min_element_wise(ascii_text(column, epoch).cast(pa.uint64()), pa.scalar(2**63 - 1, pa.uint64())).cast(pa.int64())
    return pc.coalesce(times, scatter(_from_numbers(numbers, repaired), epoch))


def _from_iso(cells: pa.StringArray, repaired: Counter[str]) -> pa.TimestampArray:
    """Compute moments from the parts of ISO text; a date that no calendar has is a bad timestamp."""
    parts = pc.extract_regex(cells, ISO)
    year, month, day = (_numbers(parts, name) for name in ("year", "month", "day"))
    hour, minute, second = (_numbers(parts, name) for name in ("hour", "minute", "second"))
    zone_hour, zone_minute = (_numbers(parts, name) for name in ("zone_hour", "zone_minute"))
    fraction = pc.utf8_rpad(pc.struct_field(parts, "fraction"), 6, "0").cast(pa.int64()).to_numpy()
    months = (year - 1970).astype("M8[Y]").astype("M8[M]") + (month - 1)
    days = months.astype("M8[D]") + (day - 1)
    # Month 13 falls into another year, and 31 April into another month.
    exists = (months.astype("M8[Y]").astype(np.int64) + 1970 == year) & (days.astype("M8[M]") == months)
    exists &= (np.maximum(hour, zone_hour) < DAY_H) & (np.maximum.reduce([minute, second, zone_minute]) < HOUR_M)
    count("bad_timestamp", int((~exists).sum()), repaired)
    naive = as_mask(pc.equal(pc.struct_field(parts, "zone"), "")) & exists
    count("naive_timestamp", int(naive.sum()), repaired)
    west = np.where(as_mask(pc.equal(pc.struct_field(parts, "sign"), "-")), -1, 1)
    seconds = days.astype(np.int64) * 86400 + hour * 3600 + minute * 60 + second - west * (zone_hour * 3600 + zone_minute * 60)
    return _in_calendar(seconds * SECOND_US + fraction, exists, repaired)


def _numbers(parts: pa.StructArray, name: str) -> Int64s:
    """Return one part as integers, zero where it is absent."""
    part = pc.struct_field(parts, name)
    numbers: Int64s = pc.if_else(pc.equal(part, ""), "0", part).cast(pa.int64()).to_numpy()
    return numbers
