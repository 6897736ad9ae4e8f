"""The searcher equals a brute-force model of the live products, whatever the nights before."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.errors import InputError
from pipelines.index.build import Rows, build_base
from pipelines.index.compaction import Part
from pipelines.index.search import SegmentSearcher, search_of
from pipelines.index.segments import read_roster
from pipelines.index.spec import IndexSpec, Search
from pipelines.index.triggers import RefreshOptions
from pipelines.storage import Store
from tests.pipelines.index_nights import DIMS, FACTORIES, PATIENT, Floats, Shop, named, numbers, of, rows, unit, used, vid_of

FLAT, IVF = "Flat", "IVF8,Flat"
BOTH = pytest.mark.parametrize("factory", [FLAT, IVF])
# Scored by half-precision codes: each of 16 products of numbers below one is off by 2**-11 at most.
FINE = "IVF8,RaBitQfs,Refine(SQfp16)"
ALL = Search(nprobe=8, refine=100)


def patient(factory: str) -> RefreshOptions:
    return replace(PATIENT, factory=factory)


def opened(shop: Shop, **choice: Any) -> SegmentSearcher:
    return SegmentSearcher.open(shop.store, shop.opened(), **choice)


def check(
    shop: Shop,
    searcher: SegmentSearcher,
    queries: Floats,
    k: int,
    *,
    allowed: Sequence[str] | None = None,
    atol: float = 2e-6,
    **asked: Any,
) -> None:
    """Compare with the model: scores as they must be, each product with its own score, none twice, ties allowed."""
    hits = searcher.search(queries, k, allowed=None if allowed is None else numbers(allowed), **asked)
    assert hits.vids.shape == hits.scores.shape == (len(queries), k)
    for row, truth in enumerate(shop.truth(queries, allowed=allowed)):
        ids, scores, want = hits.ids[row], hits.scores[row], truth[:k]
        assert len(ids) == len(set(ids)) == len(want)
        np.testing.assert_allclose(scores[: len(want)], [score for score, _ in want], atol=atol)
        exact = {name: score for score, name in truth}
        np.testing.assert_allclose(scores[: len(want)], [exact[name] for name in ids], atol=atol)
        assert hits.vids[row].tolist() == [vid_of(name) for name in ids] + [-1] * (k - len(want))
        assert np.isneginf(scores[len(want) :]).all()


def random_night(shop: Shop, rng: np.random.Generator, *, size: int) -> None:
    old = rng.permutation(np.array([*shop.live])).tolist()
    gone, changed = old[: size // 3], old[size // 3 : size // 2]
    back = [f"p{number:05d}" for number in rng.integers(0, 900, size // 3) if f"p{number:05d}" not in shop.live]
    fresh = {name: unit(rng, 1)[0] for name in {*back, *(f"n{shop.night}-{at}" for at in range(size // 4))}}
    shop.next(fresh, {name: unit(rng, 1)[0] for name in changed}, gone)


@pytest.mark.parametrize(("factory", "atol"), [(FLAT, 2e-6), (IVF, 2e-6), (FINE, 6e-4)])
def test_search_equals_the_model_after_every_night(tmp_path: Path, factory: str, atol: float, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(7)
    shop = Shop(tmp_path, patient(factory))
    shop.next(named("p", unit(rng, 600)))
    for _ in range(3):
        random_night(shop, rng, size=90)
        searcher, queries = opened(shop), unit(rng, 9)
        assert searcher.num_live == len(shop.live)
        assert searcher.all_live_vids().tolist() == sorted(map(vid_of, shop.live))
        names = [*shop.live, "never-there", "p00001"]
        for asked in ({"exact": True}, {"how": ALL}):
            for k in (10, len(shop.live) + 3):
                check(shop, searcher, queries, k, atol=atol, **asked)
            for few in (50_000, 0):  # compared one by one, and by lists that a filter thins out
                monkeypatch.setattr("pipelines.index.search.EXACT_ROWS", few)
                for share in (0, 1, 200, len(names)):
                    allowed = rng.permutation(np.array(names))[:share].tolist()
                    check(shop, searcher, queries[:3], 10, allowed=allowed, atol=atol, **asked)
    assert len({item.key.split("/")[1] for item in shop.opened().segments}) == 4


@pytest.mark.parametrize("factory", FACTORIES)
def test_k_live_results_come_back_past_tombstones_that_crowd_the_query(
    tmp_path: Path, factory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, store = np.random.default_rng(3), Store.open(tmp_path / "store")
    products, query = named("p", unit(rng, 600)), unit(rng, 1)
    base = build_base(store, "base", of(products), IndexSpec(factory=factory, dims=DIMS), work=tmp_path)
    # The best 95 % for this query go: every answer lies behind all of them, in far lists.
    scores = {name: float(query[0] @ vector) for name, vector in products.items()}
    live = sorted(scores, key=scores.__getitem__)[:30]
    dead = ~np.isin(read_roster(store, base).ids.to_pylist(), live)
    searcher = SegmentSearcher([Part.load(store, base, dead)], Search())
    for few in (50_000, 0):
        monkeypatch.setattr("pipelines.index.search.EXACT_ROWS", few)
        for k in (1, 29, 30, 40):
            for allowed in (None, live, live[:7]):
                hits = searcher.search(np.vstack([query, unit(rng, 5)]), k, allowed=None if allowed is None else numbers(allowed))
                assert {len(ids) for ids in hits.ids} == {min(k, len(allowed or live))}
                assert {name for ids in hits.ids for name in ids} <= {*(allowed or live)}
                assert all(len(ids) == len(set(ids)) for ids in hits.ids)


def test_exact_search_visits_every_list_and_takes_the_finest_codes(tmp_path: Path) -> None:
    rng = np.random.default_rng(9)
    shop = Shop(tmp_path, patient("IVF8,RaBitQfs,Refine(SQfp16)"))
    shop.next(named("p", unit(rng, 400)))
    shop.next(delete=["p00001"])
    searcher, queries = opened(shop), unit(rng, 20)
    check(shop, searcher, queries, 10, atol=6e-4, exact=True)
    one_list = searcher.search(queries, 10, how=Search(nprobe=1, refine=1))
    truth = [{name for _, name in row[:10]} for row in shop.truth(queries)]
    assert sum(len(want & set(ids)) for want, ids in zip(truth, one_list.ids, strict=True)) < 150


def test_a_filter_visits_more_lists_until_they_change_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.index.search.EXACT_ROWS", 0)
    rng = np.random.default_rng(10)
    vectors = rng.standard_normal((840, DIMS)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)  # in no group: neighbours are in several lists
    shop = Shop(tmp_path, patient(IVF))
    shop.next(named("p", vectors[:800]))
    searcher, queries, names = opened(shop), vectors[800:], rng.permutation(np.array([*shop.live])).tolist()

    def recall(allowed: list[str] | None) -> float:
        vids = None if allowed is None else numbers(allowed)
        found = searcher.search(queries, 5, allowed=vids, how=Search(nprobe=1))
        truth = [{name for _, name in row[:5]} for row in shop.truth(queries, allowed=allowed)]
        return sum(len(want & set(ids)) for want, ids in zip(truth, found.ids, strict=True)) / 200

    assert recall(None) < 0.7
    assert min(recall(names[:share]) for share in (800, 400, 100, 20, 5)) > 0.9


def test_fewer_probes_than_lists_still_bring_k_results(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    shop = Shop(tmp_path, patient(IVF))
    shop.next(named("p", unit(rng, 400)))
    queries = unit(rng, 30)
    searcher = opened(shop, how=Search(nprobe=1))
    assert searcher.how == Search(nprobe=1)
    assert {len(ids) for ids in searcher.search(queries, 390).ids} == {390}
    few = [*shop.live][:12]
    check(shop, searcher, queries, 10, allowed=few)


def test_equal_vectors_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    shop = Shop(tmp_path)
    same = unit(np.random.default_rng(1), 1)[0]
    shop.next({f"twin-{number}": same for number in range(5)})
    shop.next({f"late-{number}": same for number in range(3)})
    hits = opened(shop).search(same[None], 8)
    assert hits.vids[0].tolist() == sorted(vid_of(name) for name in shop.live)


def test_half_precision_is_found_with_its_own_vectors(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    shop = Shop(tmp_path)
    products = {name: vector.astype(np.float16).astype(np.float32) for name, vector in named("p", unit(rng, 80)).items()}
    shop.live = products
    shop.next(live=Rows(pieces=[rows(products, kind="float16")], count=80))
    check(shop, opened(shop), unit(rng, 5).astype(np.float16).astype(np.float32), 10)
    assert opened(shop).search(unit(rng, 2).astype(np.float16), 3).vids.shape == (2, 3)


def test_index_of_an_empty_catalog_answers_nothing(tmp_path: Path) -> None:
    shop = Shop(tmp_path)
    found = shop.next()
    assert (found.segments, found.tombstones, used(shop).trigger) == ((), (), "empty")
    searcher = opened(shop)
    assert searcher.search(unit(np.random.default_rng(0), 2), 3).ids == [[], []]
    assert (searcher.num_live, searcher.contains(np.array([5])).tolist()) == (0, [False])


def test_contains_and_ids_follow_the_live_products(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    shop = Shop(tmp_path)
    shop.next(named("p", unit(rng, 30)))
    shop.next(named("q", unit(rng, 3)), {"p00001": unit(rng, 1)[0]}, ["p00002"])
    searcher = opened(shop)
    assert searcher.contains(numbers(["p00001", "p00002", "q00000", "zz"])).tolist() == [True, False, True, False]
    assert searcher.ids_of(numbers(["q00002", "p00001", "q00002"])) == ["q00002", "p00001", "q00002"]
    for absent in ("zz", "p00002"):  # never there, and deleted
        with pytest.raises(InputError, match="is not in the index"):
            searcher.ids_of(numbers([absent]))


def test_the_index_is_asked_as_its_manifest_says(tmp_path: Path) -> None:
    rng = np.random.default_rng(12)
    shop = Shop(tmp_path, replace(PATIENT, factory="IVF8,SQ8,Refine(SQfp16)", recall_at_10=0.9))
    shop.next(named("p", unit(rng, 500)))
    use = used(shop)
    assert use.search.keys() == {"nprobe", "refine", "trained_nprobe", "trained_refine"}
    assert opened(shop).how == search_of(shop.opened()) == Search(nprobe=use.search["nprobe"], refine=use.search["refine"])
    assert opened(shop, how=ALL).how == ALL
    assert search_of(replace(shop.opened(), indexes={})) == Search()


def test_several_threads_get_the_answers_of_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    shop = Shop(tmp_path, patient(IVF))
    shop.next(named("p", unit(rng, 500)))
    shop.next(delete=[*shop.live][::3])
    searcher, queries, allowed = opened(shop), unit(rng, 40), numbers([*shop.live][::5])

    def ask(at: int) -> list[list[str]]:
        return searcher.search(queries[at : at + 1], 10, allowed=allowed if at % 2 else None).ids

    alone = [ask(at) for at in range(40)]
    with ThreadPoolExecutor(8) as pool:
        assert [*pool.map(ask, range(40))] == alone


@pytest.mark.parametrize("queries", [np.zeros(DIMS), np.zeros((2, DIMS + 1)), np.full((1, DIMS), np.nan)])
def test_impossible_queries_are_refused(tmp_path: Path, queries: Floats) -> None:
    shop = Shop(tmp_path)
    shop.next(named("p", unit(np.random.default_rng(0), 5)))
    with pytest.raises(InputError):
        opened(shop).search(queries, 3)
    with pytest.raises(InputError, match="at least one"):
        opened(shop).search(np.zeros((1, DIMS)), 0)
