"""Rendering and hashing on one core, on the sample catalog, or on a real one where CATALOG_EMBED_DATA names it.

python -m tests.bench.bench_text --rows 200000
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from jobs.sections import DEFAULT_TEMPLATE
from pipelines.hashes import attr_hashes, id_hashes, text_hashes
from pipelines.normalize import NormalizeOptions, normalize
from pipelines.sample.catalog import products
from pipelines.sample.spec import SampleSpec
from pipelines.schema import ProductSchema
from pipelines.text import estimate_tokens, parse, render

SCHEMA = ProductSchema(
    text=("title", "brand", "category", "description"),
    filters={
        "brand": "string",
        "category": "string",
        "size": "string",
        "price": "float",
        "in_stock": "bool",
        "rating": "float",
        "weight_g": "int",
    },
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    pa.set_cpu_count(1)
    raw = products(SampleSpec(products=given.rows), start=0, stop=given.rows).rename_columns(
        {"sku": "id", "lang": "locale", "modified_at": "updated_at"}
    )
    table = normalize(raw, NormalizeOptions(schema=SCHEMA, deleted=None, now=datetime.now(tz=UTC)), shard="bench").products.combine_chunks()
    template = parse(DEFAULT_TEMPLATE)
    texts = render(template, table)
    ids = table["id"].combine_chunks()
    print(
        f"{given.rows:,} products, {pc.mean(pc.binary_length(texts)).as_py():.0f} bytes and {estimate_tokens(texts).mean():.0f} tokens a text, one core"
    )
    steps: dict[str, Callable[[], Any]] = {
        "render": lambda: render(template, table),
        "text_hash": lambda: text_hashes(texts),
        "attr_hash": lambda: attr_hashes(table, SCHEMA),
        "id_hash": lambda: id_hashes(ids),
        "estimate_tokens": lambda: estimate_tokens(texts),
    }
    for name, step in steps.items():
        seconds = []
        for _ in range(given.rounds):
            begin = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - begin)
        rates = sorted(given.rows / second / 1000 for second in seconds)
        print(f"{name:<16} {rates[0]:8.0f} {statistics.median(rates):8.0f} {rates[-1]:8.0f} k rows/s (min median max)")


if __name__ == "__main__":
    main()
