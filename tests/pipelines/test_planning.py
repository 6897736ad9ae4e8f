"""A plan from end to end: a real source, real Ray, a real Lance table as the published state."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.contracts import ColumnMap, DeletedRule, Source, Window
from pipelines.errors import InputError, PlanError, SourceMoved
from pipelines.hashes import attr_hashes, id_hashes, text_hashes
from pipelines.normalize import NormalizeOptions, normalize
from pipelines.plan import Limits
from pipelines.planning import Base, Planned, PlanRequest, make_plan, sample_changes, save
from pipelines.prepare import Prepared, Preparer
from pipelines.schema import ATTR_HASH, ID, ID_HASH, PUBLISHED, TEXT_HASH, ProductSchema
from pipelines.sources import SourceSpec, open_source
from pipelines.text import parse, render

NOW = datetime(2026, 5, 8, tzinfo=UTC)
TEMPLATE = parse("{{ title }} | {{ brand }}")
SCHEMA = ProductSchema(text=("title", "brand"), filters={"price": "float"}, attributes=False)
NORMALIZING = NormalizeOptions(schema=SCHEMA, deleted=DeletedRule(column="gone", equals=True), now=NOW)
LOOSE = Limits(max_delete_ratio=1.0, quarantine_ratio=1.0, max_duplicate_ratio=1.0, min_rows_ratio=0.0)

pytestmark = pytest.mark.usefixtures("ray_cluster")


def row(sku: str | None, title: str | None = "Tent", price: float | None = 1.0, *, days: int = 30, gone: bool = False) -> dict[str, Any]:
    return {"sku": sku, "title": title, "brand": "Nord", "price": price, "gone": gone, "at": NOW - timedelta(days=days)}


def catalog(folder: Path, rows: list[dict[str, Any]], *, files: int = 2) -> Source:
    """Write rows into Parquet files and open them as a source."""
    folder.mkdir(exist_ok=True)
    types = pa.schema(
        [
            ("sku", pa.string()),
            ("title", pa.string()),
            ("brand", pa.string()),
            ("price", pa.float64()),
            ("gone", pa.bool_()),
            ("at", pa.timestamp("us", "UTC")),
        ]
    )
    for index in range(files):
        pq.write_table(pa.Table.from_pylist(rows[index::files], types), folder / f"part-{index}.parquet")
    columns = ColumnMap(id="sku", updated_at="at", deleted=DeletedRule(column="gone", equals=True))
    return open_source(SourceSpec(type="parquet", path=str(folder)), columns=columns, fields=SCHEMA.fields)


def base(folder: Path, rows: list[dict[str, Any]]) -> Base:
    """Publish rows: a Lance table as a run will leave it, with a version to pin."""
    raw = pa.table(
        {
            "id": [r["sku"] for r in rows],
            "title": [r["title"] for r in rows],
            "brand": ["Nord"] * len(rows),
            "price": [r["price"] for r in rows],
        }
    )
    products = normalize(raw, NORMALIZING, shard="x").products
    table = pa.table(
        {
            ID_HASH: id_hashes(products[ID].combine_chunks()),
            TEXT_HASH: text_hashes(render(TEMPLATE, products)),
            ATTR_HASH: attr_hashes(products, SCHEMA),
            ID: products[ID],
        },
        schema=PUBLISHED,
    )
    dataset = lance.write_dataset(table, str(folder / "table.lance"), data_storage_version="2.2")
    return Base(
        template_digest=TEMPLATE.digest,
        schema_digest=SCHEMA.digest,
        generation="g000001",
        live=len(rows),
        watermark=NOW - timedelta(days=1),
        table_uri=str(folder / "table.lance"),
        table_version=dataset.version,
    )


def request(**changes: Any) -> PlanRequest:
    plain = PlanRequest(
        alias="prod",
        window=Window(since=None, until=NOW),
        zone="UTC",
        lookback=timedelta(0),
        template=TEMPLATE,
        normalizing=NORMALIZING,
        limits=LOOSE,
    )
    return replace(plain, **changes)


def plan(tmp_path: Path, source: Source, published: Base | None, **changes: Any) -> Planned:
    folder = tmp_path / f"work{len(list(tmp_path.glob('work*')))}"
    return make_plan(source, base=published, request=request(**changes), work=folder)


STATE = [row("a"), row("b"), row("c"), row("d"), row("e"), row("f")]
CATALOG = [
    row("a"),
    row("b", "Tent XL", days=0),
    row("c", price=2.0, days=0),
    row("d", gone=True, days=0),
    row("e"),
    row("new", "Lamp", days=0),
    row("twin", "Lamp", days=0),
    row(None, "no id"),
    row("textless", None),
    row("dash/ed"),
    row("never", gone=True),
]


def test_a_first_plan_adds_every_live_product_and_accounts_for_every_row(tmp_path: Path) -> None:
    found = plan(tmp_path, catalog(tmp_path / "c", CATALOG), None).plan
    assert (found.actions.add, found.actions.changed, found.actions.same) == (7, 7, 0)
    assert (found.rows.read, found.rows.live, found.rows.deleted, found.rows.quarantined) == (11, 7, 2, 2)
    assert found.rejected == {"null_id": 1, "unsafe_id": 1}
    assert (found.embedding.rows, found.embedding.texts, found.embedding.reused) == (7, 4, 0)
    assert found.embedding.tokens > 0


def test_a_full_plan_tells_add_text_attr_and_both_kinds_of_delete_apart(tmp_path: Path) -> None:
    result = plan(tmp_path, catalog(tmp_path / "c", CATALOG), base(tmp_path, STATE))
    found = {action: sorted(ids) for action, ids in sample_changes(result, limit=9).items()}
    assert found == {"add": ["new", "textless", "twin"], "text": ["b"], "attr": ["c"], "delete": ["d", "f"]}
    assert result.plan.actions.same == 2
    assert result.plan.deletes_checked


def test_a_narrow_window_with_a_scan_of_ids_finds_the_same(tmp_path: Path) -> None:
    published = base(tmp_path, STATE)
    source = catalog(tmp_path / "c", [item for item in CATALOG if item["sku"] != "textless"])
    narrow = plan(tmp_path, source, published, window=Window(since=NOW - timedelta(days=2), until=NOW))
    whole = plan(tmp_path, source, published)
    assert pq.read_table(narrow.changes).to_pylist() == pq.read_table(whole.changes).to_pylist()
    assert narrow.plan.rows.read < whole.plan.rows.read
    assert narrow.plan.unseen == 0


def test_tombstones_alone_leave_vanished_products_and_say_so(tmp_path: Path) -> None:
    published = base(tmp_path, STATE)
    source = catalog(tmp_path / "c", CATALOG)
    for window in (Window(since=None, until=NOW), Window(since=NOW - timedelta(days=2), until=NOW)):
        result = plan(tmp_path, source, published, window=window, deletes="tombstones")
        assert sample_changes(result, limit=9)["delete"] == ["d"]
        assert not result.plan.deletes_checked
    assert plan(tmp_path, source, published, deletes="off").plan.actions.delete == 0


def test_a_product_that_the_window_missed_is_reported(tmp_path: Path) -> None:
    source = catalog(tmp_path / "c", [*STATE, row("late", "Stove", days=10)])
    found = plan(tmp_path, source, base(tmp_path, STATE), window=Window(since=NOW - timedelta(days=2), until=NOW)).plan
    assert (found.actions.changed, found.unseen) == (0, 1)


def test_two_partitions_on_two_workers_give_the_same_plan(tmp_path: Path) -> None:
    published, source = base(tmp_path, STATE), catalog(tmp_path / "c", [*CATALOG, row("a"), row("new", "Lamp 2", days=0)])
    whole = plan(tmp_path, source, published)
    for window in (Window(since=None, until=NOW), Window(since=NOW - timedelta(days=2), until=NOW)):
        one = plan(tmp_path, source, published, window=window)
        two = plan(tmp_path, source, published, window=window, partitions=2)
        assert pq.read_table(one.changes).to_pylist() == pq.read_table(two.changes).to_pylist()
        assert one.plan == two.plan
    assert whole.plan.rows.duplicate == 1
    assert whole.plan.rejected["duplicate_id"] == 1


def test_a_rejected_row_takes_its_product_out(tmp_path: Path) -> None:
    source = catalog(tmp_path / "c", [row("a"), {**row("b", None), "brand": None}])
    result = plan(tmp_path, source, base(tmp_path, STATE[:2]))
    assert sample_changes(result, limit=9)["delete"] == ["b"]
    assert result.plan.rejected == {"no_text": 1}


@pytest.mark.parametrize(("newer", "gone"), [(True, ["b"]), (False, [])])
def test_of_a_good_and_a_rejected_row_the_newer_counts_in_every_window(tmp_path: Path, newer: bool, gone: list[str]) -> None:
    days = (0, 30) if newer else (0.5, 0)
    rejected = {**row("b", None), "brand": None, "at": NOW - timedelta(days=days[0])}
    source = catalog(tmp_path / "c", [row("a"), {**row("b"), "at": NOW - timedelta(days=days[1])}, rejected])
    published = base(tmp_path, STATE[:2])
    for window in (Window(since=None, until=NOW), Window(since=NOW - timedelta(days=2), until=NOW)):
        assert sample_changes(plan(tmp_path, source, published, window=window), limit=9)["delete"] == gone


def test_a_saved_plan_holds_ids_quarantine_and_the_pin(tmp_path: Path) -> None:
    source = catalog(tmp_path / "c", CATALOG)
    result = plan(tmp_path, source, base(tmp_path, STATE))
    save(result, tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "plan.json").read_text())
    for name, digest in saved.pop("files").items():
        assert hashlib.sha256((tmp_path / "saved" / name).read_bytes()).hexdigest() == digest
    assert saved == json.loads(json.dumps(result.plan.to_json()))
    changes = pq.read_table(tmp_path / "saved" / "changes.parquet")
    assert sorted(zip(changes["id"].to_pylist(), changes["action"].to_pylist(), strict=True)) == [
        ("b", "text"), ("c", "attr"), ("d", "delete"), ("f", "delete"), ("new", "add"), ("textless", "add"), ("twin", "add"),
    ]  # fmt: skip
    quarantine = pq.read_table(tmp_path / "saved" / "quarantine.parquet")
    assert sorted(quarantine["reason"].to_pylist()) == ["null_id", "unsafe_id"]
    assert source.snapshot().to_json() == {key: value for key, value in result.plan.to_json()["source"].items() if key != "digest"}
    with pytest.raises(InputError, match="is not empty"):
        save(result, tmp_path / "saved")


def test_a_base_whose_table_lost_rows_is_refused(tmp_path: Path) -> None:
    published = replace(base(tmp_path, STATE), live=7)
    with pytest.raises(PlanError, match="promises 7 products but its table holds 6"):
        plan(tmp_path, catalog(tmp_path / "c", CATALOG), published)


def test_a_catalog_that_moves_while_it_is_read_is_refused(tmp_path: Path) -> None:
    source = catalog(tmp_path / "c", CATALOG)
    shards = source.read(Window(since=None, until=NOW))
    catalog(tmp_path / "c", CATALOG[:3])

    class Moving:
        snapshot, ids = source.snapshot, source.ids

        def read(self, _: Window) -> Any:
            return shards

    with pytest.raises(SourceMoved, match=r"part-0\.parquet"):
        plan(tmp_path, Moving(), None)


def test_planning_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    published, source = base(tmp_path, STATE), catalog(tmp_path / "c", CATALOG)
    one, two = plan(tmp_path, source, published), plan(tmp_path, source, published)
    assert one.plan == two.plan
    assert one.changes.read_bytes() == two.changes.read_bytes()
    assert one.quarantine.read_bytes() == two.quarantine.read_bytes()


def test_packing_a_batch_for_the_way_keeps_it(tmp_path: Path) -> None:
    preparer = Preparer(normalizing=NORMALIZING, template=TEMPLATE)
    shards = catalog(tmp_path / "c", CATALOG).read(Window(since=None, until=NOW))
    batches = [preparer(batch, shard="s", first_row=0) for shard in shards for batch in shard.open()]
    packed = pa.concat_tables([batch.pack() for batch in batches])
    for before, after in zip(batches, Prepared.unpack(packed), strict=True):
        assert before.rows.equals(after.rows)
        assert before.rejected.equals(after.rejected)
        assert (before.repaired, before.rows_in, before.sample_tokens) == (after.repaired, after.rows_in, after.sample_tokens)
