"""The window's rows, twice: an expression that lets a reader skip data, and the exact rule on the rows that were read.

A row has no update time when it is null, unreadable, or before 1970 (a sentinel): normalising makes all of them null.
Times without a zone are UTC.
"""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.types as pt

from pipelines.contracts import Window
from pipelines.errors import InputError
from pipelines.normalize.moments import moments
from pipelines.schema import MALFORMED, TIMESTAMP, UPDATED_AT

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_NS = {"s": 1_000_000_000, "ms": 1_000_000, "us": 1_000, "ns": 1}
_DAY_NS = 86_400 * 1_000_000_000
_INT64 = 2**63


def effective(window: Window | None, *, updated_at: str | None) -> Window | None:
    """Return the window if it filters anything; refuse one that no column can answer."""
    if window is None or window.full:
        return None
    if updated_at is None:
        raise InputError(
            "a window was asked for, but the source maps no `updated_at`. Set `source.updated_at` to the column that holds "
            "the time of the last change, or read everything with `--since beginning`."
        )
    return window


def within(batch: pa.RecordBatch, window: Window | None) -> pa.RecordBatch:
    """Return the rows of a batch, already in our names, that the window holds. Unparsed lines pass: nobody knows their time."""
    if window is None or batch.num_rows == 0:
        return batch
    times = moments(batch.column(UPDATED_AT), repaired=Counter())
    timeless = pc.or_kleene(times.is_null(), pc.less(times, pa.scalar(EPOCH, TIMESTAMP)))
    since = EPOCH if window.since is None else max(window.since, EPOCH)
    fresh = pc.greater_equal(times, pa.scalar(since, TIMESTAMP))
    early = pc.less(times, pa.scalar(window.until, TIMESTAMP))
    inside = pc.and_(fresh, early) if window.bounded else pc.or_kleene(fresh, timeless)
    if MALFORMED in batch.schema.names:
        inside = pc.or_kleene(inside, batch.column(MALFORMED).is_valid())
    return batch.filter(inside)


def expression(column: str, kind: pa.DataType, window: Window) -> ds.Expression | None:
    """Return what a reader may skip by, or None where only parsed values tell (text, numbers). Never excludes a row of the window."""
    field = ds.field(column)
    since, until, epoch = (_literal(moment, kind) for moment in (window.since or EPOCH, window.until, EPOCH))
    if since is None or until is None or epoch is None:
        return None
    if window.bounded:
        return (field >= since) & (field < until)
    return field.is_null() | (field >= since) | (field < epoch)


def _literal(moment: datetime, kind: pa.DataType) -> pa.Scalar | None:
    """Return the first value of a column's type that is not before the moment."""
    if pt.is_timestamp(kind):
        unit_ns = _NS[kind.unit]
    elif pt.is_date(kind):
        unit_ns = _DAY_NS if pt.is_date32(kind) else _NS["ms"]
    else:
        return None
    count = -(-(moment - EPOCH) // timedelta(microseconds=1) * 1000 // unit_ns)
    storage = pa.int32() if pt.is_date32(kind) else pa.int64()
    return pa.scalar(count, storage).cast(kind) if -_INT64 <= count < _INT64 else None
