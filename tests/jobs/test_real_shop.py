"""A real catalog with human grades through the real tower: the run publishes it, and search finds what people called relevant."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml

from jobs.nightly import Night, run_night
from jobs.settings import load
from pipelines.reader import open_generation

DATA = os.environ.get("CATALOG_EMBED_DATA", "")
QUERIES, RELEVANT = 12, 2

pytestmark = [
    pytest.mark.skipif(not DATA, reason="CATALOG_EMBED_DATA is not set: no real catalog to run"),
    pytest.mark.usefixtures("ray_cluster"),
]


def test_search_over_a_real_catalog_finds_what_people_called_relevant(tmp_path: Path) -> None:
    folder = Path(DATA) / "chorus_icecat"
    grades: dict[str, dict[str, int]] = defaultdict(dict)
    for row in pq.read_table(folder / "judgments.parquet").to_pylist():
        grades[row["query_id"]][row["product_id"]] = row["grade"]
    texts = {row["query_id"]: row["query"] for row in pq.read_table(folder / "queries.parquet").to_pylist()}
    # Queries whose judged products are both good and bad: others say nothing about a ranking.
    mixed = [name for name in sorted(grades) if 5 <= sum(grade >= RELEVANT for grade in grades[name].values()) <= len(grades[name]) - 5]
    chosen = mixed[:QUERIES]
    wanted = pa.array(sorted({product for name in chosen for product in grades[name]}))
    products = pq.read_table(folder / "products.parquet")
    products = products.filter(pc.is_in(products.column("product_id"), wanted))
    (tmp_path / "catalog").mkdir()
    pq.write_table(products, tmp_path / "catalog" / "products.parquet")
    settings = {
        "project": "icecat",
        "source": {"type": "parquet", "path": "catalog/", "id": "product_id"},
        "document": {
            "template": "{{ title }} | {{ brand }} | {{ description | tokens(48) }}",
            "filters": {"title": "string", "brand": "string", "price": "float"},
        },
        "store": {"root": "index"},
    }
    config = tmp_path / "catalog-embed.yaml"
    config.write_text(yaml.safe_dump(settings))

    record = run_night(load(config), Night())
    assert record.facts.outcome == "published"
    assert record.facts.actual["add"] == products.num_rows
    found, chance = [], []
    with open_generation(tmp_path / "index", reload_s=None) as reader:
        for name in chosen:
            ids = reader.search(texts[name], 5).column("id").to_pylist()
            found.append(sum(grades[name].get(product, 0) >= RELEVANT for product in ids) / len(ids))
            chance.append(sum(grade >= RELEVANT for grade in grades[name].values()) / products.num_rows)
        cheap = reader.search(texts[chosen[0]], 5, where="price < 100", columns=["price"])
        assert all(price < 100 for price in cheap.column("price").to_pylist())
    precision, luck = sum(found) / len(found), sum(chance) / len(chance)
    assert precision > max(0.4, 5 * luck), f"precision@5 {precision:.2f}, by chance {luck:.2f}"
