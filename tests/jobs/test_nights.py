"""What nights add up to: thirty of them equal one full build, and each pays for what changed and for nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from jobs.inspect import look
from jobs.nightly import Night, open_store, run_night
from jobs.records import Record
from jobs.releasing import roll_back, validate
from jobs.settings import Settings, load
from pipelines.errors import OldFormat
from pipelines.gates import failed
from pipelines.index.probe import exact_scores, exact_top, recall_at
from pipelines.index.search import SegmentSearcher
from pipelines.manifest import Manifest, TablePin
from pipelines.publish import current, open_manifest
from pipelines.sample.catalog import SKU, SampleSpec, shuffled
from pipelines.schema import ATTR_HASH, ID, ID_HASH, TEXT_HASH, VECTOR, VID, table_schema
from pipelines.stores import lance
from pipelines.stores.parquet import replay
from tests.shops import closing, configure, make_shop, read_catalog, run, write_catalog

pytestmark = pytest.mark.usefixtures("ray_cluster")

NIGHTS, RELEASE = 30, 5
SPEC = SampleSpec(products=300)
DIMS, TOP = 32, 10
HASHES = [TEXT_HASH, ATTR_HASH]
# What the shop changes every night. Pages and new products go out together, every few nights.
NIGHTLY = ("price", "in_stock", "is_active", "modified_at")


@dataclass(frozen=True, kw_only=True)
class Live:
    """What readers of a shop see: the generation, and the table's rows by id."""

    settings: Settings
    manifest: Manifest

    @property
    def pin(self) -> TablePin:
        assert self.manifest.table is not None
        return self.manifest.table

    @property
    def uri(self) -> str:
        return open_store(self.settings).uri(self.pin.uri)

    @property
    def rows(self) -> pa.Table:
        """Every row and column, in the order of the ids."""
        names = table_schema(self.settings.schema, dims=DIMS, vector=self.settings.embed.vector).names
        found = lance.read_rows(self.uri, version=self.pin.version, columns=names, options={})
        return pa.concat_tables(found).combine_chunks().sort_by(ID)


def live(settings: Settings) -> Live:
    store = open_store(settings)
    entry = current(store, settings.publish.alias)
    assert entry is not None
    return Live(settings=settings, manifest=open_manifest(store, entry))


def matrix(column: pa.ChunkedArray) -> npt.NDArray[np.float32]:
    flat: npt.NDArray[np.float32] = column.combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    return flat.reshape(len(column), -1)


def released(night: int) -> pa.Table:
    """The sample at a night, with the pages and the products of the last release."""
    rows = pa.concat_tables(shuffled(SPEC, night=night))
    if not night % RELEASE:
        return rows
    older = pa.concat_tables(shuffled(SPEC, night=night - night % RELEASE))
    rows = rows.filter(pc.is_in(rows.column(SKU), older.column(SKU).combine_chunks()))
    older = older.take(pc.index_in(rows.column(SKU), older.column(SKU).combine_chunks()))
    for name in NIGHTLY:
        older = older.set_column(older.schema.names.index(name), older.schema.field(name), rows.column(name))
    return older


@pytest.fixture(scope="module")
def thirty(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Live, Live, list[Record]]:
    """A shop after a full build and thirty nights, the same catalog built whole in a store of its own, and the nights' records.

    The segments have one-byte codes, and the table a vector index: recall is no foregone conclusion.
    """
    folder = tmp_path_factory.mktemp("thirty")
    codes: dict[str, Any] = {"faiss": {"type": "IVF1,SQ8"}, "lance": {"type": "IVF_SQ"}}
    # Recall of so few samples moves by more than a night may lose; here it is measured over all products instead.
    gates = {"samples": 64, "recall_max_drop": 0.05, "recall_filtered": 0.8}
    worn = {"delta_until": 0.1, "tombstones_until": 0.1}
    config = make_shop(folder / "shop", products=SPEC.products, index=codes, plan={"lookback": f"{RELEASE}d"}, gates=gates, refresh=worn)
    records = [run(config, at=0)]
    for night in range(1, NIGHTS + 1):
        write_catalog(config, released(night))
        records.append(run(config, at=night))
    fresh = load(config, overrides={"store.root": str(folder / "fresh")})
    run_night(fresh, Night(now=closing(NIGHTS)))
    return live(load(config)), live(fresh), records


def test_thirty_nights_saw_every_kind_of_change(thirty: tuple[Live, Live, list[Record]]) -> None:
    records = thirty[2]
    failed = {record.run_id: record.facts.gates for record in records if record.facts.outcome not in ("published", "nothing")}
    assert not failed
    totals = {name: sum(record.facts.planned[name] for record in records[1:]) for name in ("add", "text", "attr", "delete")}
    assert min(totals.values()) > 10, totals
    assert {record.facts.index_action for record in records[1:]} >= {"delta", "compact"}
    without_text = [record for record in records[1:] if not record.facts.planned["texts"]]
    assert len(without_text) >= NIGHTS * 3 // 5
    assert all(record.ran is not None and (record.ran.embedded is None or not record.ran.embedded.texts) for record in without_text)


def test_thirty_nights_equal_one_full_build_row_for_row_and_hash_for_hash(thirty: tuple[Live, Live, list[Record]]) -> None:
    nightly, full, _ = thirty
    mine, theirs = nightly.rows, full.rows
    assert mine.drop_columns([VECTOR]).equals(theirs.drop_columns([VECTOR]))
    assert nightly.pin.rows_digest == full.pin.rows_digest
    cosines = np.sum(matrix(mine.column(VECTOR)) * matrix(theirs.column(VECTOR)), axis=1)
    assert cosines.min() > 0.9999
    assert nightly.manifest.counts["live"] == full.manifest.counts["live"] == mine.num_rows
    assert nightly.manifest.window.until == full.manifest.window.until


def test_thirty_nights_end_with_what_the_catalog_says(thirty: tuple[Live, Live, list[Record]]) -> None:
    catalog = released(NIGHTS)
    catalog = catalog.filter(catalog.column("is_active")).sort_by(SKU)
    rows = thirty[0].rows
    assert rows.column(ID).to_pylist() == catalog.column(SKU).to_pylist()
    for name in ("brand", "category", "size", "price", "in_stock", "rating", "weight_g"):
        assert rows.column(name).to_pylist() == catalog.column(name).to_pylist(), name


def test_recall_after_thirty_nights_is_that_of_a_full_build(thirty: tuple[Live, Live, list[Record]]) -> None:
    nightly, full, records = thirty
    vectors = full.rows.select([VID, VECTOR])
    queries = np.unique(matrix(vectors.column(VECTOR)), axis=0)
    found = {name: recalls(side, queries) for name, side in (("nightly", nightly), ("full", full))}
    for engine in ("faiss", "lance"):
        assert found["full"][engine] > 0.9
        assert abs(found["nightly"][engine] - found["full"][engine]) <= 0.005, (engine, found)
    assert records[-1].facts.gates["recall_faiss"] == records[-1].facts.gates["recall_lance"] == "passed"


def recalls(side: Live, queries: npt.NDArray[np.float32]) -> dict[str, float]:
    """Recall@10 of both indexes of a generation against comparing every vector."""
    rows = side.rows

    def every() -> Any:
        yield rows.column(VID).to_numpy(), matrix(rows.column(VECTOR))

    store = open_store(side.settings)
    exact_vids, exact = exact_top(every, queries, TOP)
    searcher = lance.TableSearcher(side.uri, side.pin.version, {})
    found = {
        "faiss": SegmentSearcher.open(store, side.manifest).search(queries, TOP).vids,
        "lance": np.stack([searcher.nearest(query, TOP).column(VID).to_numpy() for query in queries]),
    }
    return {name: float(recall_at(vids, exact_scores(every, queries, vids), exact_vids, exact, TOP).mean()) for name, vids in found.items()}


def test_a_lost_table_is_rebuilt_from_the_vector_log_after_thirty_nights(thirty: tuple[Live, Live, list[Record]], tmp_path: Path) -> None:
    assert_rebuilt_from_the_log(thirty[0], tmp_path)


def assert_rebuilt_from_the_log(side: Live, folder: Path) -> None:
    """Build a new table from the parts that the manifest lists, and compare it with the one that it pins, bit for bit."""
    schema = table_schema(side.settings.schema, dims=DIMS, vector=side.settings.embed.vector)
    uri = str(folder / "rebuilt.lance")
    tables = replay(open_store(side.settings), side.manifest.parts, schema)
    version = lance.build(uri, tables, lance.TableSpec(schema=schema), {})
    rebuilt = pa.concat_tables(lance.read_rows(uri, version=version, columns=schema.names, options={})).combine_chunks().sort_by(ID)
    assert rebuilt.equals(side.rows)
    hashes = lance.read_rows(uri, version=version, columns=[ID_HASH, *HASHES], options={})
    assert lance.rows_digest(hashes) == side.pin.rows_digest


@pytest.fixture(scope="module")
def built(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small shop with float16 vectors whose first catalog is published; tests take copies."""
    config = make_shop(tmp_path_factory.mktemp("built") / "shop", products=120, embed={"vector": "float16"})
    assert run(config, at=0).facts.outcome == "published"
    return config


@pytest.fixture
def shop(built: Path, tmp_path: Path) -> Path:
    return shutil.copytree(built.parent, tmp_path / "shop") / built.name


def change(config: Path, ids: list[str], *, night: int, column: str, value: Callable[[Any], Any]) -> None:
    """Change a column of some products during the day of a night."""
    rows = read_catalog(config).to_pylist()
    for row in rows:
        if row[SKU] in ids:
            row[column] = value(row[column])
            row["modified_at"] = closing(night) - timedelta(hours=12)
    write_catalog(config, pa.Table.from_pylist(rows, schema=read_catalog(config).schema))


def test_a_night_without_changes_builds_nothing_and_loads_no_tower(shop: Path) -> None:
    settings = load(shop)
    store = open_store(settings)
    before, keys = current(store, "prod"), {info.key for info in store.list("") if not info.key.startswith("runs/")}
    record = run(shop, at=1)
    assert (record.facts.outcome, record.facts.exit_code) == ("nothing", 0)
    assert record.ran is not None
    assert record.ran.embedded is None
    assert {stage.name for stage in record.facts.stages} == {"plan"}
    assert current(store, "prod") == before
    assert {info.key for info in store.list("") if not info.key.startswith(("runs/", "leases/"))} == {
        key for key in keys if not key.startswith("leases/")
    }


def test_a_night_of_new_prices_embeds_no_text_and_moves_no_vector(shop: Path) -> None:
    before = live(load(shop)).rows
    ids = before.column(ID).to_pylist()[:7]
    change(shop, ids, night=1, column="price", value=lambda price: price + 1)
    record = run(shop, at=1)
    assert record.facts.outcome == "published"
    assert (record.facts.planned["attr"], record.facts.planned["texts"], record.facts.planned["reused"]) == (7, 0, 0)
    assert record.ran is not None
    assert record.ran.embedded is not None
    assert (record.ran.embedded.texts, record.ran.embedded.seconds) == (0, 0.0)
    after = live(load(shop)).rows
    assert after.select([ID, VECTOR, TEXT_HASH]).equals(before.select([ID, VECTOR, TEXT_HASH]))
    moved = pc.not_equal(after.column("price"), before.column("price"))
    assert after.filter(moved).column(ID).to_pylist() == ids


def test_other_filter_columns_write_the_table_anew_without_a_forward_pass(shop: Path, tmp_path: Path) -> None:
    before = live(load(shop))
    gone = before.rows.column(ID)[3].as_py()
    change(shop, [gone], night=1, column="is_active", value=lambda _: False)
    write_filters(shop, {"brand": "string", "price": "float", "variant_group": "string"})
    record = run(shop, at=1)
    assert (record.facts.outcome, record.facts.planned["texts"], record.facts.planned["delete"]) == ("published", 0, 1)
    assert record.ran is not None
    assert record.ran.embedded is not None
    assert (record.ran.embedded.texts, record.ran.embedded.seconds) == (0, 0.0)
    after = live(load(shop))
    assert after.pin.uri != before.pin.uri
    kept = before.rows.filter(pc.not_equal(before.rows.column(ID), gone))
    assert after.rows.select([ID, VECTOR, TEXT_HASH]).equals(kept.select([ID, VECTOR, TEXT_HASH]))
    catalog = read_catalog(shop).filter(pc.field("is_active")).sort_by(SKU)
    assert after.rows.column("variant_group").equals(catalog.column("variant_group"))
    assert "rating" not in after.rows.schema.names
    assert_rebuilt_from_the_log(after, tmp_path)


def write_filters(config: Path, filters: dict[str, str]) -> None:
    template = load(config).template.source
    configure(config, document={"template": template, "filters": filters})


def test_a_product_that_comes_back_is_found_again(shop: Path, tmp_path: Path) -> None:
    before = live(load(shop))
    gone = before.rows.column(ID)[5].as_py()
    change(shop, [gone], night=1, column="is_active", value=lambda _: False)
    assert run(shop, at=1).facts.planned["delete"] == 1
    without = live(load(shop))
    assert gone not in without.rows.column(ID).to_pylist()
    change(shop, [gone], night=2, column="is_active", value=lambda _: True)
    assert run(shop, at=2).facts.planned["add"] == 1
    after = live(load(shop))
    assert after.rows.drop_columns([VECTOR]).equals(before.rows.drop_columns([VECTOR]))
    assert after.pin.rows_digest == before.pin.rows_digest
    own = after.rows.filter(pc.equal(after.rows.column(ID), gone))
    found = SegmentSearcher.open(open_store(after.settings), after.manifest).search(matrix(own.column(VECTOR)), TOP)
    assert gone in found.ids[0]
    assert_rebuilt_from_the_log(after, tmp_path)


def test_a_gap_left_by_since_yesterday_is_read_by_the_next_last(shop: Path) -> None:
    before = live(load(shop))
    early, late = before.rows.column(ID).to_pylist()[10:12]
    change(shop, [early], night=2, column="price", value=lambda price: price + 1)
    change(shop, [late], night=9, column="price", value=lambda price: price + 1)
    assert run(shop, at=9, since="yesterday").facts.planned["attr"] == 1
    between = live(load(shop))
    assert between.manifest.window == before.manifest.window
    assert run(shop, at=10).facts.planned["attr"] == 1
    after = live(load(shop))
    assert after.manifest.window.until == closing(10)
    catalog = read_catalog(shop).filter(pc.field("is_active")).sort_by(SKU)
    assert after.rows.column("price").equals(catalog.column("price"))


def test_float16_vectors_are_the_float32_ones_rounded(thirty: tuple[Live, Live, list[Record]], shop: Path) -> None:
    half, whole = live(load(shop)).rows, thirty[0].rows
    assert half.schema.field(VECTOR).type.value_type == pa.float16()
    # Both samples begin with the same products: whose text is the same has the same vector, rounded.
    mine = half.filter(pc.is_in(half.column(TEXT_HASH), whole.column(TEXT_HASH).combine_chunks()))
    place = pc.index_in(mine.column(TEXT_HASH), whole.column(TEXT_HASH).combine_chunks())
    theirs = whole.take(place)
    assert mine.num_rows > 50
    assert np.abs(matrix(mine.column(VECTOR)) - matrix(theirs.column(VECTOR))).max() < 1e-3


def test_a_store_whose_index_is_of_an_older_format_goes_on_with_the_next_night(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_shop(tmp_path / "shop", products=60)
    with monkeypatch.context() as older:
        older.setattr("pipelines.index.segments._CARD_FORMAT", 1)
        assert run(config, at=0).facts.outcome == "published"
    assert look(load(config), max_lag=None).segments == 1
    make_shop(tmp_path / "shop", products=60, night=1)
    record = run(config, at=1)
    assert record.facts.outcome == "published", record.facts.error
    assert record.ran is not None
    assert record.ran.index is not None
    assert (record.ran.index.action, record.ran.index.use.trigger) == ("rebuild", "format")
    assert {gate.name: gate.verdict for gate in record.ran.gates}["churn"] == "skipped"
    assert not failed(validate(load(config), None)[1])
    with pytest.raises(OldFormat, match="older catalog-embed"):
        roll_back(load(config), to=None, hold=False, reason="")
    assert look(load(config), max_lag=None).generation == "g000002"
