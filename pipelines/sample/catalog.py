"""The sample catalog: any range of its rows, at any night, as an Arrow table, and the same streamed to Parquet files.

Column names are a shop's own, not the pipeline's, so that a project has a mapping to make.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.errors import InputError
from pipelines.sample.assortment import CATEGORIES
from pipelines.sample.draws import Codes, Ids, below, bits
from pipelines.sample.life import Life, live
from pipelines.sample.spec import SampleSpec
from pipelines.sample.traits import Traits, range_table, traits
from pipelines.sample.vocabulary import BRANDS, LANGUAGES
from pipelines.sample.wording import wording
from pipelines.schema import ATTRIBUTE_MAP, ATTRIBUTES, TIMESTAMP

__all__ = ["SCHEMA", "SKU", "SampleSpec", "products", "row_numbers", "shuffled", "skus", "write"]

SKU = "sku"
_SKU_PREFIX = "CE-"
SCHEMA = pa.schema(
    [
        pa.field(SKU, pa.string(), nullable=False),
        pa.field("lang", pa.string(), nullable=False),
        pa.field("title", pa.string(), nullable=False),
        ("description", pa.string()),
        ("brand", pa.string()),
        ("category", pa.string()),
        (ATTRIBUTES, ATTRIBUTE_MAP),
        ("price", pa.float64()),
        ("in_stock", pa.bool_()),
        ("rating", pa.float64()),
        ("weight_g", pa.int64()),
        ("size", pa.string()),
        ("variant_group", pa.string()),
        ("is_active", pa.bool_()),
        ("modified_at", TIMESTAMP),
    ]
)

# Rows that are made, shuffled and written together: one Parquet row group, about 40 MB while it is being made.
BLOCK_ROWS = 1 << 16
# Columns that repeat few values; a dictionary for the others would be given up half-way and written again.
REPEATING = [
    "lang",
    "brand",
    "category",
    "in_stock",
    "rating",
    "size",
    "is_active",
    f"{ATTRIBUTES}.key_value.key",
    f"{ATTRIBUTES}.key_value.value",
]

STOCK_SHARE, RATED_SHARE = 0.88, 0.85
# Cents of regular prices and, after an odd number of price changes, of the others: no change leaves a price as it was.
REGULAR_CENTS, CHANGED_CENTS = np.array([99, 95, 90]), np.array([49, 50, 79])


def products(spec: SampleSpec, *, start: int, stop: int, night: int = 0) -> pa.Table:
    """Return the rows numbered `start` to `stop` that are in the catalog at a night, in the order of their numbers.

    Rows deleted by absence or not yet born are missing; tombstoned rows are there with `is_active` false.
    """
    if not 0 <= start <= stop:
        raise InputError(f"sample: the range of rows is {start} to {stop}. Give 0 <= start <= stop.")
    return _make(spec, np.arange(start, min(stop, spec.rows(night)), dtype=np.uint64), night=night)


def skus(ids: Ids) -> pa.StringArray:
    """Return the SKUs of row numbers."""
    return pc.binary_join_element_wise(_SKU_PREFIX, pc.utf8_lpad(pa.array(ids).cast(pa.string()), 8, "0"), "")


def row_numbers(names: pa.ChunkedArray) -> Ids:
    """Return the row numbers of SKUs."""
    numbers: Ids = pc.utf8_slice_codeunits(names, len(_SKU_PREFIX)).cast(pa.uint64()).to_numpy()
    return numbers


def _make(spec: SampleSpec, ids: Ids, *, night: int) -> pa.Table:
    """Make the listed ones of the given rows, in the given order."""
    life = live(spec, ids, night=night)
    if not life.listed.all():
        ids = ids[life.listed]
        life = live(spec, ids, night=night)
    rows = traits(spec.seed, ids)
    title, description, attributes = wording(spec.seed, ids, rows, life)
    groups = pc.binary_join_element_wise("G-", pc.utf8_lpad(pa.array(rows.head).cast(pa.string()), 8, "0"), "")
    columns = [
        skus(ids),
        pa.array(LANGUAGES).take(pa.array(rows.language)),
        title,
        description,
        pa.array(BRANDS).take(pa.array(rows.choices[:, 3])),
        _category_names().take(pa.array(rows.language * len(CATEGORIES) + rows.category)),
        attributes,
        *_typed(spec.seed, ids, rows, life),
        groups,
        pa.array(life.active),
        pa.array(life.modified_us).cast(TIMESTAMP),
    ]
    return pa.table(columns, schema=SCHEMA)


@functools.cache
def _category_names() -> pa.StringArray:
    return pa.array([category.name[language] for language in range(len(LANGUAGES)) for category in CATEGORIES])


def _typed(seed: int, ids: Ids, rows: Traits, life: Life) -> list[pa.Array]:
    """Return price, in_stock, rating, weight_g and size."""
    own, shared = bits(seed, "offer", ids), bits(seed, "measures", rows.head)
    stocked = (below(own, 0, 1000) < STOCK_SHARE * 1000) ^ (life.stocks % 2 == 1)
    rated = below(shared, 0, 1000) < RATED_SHARE * 1000
    rating = np.minimum(50, 36 + below(shared, 16, 10) + below(shared, 48, 6)) / 10.0
    weight = range_table("weight")[rows.noun, below(shared, 32, 1024)]
    return [
        pa.array(_cents(seed, rows, life, own) / 100.0),
        pa.array(stocked),
        pa.array(rating, mask=~rated),
        pa.array(weight),
        _sizes(seed, rows),
    ]


def _cents(seed: int, rows: Traits, life: Life, own: Ids) -> Codes:
    """Return prices in cents: the family's base price, a little more per variant, moved by up to 15 % per change."""
    base = range_table("price")[rows.noun, below(bits(seed, "price", rows.head), 0, 1024)]
    base = base + base * rows.member * 4 // 100
    percent = 85 + below(bits(seed, "price change", own ^ life.prices.astype(np.uint64)), 0, 31)
    euros = np.where(life.prices > 0, base * percent // 100, base)
    ending = below(own, 32, 3)
    cents = np.where(life.prices % 2 == 0, REGULAR_CENTS[ending], CHANGED_CENTS[ending])
    priced: Codes = np.maximum(0, euros - 1) * 100 + cents
    return priced


def _sizes(seed: int, rows: Traits) -> pa.StringArray:
    """Return sizes: variants step through the sizes of their category; null where a category has none."""
    names = [size for category in CATEGORIES for size in category.sizes]
    counts = np.array([len(category.sizes) for category in CATEGORIES])
    limit = counts[rows.category]
    chosen = (below(bits(seed, "size", rows.head), 0, np.maximum(limit, 1)) + rows.member) % np.maximum(limit, 1)
    first = (np.cumsum(counts) - counts)[rows.category]
    return pa.array(names).take(pa.array(np.where(limit > 0, first + chosen, 0), mask=limit == 0))


def write(directory: Path, spec: SampleSpec, *, night: int = 0, rows_per_file: int = 1_000_000) -> list[Path]:
    """Write the catalog of a night as `part-00000.parquet` and so on, each of at most `rows_per_file`; return the files.

    Memory follows the block of rows in hand, not the catalog. The order of rows is another one every night. Parts that
    a larger catalog left in the directory are removed.
    """
    if rows_per_file < 1:
        raise InputError(f"sample: rows_per_file is {rows_per_file}. Choose 1 or more.")
    directory.mkdir(parents=True, exist_ok=True)
    block_rows = min(BLOCK_ROWS, rows_per_file)
    files = -(-spec.rows(night) // (rows_per_file // block_rows * block_rows))
    paths = [directory / f"part-{number:05d}.parquet" for number in range(files)]
    tables = shuffled(spec, night=night, block_rows=block_rows)
    for path in paths:
        with pq.ParquetWriter(path, SCHEMA, compression="zstd", use_dictionary=REPEATING) as writer:
            for table in itertools.islice(tables, rows_per_file // block_rows):
                writer.write_table(table)
    for stale in set(directory.glob("part-[0-9][0-9][0-9][0-9][0-9].parquet")) - set(paths):
        stale.unlink()
    return paths


def shuffled(spec: SampleSpec, *, night: int, block_rows: int = BLOCK_ROWS) -> Iterator[pa.Table]:
    """Yield the catalog of a night block by block; blocks, and rows in them, stand in the night's own order."""
    starts = np.arange(0, spec.rows(night), block_rows, dtype=np.uint64)
    for start in starts[np.argsort(bits(spec.seed, "block order", starts, night=night), kind="stable")]:
        ids = np.arange(start, min(int(start) + block_rows, spec.rows(night)), dtype=np.uint64)
        yield _make(spec, ids[np.argsort(bits(spec.seed, "row order", ids, night=night), kind="stable")], night=night)
