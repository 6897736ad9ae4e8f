"""Raw source batches in, products and rejected rows out; no row is lost: rows in = products + rejected.

Columns are converted whole (no Python per row). A row is rejected for its id, for having no text, or because its source could
not parse it; anything else is repaired and counted (`pipelines.normalize.reasons`). Normalising what is normal changes nothing. Duplicate
ids are for the diff, which sees all shards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.contracts import DeletedRule
from pipelines.errors import InputError
from pipelines.normalize.attributes import Limits, attribute_map
from pipelines.normalize.identifiers import Faults, UnsafeIds, fault, ids
from pipelines.normalize.locales import canonical_locale, locales
from pipelines.normalize.moments import moments, update_times
from pipelines.normalize.reasons import QUARANTINE_REASONS, REASONS
from pipelines.normalize.sanitize import as_mask, clean_text
from pipelines.normalize.scalars import booleans, floats, integers, keep, text
from pipelines.schema import ATTRIBUTES, DELETED, ID, LOCALE, MALFORMED, QUARANTINE, UPDATED_AT, ProductSchema

STAGE_NAME = "normalize"
EXCERPT_BYTES = 200
CONVERTERS: Mapping[str, Callable[..., pa.Array]] = {"int": integers, "float": floats, "bool": booleans, "timestamp": moments}
# Small enough for the caches (16 Ki rows of 600 bytes are 10 MB), large enough to forget the fixed cost of an Arrow call.
BLOCK_ROWS = 16_384
# A string column holds 2 GiB; cleaning may triple a text (U+FFFD), and attributes share one column.
BLOCK_BYTES = 256 * 2**20


@dataclass(frozen=True, kw_only=True)
class NormalizeOptions:
    """What a normal product looks like, and what to do with what is none."""

    schema: ProductSchema
    deleted: DeletedRule | None
    now: datetime
    default_locale: str = "und"
    max_id_bytes: int = 256
    max_text_bytes: int = 32_768
    max_attributes: int = 256
    unsafe_ids: UnsafeIds = "quarantine"
    clock_skew_s: int = 300
    non_negative: tuple[str, ...] | None = None  # None: `price`, if it is a numeric filter

    def __post_init__(self) -> None:
        if self.now.tzinfo is None:
            raise InputError(f"now = {self.now} has no time zone. Pass `Window.until`, which is aware.")
        if canonical_locale(self.default_locale) != self.default_locale:
            raise InputError(f"default_locale `{self.default_locale}` is no canonical language tag. Write it like `de-CH` or `und`.")
        if self.unsafe_ids not in ("quarantine", "accept"):
            raise InputError(f"unsafe_ids is `{self.unsafe_ids}`. Use `quarantine` or `accept`.")
        for name, value, least in (
            ("max_id_bytes", self.max_id_bytes, 1),
            ("max_text_bytes", self.max_text_bytes, 16),
            ("max_attributes", self.max_attributes, 1),
            ("clock_skew_s", self.clock_skew_s, 0),
        ):
            if value < least:
                raise InputError(f"{name} is {value}. Use at least {least}.")
        numeric = [name for name, kind in self.schema.filters.items() if kind in ("int", "float")]
        for name in self.non_negative or ():
            if name not in numeric:
                raise InputError(f"non_negative names `{name}`, which is no int or float filter. Known: {', '.join(numeric) or 'none'}.")

    @property
    def never_negative(self) -> tuple[str, ...]:
        """The numeric filters in which a negative number is an error."""
        if self.non_negative is not None:
            return self.non_negative
        return ("price",) if self.schema.filters.get("price") in ("int", "float") else ()


@dataclass(frozen=True, kw_only=True)
class Normalized:
    """Products (live and deleted) in schema order, one quarantine record per rejected row, and cells repaired by reason."""

    products: pa.Table
    rejected: pa.Table
    repaired: Mapping[str, int]
    rows_in: int


def normalize(batch: pa.RecordBatch | pa.Table, options: NormalizeOptions, *, shard: str, first_row: int = 0) -> Normalized:
    """Normalise a batch whose first row is row `first_row` of the shard; both outputs keep the order of rows."""
    table = pa.Table.from_batches([batch]) if isinstance(batch, pa.RecordBatch) else batch
    repaired: Counter[str] = Counter()
    products, rejected = [], []
    start = 0
    while start < table.num_rows:
        block = _block(table, start)
        good, bad = _normalize_block(block, options, repaired, shard=shard, first_row=first_row + start)
        products.append(good)
        rejected.append(bad)
        start += block.num_rows
    normalized = Normalized(
        products=pa.Table.from_batches(products, options.schema.arrow),
        rejected=pa.Table.from_batches(rejected, QUARANTINE),
        repaired=dict(sorted(repaired.items())),
        rows_in=table.num_rows,
    )
    assert normalized.rows_in == normalized.products.num_rows + normalized.rejected.num_rows, "a row was lost or doubled"
    assert repaired.keys() <= REASONS.keys(), f"counters without a reason: {repaired.keys() - REASONS.keys()}"
    return normalized


def _block(table: pa.Table, start: int) -> pa.Table:
    """Return the next rows that fit a block; one row always does."""
    rows = BLOCK_ROWS
    while rows > 1 and table.slice(start, rows).nbytes > BLOCK_BYTES:
        rows //= 2
    return table.slice(start, rows)


def _normalize_block(
    block: pa.Table, options: NormalizeOptions, repaired: Counter[str], *, shard: str, first_row: int
) -> tuple[pa.RecordBatch, pa.RecordBatch]:
    """Normalise rows that fit one array per column; faulty ids leave first, so that repairs count only what is kept."""
    columns = {name: _array(block.column(i)) for i, name in enumerate(block.column_names)}
    names, faults = ids(
        columns.get(ID, pa.nulls(block.num_rows)), max_bytes=options.max_id_bytes, unsafe=options.unsafe_ids, repaired=repaired
    )
    lines = columns.pop(MALFORMED, None)
    lines = pa.nulls(block.num_rows, pa.binary()) if lines is None else text(lines, scalar=None, repaired=Counter())
    faults[as_mask(lines.is_valid())] = fault("malformed_row")
    rows = np.arange(first_row, first_row + block.num_rows)
    good = faults == 0
    excerpts = pc.coalesce(lines, names, b"")
    if not good.all():
        columns = {name: column.filter(pa.array(good)) for name, column in columns.items()}
    batch = _products(names if good.all() else names.filter(pa.array(good)), columns, options, repaired)
    empty = _without_text(batch, options.schema)
    if empty.any():
        faults[np.flatnonzero(good)[empty]] = fault("no_text")
        batch = batch.filter(pa.array(~empty))
    return batch, _rejected(rows, faults, names, excerpts, shard=shard, options=options)


def _array(column: pa.ChunkedArray) -> pa.Array:
    """Return a column as one array, without copying when it is one."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _products(names: pa.BinaryArray, columns: Mapping[str, pa.Array], options: NormalizeOptions, repaired: Counter[str]) -> pa.RecordBatch:
    """Convert every column of rows whose ids are good; a column that is not there is null."""
    schema, num_rows = options.schema, len(names)
    absent = pa.nulls(num_rows)
    built: list[pa.Array] = [names.cast(pa.string())]
    built.append(locales(columns.get(LOCALE, absent), default=options.default_locale, repaired=repaired))
    for name in schema.fields:
        kind = "string" if name in schema.text else schema.filters[name]
        built.append(_field(columns.get(name, absent), kind, options, repaired, non_negative=name in options.never_negative))
    if schema.attributes:
        prefix = f"{ATTRIBUTES}."
        single = {name.removeprefix(prefix): column for name, column in columns.items() if name.startswith(prefix)}
        limits = Limits(max_attributes=options.max_attributes, max_bytes=options.max_text_bytes)
        built.append(attribute_map(columns.get(ATTRIBUTES), single, num_rows=num_rows, limits=limits, repaired=repaired))
    built.append(update_times(columns.get(UPDATED_AT, absent), now=options.now, skew_s=options.clock_skew_s, repaired=repaired))
    built.append(_deleted(columns, options.deleted, absent, repaired))
    return pa.RecordBatch.from_arrays(built, schema=schema.arrow)


def _field(column: pa.Array, kind: str, options: NormalizeOptions, repaired: Counter[str], *, non_negative: bool) -> pa.Array:
    """Convert one text field or filter column."""
    if kind == "string":
        return clean_text(text(column, scalar="text_from_scalar", repaired=repaired), max_bytes=options.max_text_bytes, repaired=repaired)
    converted = CONVERTERS[kind](column, repaired=repaired)
    return keep(converted, as_mask(pc.greater_equal(converted, 0)), "negative_number", repaired) if non_negative else converted


def _deleted(columns: Mapping[str, pa.Array], rule: DeletedRule | None, absent: pa.Array, repaired: Counter[str]) -> pa.BooleanArray:
    """Say which rows are tombstones; a source hands the rule's column over as `deleted`, or under its own name."""
    rule = rule or DeletedRule(column=DELETED)
    column = columns.get(DELETED, columns.get(rule.column, absent))
    wanted: Any
    if isinstance(rule.equals, bool):
        wanted = pc.equal(booleans(column, repaired=repaired), rule.equals)
    elif isinstance(rule.equals, int):
        wanted = pc.equal(floats(column, repaired=repaired), float(rule.equals))
    else:
        words = clean_text(text(column, scalar=None, repaired=repaired), max_bytes=EXCERPT_BYTES, repaired=repaired)
        wanted = pc.equal(words, rule.equals)
    return pc.fill_null(wanted, fill_value=False)


def _without_text(batch: pa.RecordBatch, schema: ProductSchema) -> npt.NDArray[np.bool_]:
    """Return which live products have no text at all. A schema without text fields asks for none."""
    empty = np.full(batch.num_rows, bool(schema.text))
    for name in schema.text:
        empty &= as_mask(batch.column(name).is_null())
    return empty & ~as_mask(batch.column(DELETED))


def _rejected(
    rows: npt.NDArray[np.int64], faults: Faults, names: pa.Array, excerpts: pa.Array, *, shard: str, options: NormalizeOptions
) -> pa.RecordBatch:
    """Make one quarantine record per faulty row. Only for a fault of the id is `field` the id."""
    bad = np.flatnonzero(faults)
    reasons = [QUARANTINE_REASONS[number - 1] for number in faults[bad]]
    fields = {"malformed_row": MALFORMED, "no_text": next(iter(options.schema.text), ID)}
    # A row without text has a good id, by which the diff finds the published product: that id stays as it is.
    named = [
        name if name is None else name.decode() if reason == "no_text" else _printable(name[: options.max_id_bytes])
        for name, reason in zip(names.take(pa.array(bad)).to_pylist(), reasons, strict=True)
    ]
    shown = pc.binary_slice(excerpts.take(pa.array(bad)), 0, EXCERPT_BYTES)
    columns = [
        pa.repeat(shard, len(bad)),
        pa.array(rows[bad]),
        pa.array(named, pa.string()),
        pa.repeat(STAGE_NAME, len(bad)),
        pa.array(reasons, pa.string()),
        pa.array([fields.get(reason, ID) for reason in reasons], pa.string()),
        pc.if_else(pa.array(faults[bad] == fault("no_text")), b"", shown),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=QUARANTINE)


def _printable(name: bytes) -> str:
    """Return a bad id as text, with escapes for what is no text or would not show."""
    shown = name.decode("utf-8", "backslashreplace")
    return shown if shown.isprintable() else "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)
