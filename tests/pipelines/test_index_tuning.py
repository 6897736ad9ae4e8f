from __future__ import annotations

from functools import partial
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pytest

from pipelines.errors import InputError
from pipelines.index.choosing import predicted_ms
from pipelines.index.spec import IndexSpec, Search
from pipelines.index.tuning import Ask, Exam, border, recall_of, tune
from tests.pipelines.index_nights import unit

DIMS, ROWS, HELD = 32, 4_000, 128
Floats = npt.NDArray[np.float32]
Numbers = npt.NDArray[np.int64]


def exam_of(vectors: Floats, queries: Floats) -> Exam:
    scores, vids = faiss.knn(queries, vectors, 10, metric=faiss.METRIC_INNER_PRODUCT)
    return Exam(queries=queries, vids=vids, scores=scores, score_of=partial(scored, vectors, queries))


def scored(vectors: Floats, queries: Floats, vids: Numbers) -> Floats:
    scores = np.einsum("qd,qkd->qk", queries, vectors[np.maximum(vids, 0)])
    return np.where(vids >= 0, scores, -np.inf).astype(np.float32)


class Index:
    """A FAISS index of random clusters, asked as a catalog's index is, which counts how often."""

    def __init__(self, factory: str, vectors: Floats) -> None:
        self.spec = IndexSpec(factory=factory, dims=vectors.shape[1])
        self.asked = 0
        faiss.omp_set_num_threads(1)
        index: Any = faiss.index_factory(self.spec.dims, self.spec.template, faiss.METRIC_INNER_PRODUCT)
        if self.spec.parts:
            index.pq.cp.niter = 4
        index.train(vectors)
        index.add(vectors)
        self.index = index
        self.finer = faiss.IndexFlatIP(self.spec.dims)
        self.finer.add(vectors)

    @property
    def centroids(self) -> Floats | None:
        found: Floats = self.index.quantizer.reconstruct_n(0, self.spec.nlist)
        return found

    def ask(self, queries: Floats, k: int, how: Search) -> tuple[Numbers, Floats]:
        self.asked += 1
        if self.spec.nlist is None:
            scores, vids = self.index.search(queries, k)
            return vids, scores
        lists: Any = faiss.SearchParametersIVF
        params = lists(nprobe=how.nprobe)
        if self.spec.refine is None:
            scores, vids = self.index.search(queries, k, params=params)
            return vids, scores
        refined: Any = faiss.IndexRefineSearchParameters
        both = refined(k_factor=float(how.refine), base_index_params=params)
        scores, vids = faiss.IndexRefine(self.index, self.finer).search(queries, k, params=both)
        return vids, scores


@pytest.fixture(scope="module")
def vectors() -> Floats:
    return unit(np.random.default_rng(0), ROWS + HELD, DIMS)


@pytest.fixture(scope="module")
def lists(vectors: Floats) -> Index:
    return Index("IVF64,Flat", vectors[:ROWS])


@pytest.fixture(scope="module")
def coarse(vectors: Floats) -> Index:
    return Index("IVF64,PQ8x4fs,Refine(SQfp16)", vectors[:ROWS])


@pytest.fixture(scope="module")
def exam(vectors: Floats) -> Exam:
    return exam_of(vectors[:ROWS], vectors[ROWS:])


def tuned_of(index: Index, exam: Exam, target: float, **limits: Any) -> Any:
    return tune(index.ask, exam, spec=index.spec, n=ROWS, target=target, **limits)


@pytest.mark.parametrize("target", [0.5, 0.8, 0.9, 0.97, 0.99])
def test_the_cheapest_rung_that_reaches_target_and_margin_is_found(lists: Index, exam: Exam, target: float) -> None:
    found = tuned_of(lists, exam, target, margin=0.005)
    assert found.reached
    assert found.obstacle is None
    assert found.recall == recall_of(lists.ask, exam, found.search) >= found.goal == target + 0.005
    cheaper = Search(nprobe=int(found.search.nprobe / 2**0.25) or 1)
    assert found.search.nprobe == 1 or recall_of(lists.ask, exam, cheaper) < found.goal


@pytest.mark.parametrize("target", [0.0, 0.5, 0.9, 0.97, 0.999, 1.0])
@pytest.mark.parametrize("kind", ["lists", "coarse"])
def test_tuning_takes_at_most_twelve_searches_and_gives_the_same_again(
    request: pytest.FixtureRequest, exam: Exam, kind: str, target: float
) -> None:
    index: Index = request.getfixturevalue(kind)
    index.asked = 0
    first = tuned_of(index, exam, target)
    assert 1 <= index.asked == len(first.trials) <= 12
    assert tuned_of(index, exam, target) == first
    assert first.reached


def test_flat_needs_one_search_and_finds_all(vectors: Floats, exam: Exam) -> None:
    found = tuned_of(Index("Flat", vectors[:ROWS]), exam, 0.97)
    assert (len(found.trials), found.search, found.recall) == (1, Search(), 1.0)


def test_no_search_that_was_tried_and_reached_the_goal_is_cheaper(coarse: Index, exam: Exam) -> None:
    for target in (0.8, 0.9, 0.95):
        found = tuned_of(coarse, exam, target)
        assert found.reached
        assert found.search.refine > 1
        enough = [trial.search for trial in found.trials if trial.recall >= found.goal]
        assert found.search == min(enough, key=lambda search: predicted_ms(coarse.spec, ROWS, search))
        # Another number of candidates was tried as well: lists and candidates are traded for each other.
        assert len({trial.search.refine for trial in found.trials}) > 1


def test_codes_that_are_too_coarse_are_named_without_visiting_every_list_again_and_again(vectors: Floats, exam: Exam) -> None:
    index = Index("IVF64,PQ4x4fs", vectors[:ROWS])
    found = tuned_of(index, exam, 0.97)
    assert not found.reached
    assert found.obstacle == "codes"
    assert "too coarse" in found.reason
    assert "IVF64,PQ4x4fs" in found.reason
    assert index.asked <= 5
    assert found.recall == max(trial.recall for trial in found.trials)


def test_a_limit_is_kept_and_named(lists: Index, exam: Exam) -> None:
    free = tuned_of(lists, exam, 0.97)
    found = tuned_of(lists, exam, 0.97, at_most=Search(nprobe=free.search.nprobe // 4))
    assert all(trial.search.nprobe <= free.search.nprobe // 4 for trial in found.trials)
    assert not found.reached
    assert found.obstacle == "limit"
    assert tuned_of(lists, exam, 0.97, at_most=free.search).reached


def test_a_missed_margin_is_not_a_missed_target(lists: Index, exam: Exam) -> None:
    free = tuned_of(lists, exam, 0.9, margin=0.0)
    found = tuned_of(lists, exam, 0.9, margin=0.09, at_most=free.search)
    assert found.reached
    assert found.obstacle is not None
    assert found.recall < found.goal


def test_equal_vectors_are_as_good_as_the_exact_answers(vectors: Floats) -> None:
    twice = np.concatenate([np.repeat(vectors[:300], 12, axis=0), vectors[300:700]])
    exam = exam_of(twice, vectors[:100])
    turned = exam.vids.copy()
    # Other twelfths of the same vector than the exact search chose.
    turned[:] = np.arange(100)[:, None] * 12 + np.arange(11, 1, -1)
    answers: Ask = lambda queries, k, search: (turned, np.zeros(turned.shape, np.float32))  # noqa: ARG005, E731
    assert recall_of(answers, exam, Search()) == 1.0
    wrong = np.full_like(turned, 3_600 + 399)
    assert recall_of(lambda *_: (wrong, np.zeros(wrong.shape, np.float32)), exam, Search()) == 0.0


def test_gaps_are_never_scored(vectors: Floats, exam: Exam) -> None:
    gaps = np.full((HELD, 10), -1)
    strict = Exam(queries=exam.queries, vids=exam.vids, scores=exam.scores, score_of=lambda _: pytest.fail("nothing is to be scored"))
    assert recall_of(lambda *_: (gaps, np.zeros(gaps.shape, np.float32)), strict, Search()) == 0.0
    assert recall_of(lambda *_: (exam.vids, exam.scores), strict, Search()) == 1.0


def test_an_exam_without_queries_is_refused(exam: Exam) -> None:
    with pytest.raises(InputError, match="cannot be held"):
        Exam(queries=exam.queries[:0], vids=exam.vids[:0], scores=exam.scores[:0], score_of=exam.score_of)
    with pytest.raises(InputError, match="cannot be held"):
        Exam(queries=exam.queries, vids=exam.vids[:5], scores=exam.scores[:5], score_of=exam.score_of)


def test_border_vectors_have_length_one_and_are_the_same_again(vectors: Floats, lists: Index) -> None:
    held = vectors[ROWS:]
    before = held.copy()
    moved = border(held, lists.centroids)
    assert moved.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(moved, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(moved, border(held, lists.centroids))
    np.testing.assert_array_equal(held, before)
    assert (np.abs(moved - held).max(axis=1) > 0).all()


def test_border_vectors_are_harder_than_the_products_they_come_from(vectors: Floats, lists: Index) -> None:
    held = vectors[ROWS:]
    moved = border(held, lists.centroids)
    for nprobe in (2, 4, 8):
        search = Search(nprobe=nprobe)
        plain = recall_of(lists.ask, exam_of(vectors[:ROWS], held), search)
        assert recall_of(lists.ask, exam_of(vectors[:ROWS], moved), search) < plain


@pytest.mark.parametrize("centroids", [None, np.eye(3, DIMS, dtype=np.float32)])
def test_border_vectors_without_groups_are_the_products(vectors: Floats, centroids: Floats | None) -> None:
    np.testing.assert_array_equal(border(vectors[:5].astype(np.float64).astype(np.float32), centroids), vectors[:5])
