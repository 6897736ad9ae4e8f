"""Rows per second of `normalize` on one core: clean rows, one poisoned row in a hundred, and attributes as JSON text.

Run `python -m tests.bench.bench_normalize [rows]`. The best of five runs is printed, because the machine may be shared.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import pyarrow as pa

from pipelines.normalize import NormalizeOptions, normalize
from pipelines.schema import ATTRIBUTE_MAP, TIMESTAMP, ProductSchema
from tests.poison import NOW, POISONS, TYPES

SCHEMA = ProductSchema(
    text=("title", "brand", "category", "description"), filters={"brand": "string", "price": "float", "in_stock": "bool"}
)
OPTIONS = NormalizeOptions(schema=SCHEMA, deleted=None, now=NOW)
BATCH_ROWS = 65_536
RUNS = 5

WORDS = {
    "en-US": "waterproof running shoe light breathable men black red sole grip trail winter jacket zipper hood pocket",
    "de-DE": "wasserdichter Laufschuh für Männer größe weiß Gummisohle Übergangsjacke mit Reißverschluss schöne Fächer",
    "fr-FR": "chaussure légère étanche à semelle très résistante été hiver doublée l’extérieur côté brodé",
}
LOCALES = ("en-US", "en-US", "de-DE", "en-US", "en-US", "fr-FR")
KEYS = ("color", "gender", "material", "size", "weight_g")


def rows(count: int) -> list[dict[str, Any]]:
    """Make products of about 600 bytes: a third of them German or French, five attributes each."""
    rng = random.Random(7)
    made = []
    for number in range(count):
        locale = LOCALES[number % len(LOCALES)]
        words = WORDS[locale].split()
        made.append(
            {
                "id": f"SKU-{number:08d}",
                "locale": locale,
                "title": " ".join(rng.choices(words, k=7))[:60].strip(),
                "brand": rng.choice(("Alpina", "Nordwand", "Léger", "Trailhead")),
                "category": rng.choice(("Shoes/Running", "Jacken/Übergang", "Outdoor/Winter")),
                "description": " ".join(rng.choices(words, k=45))[:300].strip(),
                "attributes": {key: f"{rng.choice(words)} {rng.randrange(90)}" for key in KEYS},
                "price": rng.randrange(100, 99_999) / 100,
                "in_stock": rng.random() < 0.9,
                "updated_at": NOW - timedelta(seconds=rng.randrange(10**7)),
            }
        )
    return made


def batches(data: list[dict[str, Any]], types: Mapping[str, pa.DataType]) -> list[pa.RecordBatch]:
    """Lay rows out as a source would: text as bytes where poison needs it, everything else typed."""
    columns = {name: pa.array([row[name] for row in data], types.get(name)) for name in data[0]}
    return list(pa.table(columns).to_batches(max_chunksize=BATCH_ROWS))


def poisoned(data: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Poison one row in a hundred, with every kind that keeps the column types."""
    kinds = [poison for poison in POISONS if poison.keeps_types and poison.cells.keys() <= data[0].keys()]
    return [kinds[i // 100 % len(kinds)].apply(row) if i % 100 == 0 else row for i, row in enumerate(data)]


def measure(name: str, data: list[pa.RecordBatch]) -> None:
    """Print rows per second."""
    count = sum(batch.num_rows for batch in data)
    best = float("inf")
    for _ in range(RUNS):
        start = time.perf_counter()
        done = [normalize(batch, OPTIONS, shard="bench") for batch in data]
        best = min(best, time.perf_counter() - start)
    rejected = sum(part.rejected.num_rows for part in done)
    size = sum(batch.nbytes for batch in data) / count
    print(f"{name:24} {count / best:12,.0f} rows/s  {best / count * 1e6:6.2f} us/row  {size:5.0f} bytes/row  {rejected} rejected")


def main(count: int) -> None:
    """Measure the three catalogs on one thread."""
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    types = {"attributes": ATTRIBUTE_MAP, "updated_at": TIMESTAMP}
    data = rows(count)
    measure("clean", batches(data, types))
    measure("1 % poison", batches(poisoned(data), {**TYPES, "category": pa.binary()}))
    for name, escape in (("JSON text, UTF-8", False), ("JSON text, ASCII escapes", True)):
        measure(name, batches([{**row, "attributes": json.dumps(row["attributes"], ensure_ascii=escape)} for row in data], {}))
    flat = [
        {k: v for k, v in row.items() if k != "attributes"} | {f"attributes.{k}": v for k, v in row["attributes"].items()} for row in data
    ]
    measure("attribute columns", batches(flat, types))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 262_144)
