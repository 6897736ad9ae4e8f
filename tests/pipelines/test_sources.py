"""The one behaviour suite of `Source`: every implementation passes all of it."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.contracts import ColumnMap, DeletedRule, Shard, Source, Window
from pipelines.errors import InputError, SourceMoved
from pipelines.hashes import attr_hashes
from pipelines.normalize import NormalizeOptions
from pipelines.normalize.moments import moments
from pipelines.plan import Limits
from pipelines.planning import PlanRequest, make_plan
from pipelines.schema import ATTRIBUTES, DELETED, ID, TOMBSTONE, UPDATED_AT, ProductSchema
from pipelines.sources import open_source
from pipelines.text import parse
from tests.pipelines import shops
from tests.pipelines.shops import Shop, product, table

pytest_plugins = ["tests.postgres"]

KINDS = (
    "parquet",
    "csv",
    "jsonl",
    "csv.gz",
    "jsonl.gz",
    "jsonl.zst",
    "s3-parquet",
    "s3-csv",
    "lance",
    "delta",
    "sqlite",
    "postgres",
    "memory",
)
MAP = ColumnMap(
    id="sku",
    updated_at="modified_at",
    deleted=DeletedRule(column="live", equals=False),
    attributes="attr_*",
    columns={"title": "name"},
)
FIELDS = ("title", "brand", "price")
LATER = datetime(2025, 1, 1, tzinfo=UTC)
ALL = Window(since=None, until=LATER)
ROWS = [
    product("a", day=1),
    product("b", day=10, name='Größe "L", 水\nsecond line 🏔'),
    product("c", day=None, name=None),
    product("d", day=20, live=False),
    product("e", day=21, name="naïve"),
]
PARTS = [table(ROWS[:2]), table(ROWS[2:4]), table(ROWS[4:])]


@pytest.fixture(params=KINDS)
def shop(request: pytest.FixtureRequest, tmp_path: Path) -> Shop:
    kind: str = request.param
    if kind.startswith("s3-"):
        return shops.bucket(kind.removeprefix("s3-"), request.getfixturevalue("s3"))
    if kind == "postgres":
        from adbc_driver_postgresql import dbapi

        uri = request.getfixturevalue("postgres")
        return shops.database(dbapi, uri, uri)
    if kind == "sqlite":
        from adbc_driver_sqlite import dbapi as sqlite

        return shops.database(sqlite, str(tmp_path / "shop.db"), f"sqlite://{tmp_path}/shop.db")
    if kind == "memory":
        return shops.memory()
    return {"lance": shops.lance_table, "delta": shops.delta_table}.get(kind, lambda path: shops.local(kind, path))(tmp_path)


def opened(shop: Shop, columns: ColumnMap = MAP, fields: tuple[str, ...] = FIELDS, **more: Any) -> Source:
    source = open_source(shop.spec(**more), columns=columns, fields=fields)
    assert isinstance(source, Source)
    return source


def batches(shards: Sequence[Shard]) -> list[pa.RecordBatch]:
    """Read shards as workers do: after a pickle round trip."""
    copies: list[Shard] = [pickle.loads(pickle.dumps(shard)) for shard in shards]  # noqa: S301 - our own bytes; the round trip is the test
    return [batch for shard in copies for batch in shard.open()]


def plainly(name: str, column: pa.Array) -> list[Any]:
    """Return a column's values as the shop wrote them: CSV has only text, and SQLite has neither booleans nor times."""
    if name == UPDATED_AT:
        column = moments(column, repaired=Counter())
    values: list[Any] = column.to_pylist()
    if name == DELETED:
        return [str(value).lower() in ("true", "1") for value in values]
    return [None if value is None else float(value) for value in values] if name == "price" else values


def read(shards: Sequence[Shard]) -> list[dict[str, Any]]:
    """Return all rows in the order of their ids."""
    rows: list[dict[str, Any]] = []
    for batch in batches(shards):
        columns = {name: plainly(name, batch.column(name)) for name in batch.schema.names}
        rows += [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return sorted(rows, key=lambda row: str(row[ID]))


def expected(row: dict[str, Any]) -> dict[str, Any]:
    return {
        ID: row["sku"],
        "title": row["name"],
        "brand": row["brand"],
        "price": row["price"],
        UPDATED_AT: row["modified_at"],
        DELETED: row["live"],
        f"{ATTRIBUTES}.color": row["attr_color"],
        f"{ATTRIBUTES}.size": row["attr_size"],
    }


def ids_of(shards: Sequence[Shard]) -> str:
    return "".join(row[ID] for row in read(shards))


@pytest.mark.parametrize("parts", [PARTS, [table(ROWS)]], ids=["three parts", "one part"])
def test_the_rows_written_are_the_rows_read_under_our_names(shop: Shop, parts: list[pa.Table]) -> None:
    shop.write(parts)
    assert read(opened(shop).read(ALL)) == [expected(row) for row in ROWS]


def test_only_mapped_columns_are_delivered(shop: Shop) -> None:
    shop.write(PARTS)
    for batch in batches(opened(shop, ColumnMap(id="sku"), ("brand",)).read(ALL)):
        assert batch.schema.names == [ID, "brand"]


def test_since_keeps_newer_rows_and_rows_without_a_time(shop: Shop) -> None:
    shop.write(PARTS)
    source = opened(shop)
    assert ids_of(source.read(Window(since=datetime(2024, 1, 10, 12, tzinfo=UTC), until=LATER))) == "bcde"
    assert ids_of(source.read(Window(since=datetime(2024, 1, 10, 12, 0, 0, 1, tzinfo=UTC), until=LATER))) == "cde"


def test_until_filters_nothing_unless_bounded(shop: Shop) -> None:
    shop.write(PARTS)
    source = opened(shop)
    window = Window(since=datetime(2024, 1, 2, tzinfo=UTC), until=datetime(2024, 1, 20, 12, tzinfo=UTC))
    assert ids_of(source.read(window)) == "bcde"
    assert ids_of(source.read(replace(window, bounded=True))) == "b"
    assert ids_of(source.read(Window(since=None, until=window.until, bounded=True))) == "ab"


def test_ids_give_every_row_with_its_tombstone_and_nothing_else(shop: Shop) -> None:
    shop.write(PARTS)
    assert read(opened(shop).ids()) == [{ID: row["sku"], DELETED: row["live"]} for row in ROWS]


def test_a_pin_is_equal_until_something_moves(shop: Shop) -> None:
    shop.write(PARTS)
    before = opened(shop).snapshot()
    assert opened(shop).snapshot() == before
    assert before.moved(opened(shop).snapshot()) == []
    shop.write([*PARTS[:2], table([product("e", day=22, name="rewritten in place")])])
    after = opened(shop).snapshot()
    assert after.digest != before.digest
    assert before.moved(after) != []


def test_what_was_pinned_is_read_or_refused_but_never_mixed(shop: Shop) -> None:
    shop.write(PARTS)
    source = opened(shop)
    source.snapshot()
    early = source.read(ALL)
    shop.write([*PARTS[:2], table([product("z", day=22)])])
    if shop.after_move == "refused":
        with pytest.raises(SourceMoved, match=r"part.\d.* changed since the catalog was pinned\. Plan again"):
            read(early)
        with pytest.raises(SourceMoved):
            read(source.ids())
    elif shop.after_move == "pinned rows":
        assert ids_of(early) == ids_of(source.ids()) == "abcde"
    source.snapshot()
    assert ids_of(opened(shop).read(ALL)) == "abcdz"


def test_reading_twice_gives_the_same_rows_and_the_same_shard_names(shop: Shop) -> None:
    shop.write(PARTS)
    shards = opened(shop).read(ALL)
    assert read(shards) == read(shards)
    names = [shard.name for shard in shards]
    assert names == [shard.name for shard in opened(shop).read(ALL)]
    assert len(set(names)) == len(names)


def test_no_batch_has_more_than_65536_rows(shop: Shop) -> None:
    count = 70_000
    rows = table([product("x")]).select(["sku", "modified_at"]).take(pa.array([0] * count, pa.int32()))
    shop.write([rows.set_column(0, "sku", pa.array(range(count)).cast(pa.string())).append_column("brand", pa.repeat("Acme", count))])
    sizes = [batch.num_rows for batch in batches(opened(shop, ColumnMap(id="sku"), ("brand",)).read(ALL))]
    assert sum(sizes) == count
    assert max(sizes) <= 65_536


def test_a_missing_column_is_refused_with_the_nearest_name(shop: Shop) -> None:
    shop.write(PARTS)
    source = opened(shop, replace(MAP, columns={"title": "naem"}))
    with pytest.raises(InputError, match=r"no column `naem`, mapped to `title`,.* Did you mean `name`\? There is: .*`price`"):
        source.read(ALL)


def test_a_missing_attribute_prefix_is_refused(shop: Shop) -> None:
    shop.write(PARTS)
    with pytest.raises(InputError, match=r"no column `attribute_\*`"):
        opened(shop, replace(MAP, attributes="attribute_*")).read(ALL)


def test_a_window_without_an_update_column_says_what_to_set(shop: Shop) -> None:
    shop.write(PARTS)
    with pytest.raises(InputError, match=r"Set `source\.updated_at`"):
        opened(shop, replace(MAP, updated_at=None)).read(Window(since=datetime(2024, 1, 2, tzinfo=UTC), until=LATER))


def test_an_empty_catalog_is_pinned_and_gives_no_rows(shop: Shop) -> None:
    shop.write([table([])])
    source = opened(shop)
    assert source.snapshot() == opened(shop).snapshot()
    assert read(source.read(ALL)) == []
    assert read(source.ids()) == []


def test_a_limit_takes_the_first_rows_before_any_window(shop: Shop) -> None:
    shop.write(PARTS)
    source = opened(shop, limit=3)
    chosen = ids_of(source.ids())
    assert len(chosen) == 3
    assert ids_of(opened(shop, limit=3).read(ALL)) == chosen
    fresh = ids_of(source.read(Window(since=datetime(2024, 1, 10, tzinfo=UTC), until=LATER)))
    assert fresh == "".join(sku for sku in chosen if sku in "bcde")


def test_attributes_may_be_one_column_or_a_list(shop: Shop) -> None:
    shop.write(PARTS)
    one = read(opened(shop, ColumnMap(id="sku", attributes="attr_color"), ()).read(ALL))
    assert one[0] == {ID: "a", ATTRIBUTES: "red"}
    several = read(opened(shop, ColumnMap(id="sku", attributes=("brand", "attr_color")), ()).read(ALL))
    assert several[0] == {ID: "a", f"{ATTRIBUTES}.brand": "Acme", f"{ATTRIBUTES}.attr_color": "red"}


def test_neither_shards_nor_pins_show_what_is_secret(shop: Shop) -> None:
    shop.write(PARTS)
    source = opened(shop)
    pin = source.snapshot()
    shown = f"{source!r} {shop.spec()!r} {pin!r} {pin.to_json()} {source.read(ALL)!r} {[shard.name for shard in source.ids()]}"
    assert "canary" not in shown
    assert "secret_access_key" not in shown


@pytest.mark.usefixtures("ray_cluster")
def test_on_ray_every_source_gives_the_same_products_to_the_byte(shop: Shop, tmp_path: Path) -> None:
    shop.write(PARTS)
    schema = ProductSchema(text=("title", "brand"), filters={"price": "float"})
    request = PlanRequest(
        alias="prod",
        window=ALL,
        zone="UTC",
        lookback=timedelta(0),
        template=parse("{{ title }} | {{ brand }} | {{ attributes | pairs(5) }}"),
        normalizing=NormalizeOptions(schema=schema, deleted=MAP.deleted, now=LATER),
        limits=Limits(),
    )
    result = make_plan(opened(shop), base=None, request=request, work=tmp_path / "work")
    assert result.plan.rows.read == len(ROWS)
    assert result.plan.rejected == {}
    found = pa.concat_tables([pq.read_table(path) for path in result.current]).to_pylist()
    texts = {
        row["sku"]: " | ".join([*(" ".join(row[name].split()) for name in ("name", "brand") if row[name]), _pairs(row)]) for row in ROWS
    }
    assert {row["id"]: row["text_hash"].bytes for row in found} == {
        sku: blake2b(text.encode(), digest_size=16, person=b"catalog-embed-tx").digest() for sku, text in texts.items()
    }
    prices = pa.table({"locale": ["und"] * len(ROWS), "price": pa.array([row["price"] for row in ROWS], pa.float64())})
    wanted = dict(zip((row["sku"] for row in ROWS), attr_hashes(prices, schema).to_pylist(), strict=True))
    assert {row["id"]: row["attr_hash"].bytes for row in found} == wanted
    assert {row["id"]: row["state"] == TOMBSTONE for row in found} == {row["sku"]: not row["live"] for row in ROWS}


def _pairs(row: dict[str, Any]) -> str:
    return ", ".join(f"{key}: {row[f'attr_{key}']}" for key in ("color", "size") if row[f"attr_{key}"])
