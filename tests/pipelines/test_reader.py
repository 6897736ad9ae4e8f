"""What readers of an index may count on: the right tower, live products only, one generation for one answer, and no lost query."""

from __future__ import annotations

import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from encoder.inference import Encoder
from encoder.registry import TowerOptions
from jobs.settings import load
from pipelines.errors import CorruptObject, InputError, ManifestError, NotFound
from pipelines.manifest import Manifest
from pipelines.publish import read_manifest, rollback
from pipelines.reader import Reader, open_generation
from pipelines.retention import RetentionOptions, plan_gc
from pipelines.storage import Store
from pipelines.stores import lance
from pipelines.where import col, parse_where
from tests.conftest import S3Server
from tests.jobs.commands import DIMS, FIRST, LIVE, MAX_TOKENS, SECOND
from tests.towers import tiny_tower

pytestmark = pytest.mark.usefixtures("ray_cluster")

QUERY = "waterproof leather shoes for running"


@dataclass(frozen=True)
class Shop:
    """A shop with two nights behind it: SECOND is live, FIRST was live before."""

    folder: Path

    @property
    def root(self) -> Path:
        return self.folder / "index"

    @property
    def store(self) -> Store:
        return Store.open(self.root)

    def manifest(self, generation: str = SECOND) -> Manifest:
        return read_manifest(self.store, generation)

    def rows(self, generation: str = SECOND) -> pa.Table:
        """Every product of a generation, read without any index."""
        pin = self.manifest(generation).table
        assert pin is not None
        columns = ["id", "brand", "price", "in_stock", "size", "weight_g", "locale", "vector"]
        return pa.concat_tables(lance.read_rows(self.store.uri(pin.uri), version=pin.version, columns=columns, options={}))

    def move(self, generation: str) -> None:
        """Make a generation live."""
        now = datetime.now(tz=UTC)
        rollback(self.store, alias="prod", run_id=f"move-{time.monotonic_ns()}", reason="", clock=lambda: now, to=generation)


@pytest.fixture(scope="module")
def shop(two_nights: Path) -> Shop:
    """Shared by tests that only read."""
    return Shop(two_nights.parent)


@pytest.fixture
def own(shop: Shop, tmp_path: Path) -> Shop:
    """A copy, for tests that change something."""
    shutil.copytree(shop.folder, tmp_path / "own")
    return Shop(tmp_path / "own")


@pytest.fixture(scope="module")
def reader(shop: Shop) -> Iterator[Reader]:
    with open_generation(shop.root, reload_s=None) as opened:
        yield opened


def vector_of(shop: Shop, text: str) -> npt.NDArray[np.float32]:
    """Embed a text with the query side of the tower, without the reader."""
    settings = load(shop.folder / "catalog-embed.yaml")
    options = TowerOptions(template_digest=settings.template.digest, dims=DIMS, max_tokens=MAX_TOKENS)
    vector: npt.NDArray[np.float32] = Encoder(shop.folder / "tower", tower=options).encode([text], kind="query")[0]
    return vector


def brute_force(rows: pa.Table, vector: Any, k: int) -> list[tuple[str, float]]:
    """Compare every row."""
    matrix = np.stack(rows["vector"].to_numpy(zero_copy_only=False)).astype(np.float64) if rows.num_rows else np.empty((0, DIMS))
    scores = matrix @ (np.asarray(vector, np.float64) / np.linalg.norm(vector))
    found = sorted(zip(rows["id"].to_pylist(), scores.tolist(), strict=True), key=lambda item: (-item[1], item[0]))
    return found[:k]


def same(found: pa.Table, wanted: list[tuple[str, float]]) -> None:
    """The same scores in the same order, each of its own product; which of several equal ones comes last is open."""
    np.testing.assert_allclose(found["score"].to_numpy(), [score for _, score in wanted], atol=2e-6)
    assert len(set(found["id"].to_pylist())) == len(wanted)
    last = wanted[-1][1] if wanted else 0.0
    surely = {name for name, score in wanted if score > last + 4e-6}
    assert surely <= set(found["id"].to_pylist())


def test_a_text_finds_what_its_vector_finds(shop: Shop, reader: Reader) -> None:
    vector = vector_of(shop, QUERY)
    by_text = reader.search(QUERY, 20)
    assert by_text.equals(reader.search(vector, 20))
    assert by_text.equals(reader.search(list(map(float, vector)), 20))
    # A score is a cosine, whatever the length of the vector.
    np.testing.assert_allclose(reader.search(vector * 7, 20)["score"].to_numpy(), by_text["score"].to_numpy(), atol=1e-6)


@pytest.mark.parametrize("how", [{"engine": "faiss"}, {"engine": "lance"}, {"exact": True}])
@pytest.mark.parametrize("k", [1, 10, LIVE])
def test_every_engine_finds_the_k_nearest_live_products(shop: Shop, reader: Reader, how: dict[str, Any], k: int) -> None:
    rows = shop.rows()
    same(reader.search(QUERY, k, **how), brute_force(rows, vector_of(shop, QUERY), k))
    gone = set(shop.rows(FIRST)["id"].to_pylist()) - set(rows["id"].to_pylist())
    assert gone
    assert set(reader.search(QUERY, 5000, **how)["id"].to_pylist()) == set(rows["id"].to_pylist())


FILTERS: dict[str, Callable[[pa.Table], Any]] = {
    "price < 40": lambda t: pc.less(t["price"], 40),
    "in_stock": lambda t: t["in_stock"],
    "not (price >= 40) and in_stock": lambda t: pc.and_(pc.less(t["price"], 40), t["in_stock"]),
    "size is null": lambda t: pc.is_null(t["size"]),
    "size != '42'": lambda t: pc.not_equal(t["size"], "42"),
    "weight_g in (1175, 534) or locale = 'de'": lambda t: pc.or_kleene(
        pc.is_in(t["weight_g"], pa.array([1175, 534])), pc.equal(t["locale"], "de")
    ),
    "brand = 'O''Neill \" or 1=1 --'": lambda t: pc.equal(t["brand"], "O'Neill \" or 1=1 --"),
}


@pytest.mark.parametrize("engine", ["faiss", "lance"])
@pytest.mark.parametrize("where", FILTERS)
def test_a_filter_leaves_what_a_scan_leaves(shop: Shop, reader: Reader, where: str, engine: Any) -> None:
    rows = shop.rows()
    left = rows.filter(FILTERS[where](rows).combine_chunks())
    vector = vector_of(shop, QUERY)
    for k in (5, LIVE):
        same(reader.search(QUERY, k, where=where, engine=engine), brute_force(left, vector, k))


BUILT: dict[str, Any] = {
    "price < 40": col("price") < 40,
    "in_stock": col("in_stock"),
    "not (price >= 40) and in_stock": ~(col("price") >= 40) & col("in_stock"),
    "size is null": col("size").is_null(),
    "weight_g in (1175, 534) or locale = 'de'": col("weight_g").is_in([1175, 534]) | (col("locale") == "de"),
}


@pytest.mark.parametrize("engine", ["faiss", "lance"])
@pytest.mark.parametrize("where", BUILT)
def test_a_built_filter_a_parsed_one_and_its_text_answer_alike(reader: Reader, where: str, engine: Any) -> None:
    by_text = reader.search(QUERY, 20, where=where, engine=engine)
    assert reader.search(QUERY, 20, where=BUILT[where], engine=engine).equals(by_text)
    assert reader.search(QUERY, 20, where=parse_where(where, reader.opened.table.columns), engine=engine).equals(by_text)


@pytest.mark.parametrize("how", [{"engine": "faiss"}, {"engine": "lance"}, {"exact": True}])
def test_products_without_a_value_pass_where_nulls_are_kept(shop: Shop, reader: Reader, how: dict[str, Any]) -> None:
    rows, vector = shop.rows(), vector_of(shop, QUERY)
    assert rows["size"].null_count
    sized = pc.equal(rows["size"], "42")
    same(reader.search(QUERY, LIVE, where="size = '42'", **how), brute_force(rows.filter(sized), vector, LIVE))
    kept = rows.filter(pc.or_(pc.fill_null(sized, fill_value=False), pc.is_null(rows["size"])))
    for where in ("size = '42'", col("size") == "42", (col("size") == "42").filter(reader.opened.table.columns)):
        same(reader.search(QUERY, LIVE, where=where, nulls="keep", **how), brute_force(kept, vector, LIVE))
    same(reader.search(QUERY, LIVE, where=(col("size") == "42").or_null(), **how), brute_force(kept, vector, LIVE))


@pytest.mark.parametrize("how", [{"engine": "faiss"}, {"engine": "lance"}, {"exact": True}])
@pytest.mark.parametrize("group", ["brand", "size", "in_stock", "price", "id"])
def test_answers_of_a_group_are_its_best_and_no_more_than_asked_for(shop: Shop, reader: Reader, group: str, how: dict[str, Any]) -> None:
    rows, vector = shop.rows(), vector_of(shop, QUERY)
    known = {row["id"]: row[group] for row in rows.to_pylist()}
    for where, left in ((None, rows), ("price < 60", rows.filter(pc.less(rows["price"], 60)))):
        for per_group, k in ((1, 10), (3, 40), (2, LIVE)):
            found = reader.search(QUERY, k, where=where, group_by=group, per_group=per_group, columns=["price"], **how)
            assert found.schema.names == ["id", "score", "price"]
            taken: Counter[Any] = Counter()
            wanted = []
            for name, score in brute_force(left, vector, LIVE):
                if known[name] is None or taken[known[name]] < per_group:
                    wanted.append((name, score))
                    taken[known[name]] += 1
            np.testing.assert_allclose(found["score"].to_numpy(), [score for _, score in wanted[:k]], atol=2e-6)
            counts = Counter(known[name] for name in found["id"].to_pylist())
            assert all(count <= per_group for value, count in counts.items() if value is not None)


@pytest.mark.parametrize("engine", ["faiss", "lance"])
def test_columns_are_those_of_the_products_found(shop: Shop, reader: Reader, engine: Any) -> None:
    found = reader.search(QUERY, 25, engine=engine, columns=["price", "id", "size", "price"])
    assert found.schema.names == ["id", "score", "price", "size"]
    known = {row["id"]: row for row in shop.rows().to_pylist()}
    for row in found.to_pylist():
        assert (row["price"], row["size"]) == (known[row["id"]]["price"], known[row["id"]]["size"])


def test_another_tower_is_refused_and_the_very_tower_is_taken(shop: Shop, reader: Reader, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{SECOND} was made with {shop.manifest().tower[:12]}.*loads its own"):
        open_generation(shop.root, tower=tiny_tower(tmp_path / "other", seed=9), reload_s=None)
    with pytest.raises(InputError, match="cannot be the query tower"):
        open_generation(shop.root, tower=tiny_tower(tmp_path / "small", dims=16, max_tokens=32), reload_s=None)
    with pytest.raises(InputError, match="cannot be the query tower"):
        open_generation(shop.root, tower=tmp_path / "nowhere", reload_s=None)
    with open_generation(shop.root, tower=shop.folder / "tower", reload_s=None) as own_tower:
        assert own_tower.search(QUERY, 10).equals(reader.search(QUERY, 10))


def test_a_generation_is_opened_by_its_id(shop: Shop) -> None:
    with open_generation(shop.root, generation=FIRST) as opened:
        assert (opened.generation, opened.refresh()) == (FIRST, False)
        same(opened.search(QUERY, 10), brute_force(shop.rows(FIRST), vector_of(shop, QUERY), 10))


def test_what_is_not_there_is_named(shop: Shop, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="alias `prod` names nothing yet"):
        open_generation(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(NotFound, match="alias `staging`"):
        open_generation(shop.root, "staging")
    with pytest.raises(NotFound, match="g000099"):
        open_generation(shop.root, generation="g000099")
    for hostile in ("../g000001", "g000001/../g000002", "g" + "9" * 5000, ""):
        with pytest.raises(ManifestError):
            open_generation(shop.root, generation=hostile)


@pytest.mark.parametrize(
    ("query", "how", "message"),
    [
        ("", {}, "the query is empty"),
        (" \n", {}, "the query is empty"),
        (QUERY, {"k": 0}, "k is 0"),
        (QUERY, {"k": -3, "engine": "lance"}, "k is -3"),
        (QUERY, {"columns": ["prize"]}, "no column 'prize'"),
        (QUERY, {"columns": ["prize"], "engine": "lance"}, "no column 'prize'"),
        (QUERY, {"where": "price <"}, "expected a value"),
        (QUERY, {"where": "prise < 3"}, "Did you mean `price`"),
        (QUERY, {"where": "1=1; drop table"}, "filter"),
        (QUERY, {"where": col("prise") < 3}, "Did you mean `price`"),
        (QUERY, {"where": col("price") < "x"}, "`price` is a number"),
        (QUERY, {"where": (col("pieces") < 3).filter({"pieces": pa.int64()})}, "no column 'pieces' to filter by"),
        (QUERY, {"where": {"price": 3}}, "a filter is a text or made with `col`"),
        (QUERY, {"where": "in_stock", "nulls": "skip"}, "Use `drop`"),
        (QUERY, {"nulls": "keep"}, "there is no filter"),
        (QUERY, {"group_by": "colour"}, "no column 'colour' to group by"),
        (QUERY, {"group_by": "brand", "per_group": 0}, "per_group is 0"),
        (QUERY, {"per_group": 2}, "give `group_by` a column"),
        (QUERY, {"engine": "annoy"}, "no engine `annoy`"),
        ([1.0, 2.0], {}, "Use the"),
        ([0.0] * 16, {}, "length 0.0"),
        ([float("nan")] * 16, {}, "length nan"),
        ([[1.0] * 16], {}, "shape"),
        (["a"] * 16, {}, "neither a text nor a list of numbers"),
        (None, {}, "length nan|neither a text"),
    ],
)
def test_a_question_that_makes_no_sense_is_an_input_error(reader: Reader, query: Any, how: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        reader.search(query, **how)


def test_texts_may_be_asked_from_many_threads_at_once(reader: Reader) -> None:
    texts = [f"{word} shoes {number}" for number in range(4) for word in ("red", "blue leather", "a very long waterproof winter", "x")]
    wanted = [reader.search(text, 5) for text in texts]
    with ThreadPoolExecutor(max_workers=8) as pool:
        for found, expected in zip(pool.map(lambda text: reader.search(text, 5), texts * 6), wanted * 6, strict=True):
            assert found.equals(expected)


def test_no_query_fails_or_mixes_generations_while_the_alias_moves(own: Shop) -> None:
    vector = vector_of(own, QUERY)
    hows: list[dict[str, Any]] = [
        {"columns": ["price", "in_stock"]},
        {"columns": ["price", "in_stock"], "engine": "lance"},
        {"where": "price < 60"},
        {"columns": ["price"], "where": "in_stock", "engine": "lance"},
    ]
    wanted = []
    for generation in (FIRST, SECOND):
        with open_generation(own.root, generation=generation) as opened:
            wanted.append([opened.search(vector, LIVE, **how) for how in hows])
    assert not any(one.equals(other) for one, other in zip(*wanted, strict=True))
    answers, failures, seen = [0] * 4, [], set()
    stop = threading.Event()

    def ask(number: int) -> None:
        while not stop.is_set():
            try:
                found = opened.search(vector, LIVE, **hows[number])
                which = [generation for generation, tables in zip((FIRST, SECOND), wanted, strict=True) if found.equals(tables[number])]
                assert len(which) == 1, "an answer of neither generation"
                seen.update(which)
                answers[number] += 1
            except BaseException as error:  # noqa: BLE001  whatever it is, it is counted
                failures.append(error)

    with open_generation(own.root, reload_s=0.005, lease=timedelta(minutes=5)) as opened:
        threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for number in range(30):
            target = (FIRST, SECOND)[number % 2]
            own.move(target)
            _until(partial(_follows, opened, target))
        stop.set()
        for thread in threads:
            thread.join()
        assert opened.reload_error is None
    assert failures == []
    assert seen == {FIRST, SECOND}
    assert min(answers) > 10, answers


def _follows(opened: Reader, generation: str) -> bool:
    return opened.generation == generation


def _until(reached: Callable[[], bool], *, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, "not reached in time"
        time.sleep(0.002)


def test_a_damaged_new_generation_keeps_the_old_one_and_says_why(own: Shop) -> None:
    own.move(FIRST)
    shared = {item.key for item in own.manifest(FIRST).segments}
    fresh = next(item.key for item in own.manifest().segments if item.key not in shared and item.key.endswith("index.faiss"))
    with open_generation(own.root, reload_s=0.01, lease=timedelta(minutes=5)) as opened:
        before = opened.search(QUERY, 10)
        _flip(own.root / fresh)
        own.move(SECOND)
        _until(lambda: opened.reload_error is not None)
        assert isinstance(opened.reload_error, CorruptObject)
        assert fresh in str(opened.reload_error)
        assert opened.generation == FIRST
        assert opened.search(QUERY, 10).equals(before)
        with pytest.raises(CorruptObject):
            opened.refresh()
        _flip(own.root / fresh)
        _until(lambda: opened.generation == SECOND)
        _until(lambda: opened.reload_error is None)
        assert [info.key.split("/")[2] for info in own.store.list("leases/readers")] == [SECOND]


def test_another_tower_in_the_next_generation_stops_a_reader_that_brought_its_own(own: Shop, tmp_path: Path) -> None:
    with open_generation(own.root, tower=own.folder / "tower", reload_s=0.01) as opened:
        tiny_tower(own.folder / "tower", seed=4)
        own.move(FIRST)
        _until(lambda: opened.reload_error is not None)
        assert "was made with" in str(opened.reload_error)
        assert opened.generation == SECOND
        assert opened.search(vector_of(own, QUERY), 3).num_rows == 3


@pytest.mark.parametrize("role", ["segments", "tombstones", "parts", "table", "tower"])
@pytest.mark.parametrize("harm", ["cut", "gone"])
def test_a_missing_or_cut_object_is_refused_at_opening(own: Shop, role: str, harm: str) -> None:
    manifest = own.manifest()
    assert manifest.table is not None
    listed: dict[str, Any] = {
        "segments": manifest.segments,
        "tombstones": manifest.tombstones,
        "parts": manifest.parts,
        "table": manifest.table.objects,
        "tower": [item for item in manifest.attachments if item.role == "tower"],
    }
    key = listed[role][-1].key
    path = own.root / key
    path.write_bytes(path.read_bytes()[:-1]) if harm == "cut" else path.unlink()
    with pytest.raises(CorruptObject, match=key):
        open_generation(own.root, reload_s=None)


def test_flipped_bits_are_found_in_faiss_files_always_and_in_the_rest_when_asked(own: Shop) -> None:
    manifest = own.manifest()
    assert manifest.table is not None
    data = next(item.key for item in manifest.table.objects if "/data/" in item.key)
    _flip(own.root / data)
    open_generation(own.root, reload_s=None).close()
    with pytest.raises(CorruptObject, match=data):
        open_generation(own.root, reload_s=None, verify="full")
    _flip(own.root / data)
    _flip(own.root / next(item.key for item in manifest.segments if item.key.endswith("index.faiss")))
    with pytest.raises(CorruptObject, match="faiss"):
        open_generation(own.root, reload_s=None)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_leased_generation_is_kept_by_gc_until_the_reader_closes(own: Shop) -> None:
    later = datetime.now(tz=UTC) + timedelta(days=30)

    def dropped() -> tuple[str, ...]:
        return plan_gc(own.store, now=later, options=RetentionOptions(keep=1)).drop

    assert dropped() == (FIRST,)
    with open_generation(own.root, generation=FIRST, lease=timedelta(days=60)):
        assert dropped() == ()
    assert dropped() == (FIRST,)
    # A reader that follows leases what it has open, and nothing else.
    with open_generation(own.root, reload_s=None, lease=timedelta(days=60)) as opened:
        own.move(FIRST)
        assert dropped() == ()
        assert opened.refresh()
        assert dropped() == (SECOND,)
    assert list(own.store.list("leases/readers")) == []


def test_a_reader_whose_lease_was_lost_takes_it_again_and_goes_on_following(own: Shop) -> None:
    with open_generation(own.root, reload_s=0.01, lease=timedelta(minutes=5)) as opened:
        (lost,) = own.store.list("leases/readers")
        own.store.delete(lost.key)
        _until(lambda: [info.key.split("/")[2] for info in own.store.list("leases/readers")] == [SECOND])
        own.move(FIRST)
        _until(lambda: opened.generation == FIRST)
        _until(lambda: opened.reload_error is None)


def test_lancedb_reads_the_same_rows(shop: Shop, reader: Reader) -> None:
    table = reader.opened.lancedb()
    assert table.count_rows() == LIVE
    vector = vector_of(shop, QUERY)
    found = table.search(vector).distance_type("cosine").limit(10).to_arrow()
    same(
        pa.table({"id": found["id"], "score": pc.subtract(1.0, pc.cast(found["_distance"], pa.float64()))}),
        brute_force(shop.rows(), vector, 10),
    )


def test_an_index_on_s3_gives_the_same_answers(shop: Shop, reader: Reader, s3: S3Server, tmp_path: Path) -> None:
    bucket, client = s3.bucket(), s3.client()
    for path in sorted(shop.root.rglob("*")):
        if path.is_file():
            client.upload_file(str(path), bucket, f"index/{path.relative_to(shop.root)}")
    with open_generation(
        f"s3://{bucket}/index", options=s3.options, cache=tmp_path / "cache", lease=timedelta(minutes=5), reload_s=None
    ) as far:
        for how in ({}, {"engine": "lance"}, {"where": "price < 40", "columns": ["price"]}):
            assert far.search(QUERY, 20, **how).equals(reader.search(QUERY, 20, **how))
    listed = client.list_objects_v2(Bucket=bucket, Prefix="index/leases/readers/")
    assert listed["KeyCount"] == 0
