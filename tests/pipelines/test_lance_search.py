"""Searching a pinned version equals exact search in numpy and filters in Arrow, and no later commit changes it."""

from __future__ import annotations

import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from pipelines.errors import InputError
from pipelines.hashes import id_hashes
from pipelines.schema import ID, ID_HASH, VECTOR, VID
from pipelines.stores.lance import TableSearcher, TableSpec, apply, build, pin, refresh_indexes, sweep
from pipelines.where import MAX_CHECKS, MAX_LISTED, parse_where
from tests.pipelines.lance_rows import BRANDS, DIMS, Place, bulk, local, many, product, remote, rows, spec_of

NAMES = [f"p{number}" for number in range(1200)]
WHERES = [
    "brand = 'O''Hara'",
    "brand != 'Acme'",
    "brand not in ('Acme', '-- drop')",
    "brand is null and locale = 'de'",
    "brand = '東京の靴' or brand = 'Quo\"te'",
    "price < 80 and price >= 12.5",
    "not (price < 80)",
    "stock and pieces in (-3, 0, 8)",
    "not stock or pieces is null",
    "listed < '2026-01-10' and listed is not null",
    "pieces != 3",
    "id = 'p77' or id in ('p1', 'p2')",
    "brand = 'x'' or 1=1 --'",
]


def filled(place: Place, table: pa.Table, spec: TableSpec) -> int:
    build(place.uri, [table], spec, place.options)
    return refresh_indexes(place.uri, spec, place.options).version


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> tuple[TableSearcher, pa.Table]:
    """One table of 1,200 products with every index, of which the last 200 came in two later nights."""
    place, spec = local(tmp_path_factory.mktemp("shelf")), spec_of()
    filled(place, many(NAMES[:1000], spec), spec)
    for night in (NAMES[1000:1100], NAMES[1100:]):
        apply(
            place.uri,
            upserts=[many(night, spec)],
            attrs=[],
            deletes=[],
            spec=spec,
            options={},
            expect_live=NAMES.index(night[-1]) + 1,
        )
        version = refresh_indexes(place.uri, spec, {}).version
    return TableSearcher(place.uri, version, {}), many(NAMES, spec)


def matrix(table: pa.Table) -> npt.NDArray[np.float64]:
    flat = table.column(VECTOR).combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return np.asarray(flat, dtype=np.float64).reshape(-1, DIMS)


def best(table: pa.Table, query: npt.NDArray[Any], k: int) -> list[tuple[str, float]]:
    """Return the exact answer: highest cosine first, ties by id."""
    vectors = matrix(table)
    scores = vectors @ query / np.linalg.norm(query) / np.linalg.norm(vectors, axis=1)
    ranked = sorted(zip(table.column(ID).to_pylist(), scores.tolist(), strict=True), key=lambda pair: (-pair[1], pair[0]))
    return ranked[:k]


def queries(number: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(3).standard_normal((number, DIMS)).astype(np.float32)


@pytest.mark.parametrize("exact", [True, False])
def test_nearest_equals_numpy(shelf: tuple[TableSearcher, pa.Table], exact: bool) -> None:
    searcher, table = shelf
    hits = 0
    for query in queries(20):
        found = searcher.nearest(query, 10, exact=exact)
        truth = best(table, query.astype(np.float64), 10)
        hits += len({name for name, _ in truth} & {*found.column(ID).to_pylist()})
        assert found.column("score").to_pylist() == sorted(found.column("score").to_pylist(), reverse=True)
        scores = dict(best(table, query.astype(np.float64), 1200))
        for name, score in zip(found.column(ID).to_pylist(), found.column("score").to_pylist(), strict=True):
            assert score == pytest.approx(scores[name], abs=1e-5)
    assert hits == 200 if exact else hits >= 196


@pytest.mark.parametrize("text", WHERES)
def test_filters_equal_arrow(shelf: tuple[TableSearcher, pa.Table], text: str) -> None:
    searcher, table = shelf
    where = parse_where(text, searcher.columns)
    truth = table.filter(where.expression)
    assert searcher.matching(where).tolist() == sorted(truth.column(VID).to_pylist())
    query = queries(1)[0]
    found = searcher.nearest(query, 5, where=where, exact=True).column(ID).to_pylist()
    assert found == [name for name, _ in best(truth, query.astype(np.float64), 5)]
    indexed = searcher.nearest(query, 5, where=where, nprobes=1, refine=10)
    assert indexed.num_rows == min(5, truth.num_rows)
    assert {*indexed.column(ID).to_pylist()} <= {*truth.column(ID).to_pylist()}


def test_the_filter_comes_before_the_search(tmp_path: Path) -> None:
    place, spec = local(tmp_path), spec_of(vector_index="IVF_SQ")
    table = bulk(40_000, spec)
    searcher = TableSearcher(place.uri, filled(place, table, spec), {})
    where = parse_where("id in ('bulk-5', 'bulk-17', 'bulk-39999')", searcher.columns)
    for query in queries(10):
        assert searcher.nearest(query, 3, where=where, nprobes=1).num_rows == 3


def test_the_largest_filters_reach_the_engine(shelf: tuple[TableSearcher, pa.Table]) -> None:
    searcher, table = shelf
    chain = " or ".join(f"pieces = {number}" for number in range(MAX_CHECKS))
    listed = ", ".join(f"'{name}'" for name in NAMES[:MAX_LISTED])
    for text in (chain, f"id in ({listed})", f"id not in ({listed})"):
        where = parse_where(text, searcher.columns)
        assert len(searcher.matching(where)) == table.filter(where.expression).num_rows


def test_ties_are_ordered_by_id_and_k_may_exceed_the_rows(tmp_path: Path) -> None:
    place, spec = local(tmp_path), spec_of()
    same = [product("x") | {ID: name} for name in ("c", "a", "b")]
    searcher = TableSearcher(place.uri, filled(place, rows([*same, product("other")], spec), spec), {})
    found = searcher.nearest(same[0][VECTOR], 99, columns=["brand", VECTOR])
    assert found.column(ID).to_pylist() == ["a", "b", "c", "other"]
    assert found.column_names == [ID, VID, "score", "brand", VECTOR]
    assert found.column("score")[0].as_py() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("how", [{"vector": "float16"}, {"metric": "dot"}, {"vector_index": "none"}, {"vector_index": "IVF_RQ"}])
def test_every_kind_of_table_gives_cosines(tmp_path: Path, how: dict[str, Any]) -> None:
    place, spec = local(tmp_path), spec_of(**how)
    table = many(NAMES[:600], spec)
    searcher = TableSearcher(place.uri, filled(place, table, spec), {})
    for query in queries(3):
        truth = best(table, query.astype(np.float64), 1)[0]
        for exact in (True, False):
            found = searcher.nearest(query * 3, 1, exact=exact, refine=200).to_pylist()[0]
            assert found[ID] == truth[0]
            assert found["score"] == pytest.approx(truth[1], abs=2e-3 if "vector" in how else 1e-5)


def test_words_find_products_in_every_script(shelf: tuple[TableSearcher, pa.Table]) -> None:
    searcher, table = shelf
    brands = table.column("brand").to_pylist()
    for words, brand in (("東京", "東京の靴"), ("GROSSE", "Größe & Co"), ("größe", "Größe & Co"), ("hara", "O'Hara")):
        found = searcher.text(words, 5, columns=["brand"])
        assert set(found.column("brand").to_pylist()) == {brand}
        assert found.num_rows == 5
        assert len(searcher.text(words, 2000)) == brands.count(brand)
    where = parse_where("locale = 'de'", searcher.columns)
    assert set(searcher.text("acme", 9, where=where, columns=["locale"]).column("locale").to_pylist()) == {"de"}


@pytest.mark.parametrize("words", ["", '"', "'; drop", "a AND (", "*", "brand:acme^9", "\x00", "x" * 10_000])
def test_words_are_no_language(shelf: tuple[TableSearcher, pa.Table], words: str) -> None:
    searcher, _ = shelf
    assert {*searcher.text(words, 3, columns=["brand"]).column("brand").to_pylist()} <= {*BRANDS}


def test_rows_come_in_the_order_asked(shelf: tuple[TableSearcher, pa.Table]) -> None:
    searcher, table = shelf
    found = searcher.rows(["p9", "missing", "p2", "p9", "' or 1=1"], ["brand", ID])
    assert found.column(ID).to_pylist() == ["p9", "p2"]
    assert found.column("brand").to_pylist() == [table.column("brand")[9].as_py(), table.column("brand")[2].as_py()]
    assert searcher.rows([], [ID]).num_rows == 0


def test_wrong_questions_are_refused(shelf: tuple[TableSearcher, pa.Table], tmp_path: Path) -> None:
    searcher, _ = shelf
    good = queries(1)[0]
    for vector in (good[:5], np.zeros(DIMS, np.float32), good * np.float32(np.nan), good[None]):
        with pytest.raises(InputError, match="the query vector has"):
            searcher.nearest(vector, 3)
    for k, nprobes, refine in ((0, 1, 1), (3, 0, 1), (3, 1, 0)):
        with pytest.raises(InputError, match="1 or more"):
            searcher.nearest(good, k, nprobes=nprobes, refine=refine)
    with pytest.raises(InputError, match="has no column colour"):
        searcher.nearest(good, 3, columns=["colour"])
    place, spec = local(tmp_path), spec_of(text=())
    plain = TableSearcher(place.uri, filled(place, many(["a"], spec), spec), {})
    with pytest.raises(InputError, match="has no full-text index"):
        plain.text("a", 3)


@pytest.mark.parametrize("where", ["local", "s3"])
def test_readers_of_a_pinned_version_see_no_later_commit(request: pytest.FixtureRequest, tmp_path: Path, where: str) -> None:
    place = local(tmp_path) if where == "local" else remote(request.getfixturevalue("s3"))
    spec = spec_of(fold_after=1)
    table = many(NAMES[:600], spec)
    version = filled(place, table, spec)
    pin(place.uri, version=version, tag="g000001", previous=None, store=place.store, key=place.key, options=place.options)
    searcher, query = TableSearcher(place.uri, version, place.options), queries(1)[0]
    before = searcher.nearest(query, 10, columns=[VECTOR])
    answers: list[bool] = []
    stop = threading.Event()

    def reading() -> None:
        while not stop.is_set() or not answers:
            fresh = TableSearcher(place.uri, version, place.options)
            answers.append(fresh.nearest(query, 10, columns=[VECTOR]) == before == searcher.nearest(query, 10, columns=[VECTOR]))

    reader = threading.Thread(target=reading)
    reader.start()
    for night in range(2):
        names = NAMES[night * 250 : night * 250 + 250]
        gone = pa.table({ID_HASH: id_hashes(pa.array(names))})
        live = 600 - 250 * (night + 1)
        apply(place.uri, upserts=[], attrs=[], deletes=[gone], spec=spec, options=place.options, expect_live=live)
        refresh_indexes(place.uri, spec, place.options)
        sweep(place.uri, keep_versions=set(), older_than=timedelta(0), options=place.options, dry_run=False)
    stop.set()
    reader.join()
    assert all(answers)
    assert len(searcher.matching(parse_where("id is not null", searcher.columns))) == 600


def test_lancedb_reads_what_a_generation_pins(tmp_path: Path) -> None:
    import lancedb

    place, spec = local(tmp_path), spec_of()
    version = filled(place, many(NAMES[:600], spec), spec)
    pin(place.uri, version=version, tag="g000001", previous=None, store=place.store, key=place.key, options={})
    opened = lancedb.connect(str(Path(place.uri).parent)).open_table(Path(place.uri).stem)
    opened.checkout("g000001")
    query = queries(1)[0]
    found = opened.search(query, vector_column_name=VECTOR).distance_type("cosine").nprobes(20).refine_factor(4).limit(5).to_list()
    assert [row[ID] for row in found] == TableSearcher(place.uri, version, {}).nearest(query, 5).column(ID).to_pylist()
