"""The exact answer, and the share of it that was found."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from pipelines.index.probe import exact_scores, exact_top, recall_at
from pipelines.index.segments import Vids
from tests.pipelines.index_nights import Floats, unit

RNG = np.random.default_rng(11)
VECTORS, QUERIES = unit(RNG, 500), unit(RNG, 6)
VIDS = np.sort(RNG.integers(0, 2**62, 500))


def batched(size: int, dtype: Any = np.float32) -> Any:
    def batches() -> Iterator[tuple[Vids, Floats]]:
        for start in range(0, 500, size):
            yield VIDS[start : start + size], VECTORS[start : start + size].astype(dtype)

    return batches


@pytest.mark.parametrize("size", [1, 3, 64, 500])
def test_exact_top_equals_a_sort_of_all_scores(size: int) -> None:
    vids, scores = exact_top(batched(size), QUERIES, 10)
    everything = QUERIES @ VECTORS.T
    np.testing.assert_allclose(scores, -np.sort(-everything, axis=1)[:, :10], atol=1e-6)
    assert vids.tolist() == VIDS[np.argsort(-everything, axis=1)[:, :10]].tolist()
    np.testing.assert_allclose(exact_scores(batched(size), QUERIES, vids), scores, atol=1e-6)


def test_blocks_of_a_large_batch_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = exact_top(batched(500), QUERIES, 10)
    monkeypatch.setattr("pipelines.index.probe._BLOCK_ROWS", 7)
    assert exact_top(batched(500), QUERIES, 10)[0].tolist() == whole[0].tolist()


def test_fewer_products_than_asked_for_leave_gaps() -> None:
    vids, scores = exact_top(lambda: iter([(VIDS[:3], VECTORS[:3])]), QUERIES, 5)
    assert (vids[:, 3:] == -1).all()
    assert np.isneginf(scores[:, 3:]).all()
    assert (recall_at(vids, scores, vids, scores, 5) == 1).all()
    none = exact_top(lambda: iter([]), QUERIES, 5)
    assert (recall_at(*none, *none, 5) == 1).all()


def test_half_precision_is_compared_as_it_is() -> None:
    half = exact_top(batched(64, np.float16), QUERIES, 10)[1]
    np.testing.assert_allclose(half, -np.sort(-(QUERIES @ VECTORS.astype(np.float16).astype(np.float32).T), axis=1)[:, :10], atol=1e-6)


def test_score_of_an_absent_product_is_minus_infinity() -> None:
    assert np.isneginf(exact_scores(batched(100), QUERIES[:1], np.array([[-1, 5]]))).all()


def test_recall_counts_right_answers_once_and_allows_ties() -> None:
    exact_vids, exact = np.array([[1, 2, 3, 4]]), np.array([[0.9, 0.8, 0.7, 0.7]], np.float32)

    def share(vids: list[int], scores: list[float]) -> float:
        return float(recall_at(np.array([vids]), np.array([scores], np.float32), exact_vids, exact, 4)[0])

    assert share([1, 2, 3, 4], [0.9, 0.8, 0.7, 0.7]) == 1
    assert share([1, 2, 3, 9], [0.9, 0.8, 0.7, 0.7]) == 1  # 9 is as good as 4
    assert share([1, 2, 8, 9], [0.9, 0.8, 0.69, 0.69]) == 0.5
    assert share([1, 1, 1, 1], [0.9, 0.9, 0.9, 0.9]) == 0.25
    assert share([1, -1, -1, -1], [0.9, -np.inf, -np.inf, -np.inf]) == 0.25
