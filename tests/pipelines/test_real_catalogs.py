"""Real catalogs go through: every row is accounted for, and nothing is dropped without a reason."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jobs.sections import DEFAULT_TEMPLATE
from pipelines.contracts import ColumnMap, Window
from pipelines.normalize import NormalizeOptions
from pipelines.plan import Limits
from pipelines.planning import PlanRequest, make_plan
from pipelines.schema import ProductSchema
from pipelines.sources import SourceSpec, open_source
from pipelines.text import parse

DATA = os.environ.get("CATALOG_EMBED_DATA", "")
CATALOGS = ["abt_buy", "chorus_icecat", "openfoodfacts_names", "pricerunner", "retail_demo_store"]

pytestmark = [
    pytest.mark.skipif(not DATA, reason="CATALOG_EMBED_DATA is not set: no real catalogs to read"),
    pytest.mark.usefixtures("ray_cluster"),
]


@pytest.mark.parametrize("name", CATALOGS)
def test_a_real_catalog_is_planned_and_every_row_accounted_for(name: str, tmp_path: Path) -> None:
    path = Path(DATA) / name / "products.parquet"
    schema = ProductSchema(
        text=("title", "brand", "category", "description"), filters={"brand": "string", "category": "string", "price": "float"}
    )
    now = datetime(2026, 11, 1, tzinfo=UTC)
    request = PlanRequest(
        alias="prod",
        window=Window(since=None, until=now),
        zone="UTC",
        lookback=timedelta(0),
        template=parse(DEFAULT_TEMPLATE),
        normalizing=NormalizeOptions(schema=schema, deleted=None, now=now),
        limits=Limits(),
    )
    source = open_source(
        SourceSpec(type="parquet", path=str(path)), columns=ColumnMap(id="product_id", attributes="attributes"), fields=schema.fields
    )
    plan = make_plan(source, base=None, request=request, work=tmp_path / "work").plan
    assert plan.rows.read == pq.read_metadata(path).num_rows
    assert plan.actions.add == plan.rows.live
    assert plan.rows.live >= 0.99 * plan.rows.read, (plan.rows, plan.rejected)
    assert plan.embedding.tokens > plan.embedding.texts
