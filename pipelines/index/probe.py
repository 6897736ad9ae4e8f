"""How well an index answers: the exact answer by comparing every vector, in bounded memory, and the share of it that was found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.index.segments import Vids

Scores = npt.NDArray[np.float32]
Vectors = Callable[[], Iterator[tuple[Vids, npt.NDArray[np.floating[Any]]]]]
"""Numbers and vectors of all live products, batch by batch, as often as asked for."""

TIE = 1e-6
_BLOCK_ROWS = 16_384


def exact_top(vectors: Vectors, queries: Scores, k: int) -> tuple[Vids, Scores]:
    """Return the `k` best products of each query, best first, ties by number; -1 and -inf where there are fewer."""
    best_vids = np.full((len(queries), k), -1, np.int64)
    best_scores = np.full((len(queries), k), -np.inf, np.float32)
    for vids, block in _blocks(vectors):
        scores = queries @ block.T
        # After the first blocks, few are as good as the worst that is kept.
        rows, at = np.nonzero(scores >= best_scores[:, -1:])
        for row, columns in _by_row(rows, at):
            found, number = np.append(best_scores[row], scores[row, columns]), np.append(best_vids[row], vids[columns])
            good = found >= np.partition(found, -k)[-k]
            found, number = found[good], number[good]
            order = np.lexsort((number, -found))[:k]
            best_scores[row], best_vids[row] = found[order], number[order]
    return best_vids, best_scores


def _by_row(rows: Vids, at: Vids) -> Iterator[tuple[int, Vids]]:
    """Yield each row that has a hit, with its columns; `rows` ascend."""
    numbers, starts = np.unique(rows, return_index=True)
    yield from zip(numbers.tolist(), np.split(at, starts[1:]), strict=True) if len(numbers) else ()


def exact_scores(vectors: Vectors, queries: Scores, vids: Vids) -> Scores:
    """Return the exact score of each product in `vids` (queries x answers) for its query; -inf where it is not among them.

    An index of codes reports scores that are off by its rounding, which must not decide whether an answer is right.
    """
    scores = np.full(vids.shape, -np.inf, np.float32)
    flat = vids.ravel()
    order = np.argsort(flat, kind="stable")
    for numbers, block in _blocks(vectors):
        first = np.searchsorted(flat[order], numbers, side="left")
        last = np.searchsorted(flat[order], numbers, side="right")
        wanted = np.flatnonzero(last > first)
        for row in wanted.tolist():
            cells = order[first[row] : last[row]]
            scores.ravel()[cells] = queries[cells // vids.shape[1]] @ block[row]
    return scores


def recall_at(found_vids: Vids, found_scores: Scores, exact_vids: Vids, exact: Scores, k: int) -> npt.NDArray[np.float64]:
    """Return for each query the share of its `k` exact answers that were found. `found_scores` come from `exact_scores`.

    An answer within 1e-6 of the k-th exact score counts as right: equal texts have equal vectors, and either will do.
    """
    recalls = np.ones(len(exact_vids))
    for row, (wanted, scores) in enumerate(zip(exact_vids[:, :k], exact[:, :k], strict=True)):
        size = int((wanted >= 0).sum())
        if not size:
            continue
        answers, first = np.unique(found_vids[row, :k], return_index=True)
        right = np.isin(answers, wanted[:size]) | (found_scores[row, first] >= scores[size - 1] - TIE)
        recalls[row] = min(size, int(right.sum())) / size
    return recalls


def best(vids: Vids, scores: Scores, k: int) -> tuple[Vids, Scores]:
    """Return the `k` best of each row, best first, ties by number. What has the score -inf comes last."""
    order = np.lexsort((vids, -scores), axis=-1)[:, :k]
    return np.take_along_axis(vids, order, axis=-1), np.take_along_axis(scores, order, axis=-1)


def padded(vids: Vids, scores: Scores, k: int) -> tuple[Vids, Scores]:
    """Fill rows up to `k` answers with -1 and -inf."""
    gap = ((0, 0), (0, k - vids.shape[1]))
    return np.pad(vids, gap, constant_values=-1), np.pad(scores, gap, constant_values=-np.inf)


def _blocks(vectors: Vectors) -> Iterator[tuple[Vids, Scores]]:
    for vids, block in vectors():
        for start in range(0, len(vids), _BLOCK_ROWS):
            end = start + _BLOCK_ROWS
            yield vids[start:end], np.ascontiguousarray(block[start:end], dtype=np.float32)
