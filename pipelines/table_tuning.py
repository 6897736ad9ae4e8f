"""How many partitions a search needs, and how many answers it scores again: the cheapest that keep a promised recall."""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.errors import InputError
from pipelines.index.probe import recall_at
from pipelines.index.tuning import Exam
from pipelines.schema import VID

# Fewer than 5 partitions gave the same answers as 5: told the least number, Lance 14 looks at some more by itself, and at
# all of them where the metric is `dot`.
NPROBES = (5, 10, 20, 40, 80, 160, 320, 640)
REFINES = (1, 2, 4, 8, 16)
# Medians of the same search differ by this much from one measurement to the next; a later rung must gain more.
_NOISE = 0.1
_WARM_UP = 5


class Nearest(Protocol):
    """What is tuned: `TableSearcher.nearest`, or anything that answers like it."""

    def __call__(self, vector: npt.NDArray[np.floating], k: int, *, nprobes: int, refine: int) -> pa.Table:
        """Return the numbers of the answers, in a table."""
        ...


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The parameters chosen, what they gave on the held-out queries, and whether that is what was asked for."""

    nprobes: int
    refine: int
    recall: float
    p50_ms: float
    reached: bool


def tune(
    nearest: Nearest,
    exam: Exam,
    *,
    target: float,
    margin: float = 0.01,
    nprobes: Sequence[int] = NPROBES,
    refines: Sequence[int] = REFINES,
    clock: Callable[[], float] = time.perf_counter,
) -> Tuning:
    """Return the fastest of a ladder of parameters whose recall is `target` and a margin; else the best there is, unreached.

    Recall grows with both parameters, so for each `refine` only the fewest partitions that suffice are of interest. Of
    those, one is preferred to an earlier one where it is a tenth faster at least.
    """
    if not len(exam.queries) or not len(nprobes) or not len(refines):
        raise InputError(f"nothing to tune with: {len(exam.queries)} queries, {len(nprobes)} nprobes, {len(refines)} refines. Give some.")
    wanted = min(1.0, target + margin)
    seen: dict[tuple[int, int], Tuning] = {}

    def tried(probes: int, refine: int) -> Tuning:
        if (probes, refine) not in seen:
            recall, p50_ms = _measured(nearest, exam, probes, refine, clock)
            seen[probes, refine] = Tuning(nprobes=probes, refine=refine, recall=recall, p50_ms=p50_ms, reached=recall >= wanted)
        return seen[probes, refine]

    ladder = sorted(nprobes)
    chosen: Tuning | None = None
    for rung in _enough(tried, ladder, sorted(refines)):
        if chosen is None or rung.p50_ms < (1 - _NOISE) * chosen.p50_ms:
            chosen = rung
    return chosen or max(seen.values(), key=lambda rung: (rung.recall, -rung.p50_ms))


def _enough(tried: Callable[[int, int], Tuning], ladder: Sequence[int], refines: Sequence[int]) -> Iterator[Tuning]:
    """Yield the fewest partitions that suffice, for the smallest `refine` that can, then for each that saves some more."""
    able = next((refine for refine in refines if tried(ladder[-1], refine).reached), None)
    if able is None:
        return
    at = bisect.bisect_left(ladder, x=True, key=lambda probes: tried(probes, able).reached)
    yield tried(ladder[at], able)
    for refine in refines[refines.index(able) + 1 :]:
        before = at
        while at and tried(ladder[at - 1], refine).reached:
            at -= 1
        if at < before:
            yield tried(ladder[at], refine)


def _measured(nearest: Nearest, exam: Exam, nprobes: int, refine: int, clock: Callable[[], float]) -> tuple[float, float]:
    """Return the mean recall and the median milliseconds of a search."""
    k = exam.vids.shape[1]
    for query in exam.queries[:_WARM_UP]:
        nearest(query, k, nprobes=nprobes, refine=refine)
    found = np.full(exam.vids.shape, -1, np.int64)
    seconds = []
    for row, query in enumerate(exam.queries):
        begin = clock()
        answers = nearest(query, k, nprobes=nprobes, refine=refine)
        seconds.append(clock() - begin)
        found[row, : answers.num_rows] = answers.column(VID).to_numpy()
    recalls = recall_at(found, exam.score_of(found), exam.vids, exam.scores, k)
    return float(recalls.mean()), float(np.median(seconds)) * 1e3
