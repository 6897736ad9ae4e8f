"""The searcher equals a brute-force model of the live products, whatever the nights before."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.errors import InputError
from pipelines.index.search import SegmentSearcher
from pipelines.index.spec import RefreshOptions
from tests.pipelines.index_nights import DIMS, Floats, Shop, named, numbers, rows, unit, vid_of

FLAT: dict[str, Any] = {"factory": "Flat"}
IVF: dict[str, Any] = {"factory": "IVF8,Flat"}


def patient(**choice: Any) -> RefreshOptions:
    return RefreshOptions(delta_until=1.0, tombstones_until=1.0, max_segments=1000, **choice)


def opened(shop: Shop, **choice: Any) -> SegmentSearcher:
    return SegmentSearcher.open(shop.store, shop.opened(), **choice)


def check(shop: Shop, searcher: SegmentSearcher, queries: Floats, k: int, *, allowed: Sequence[str] | None = None) -> None:
    """Compare with the model: scores as they must be, each product with its own score, none twice, ties allowed."""
    hits = searcher.search(queries, k, allowed=None if allowed is None else numbers(allowed))
    assert hits.vids.shape == hits.scores.shape == (len(queries), k)
    for row, truth in enumerate(shop.truth(queries, allowed=allowed)):
        ids, scores, want = hits.ids[row], hits.scores[row], truth[:k]
        assert len(ids) == len(set(ids)) == len(want)
        np.testing.assert_allclose(scores[: len(want)], [score for score, _ in want], atol=2e-6)
        exact = {name: score for score, name in truth}
        np.testing.assert_allclose(scores[: len(want)], [exact[name] for name in ids], atol=2e-6)
        assert hits.vids[row].tolist() == [vid_of(name) for name in ids] + [-1] * (k - len(want))
        assert np.isneginf(scores[len(want) :]).all()


def random_night(shop: Shop, rng: np.random.Generator, *, size: int) -> None:
    old = rng.permutation(np.array([*shop.live])).tolist()
    gone, changed = old[: size // 3], old[size // 3 : size // 2]
    back = [f"p{number:05d}" for number in rng.integers(0, 900, size // 3) if f"p{number:05d}" not in shop.live]
    fresh = {name: unit(rng, 1)[0] for name in {*back, *(f"n{shop.night}-{at}" for at in range(size // 4))}}
    shop.next(fresh, {name: unit(rng, 1)[0] for name in changed}, gone)


def exhaustive(searcher: SegmentSearcher) -> SegmentSearcher:
    """Visit every list, so that the answer must be exact."""
    for item in searcher._segments:
        object.__setattr__(item.segment.spec, "nprobe", item.segment.spec.nlist)
    return searcher


@pytest.mark.parametrize("choice", [FLAT, IVF], ids=["flat", "ivf"])
def test_search_equals_the_model_after_every_night(tmp_path: Path, choice: dict[str, Any]) -> None:
    rng = np.random.default_rng(7)
    shop = Shop(tmp_path, patient(**choice))
    shop.next(named("p", unit(rng, 600)))
    for _ in range(5):
        random_night(shop, rng, size=90)
        searcher, queries = exhaustive(opened(shop)), unit(rng, 9)
        assert searcher.num_live == len(shop.live)
        assert searcher.all_live_vids().tolist() == sorted(map(vid_of, shop.live))
        for k in (1, 10, len(shop.live) + 3):
            check(shop, searcher, queries, k)
        names = [*shop.live, "never-there", "p00001"]
        for share in (0, 1, 5, 200, 500, len(names)):
            check(shop, searcher, queries[:3], 10, allowed=rng.permutation(np.array(names))[:share].tolist())
    assert len({item.key.split("/")[1] for item in shop.opened().segments}) == 6


@pytest.mark.parametrize("choice", [FLAT, IVF], ids=["flat", "ivf"])
def test_k_live_results_come_back_past_tombstones_that_crowd_the_query(tmp_path: Path, choice: dict[str, Any]) -> None:
    rng = np.random.default_rng(3)
    shop = Shop(tmp_path, patient(**choice))
    shop.next(named("p", unit(rng, 1000)))
    query = unit(rng, 1)
    # The best 95 % for this query go: every answer lies behind all of them, in far lists.
    shop.next(delete=[name for _, name in shop.truth(query)[0][:950]])
    searcher = opened(shop)
    check(shop, searcher, query, 50)
    check(shop, searcher, query, 60)
    found = {len(ids) for ids in searcher.search(unit(rng, 20), 50).ids}
    assert found == {50}


def test_fewer_probes_than_lists_still_bring_k_results(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    shop = Shop(tmp_path, patient(**IVF))
    shop.next(named("p", unit(rng, 400)))
    queries = unit(rng, 30)
    searcher = opened(shop)
    assert searcher._segments[0].segment.spec.nprobe == 2
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
    shop.next(live=rows(products, kind="float16"))
    check(shop, opened(shop), unit(rng, 5).astype(np.float16).astype(np.float32), 10)
    assert opened(shop).search(unit(rng, 2).astype(np.float16), 3).vids.shape == (2, 3)


def test_index_of_an_empty_catalog_answers_nothing(tmp_path: Path) -> None:
    shop = Shop(tmp_path)
    assert shop.next().action == "none"
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
    with pytest.raises(InputError, match="in no segment"):
        searcher.ids_of(numbers(["zz"]))


def test_several_threads_get_the_answers_of_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    shop = Shop(tmp_path, patient(**IVF))
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
