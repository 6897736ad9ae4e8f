"""How an index is asked: the cheapest search that finds enough for held-out vectors, found with few searches and no clock."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import faiss
import numpy as np

from pipelines.errors import InputError
from pipelines.index.choosing import REFINES, first_search, goal_of, predicted_ms
from pipelines.index.lists import one_thread
from pipelines.index.probe import Scores, recall_at
from pipelines.index.segments import Vids
from pipelines.index.spec import IndexSpec, Search

Ask = Callable[[Scores, int, Search], tuple[Vids, Scores]]
"""Answers of an index: queries, how many are wanted, how it is asked; numbers (-1 where there are fewer) and scores."""
Obstacle = Literal["codes", "lists", "limit"]

# Shoppers' queries lie between the groups of products, where few of their answers share a list; held-out products lie
# inside. Measured with 64 to 2,048 lists over 12,500 to 100,000 products (all-MiniLM-L6-v2), as the probes that .95 to
# .99 take against those that 2,000 real queries take: products .3, border vectors of 16 groups .6 to 1.4, centre 1.0.
# Steps towards the second nearest list instead fall to .4 as lists get many.
_GROUPS, _STEP = 16, 0.7
# One grouping can be unlucky: every other vector takes the second.
_SEEDS = (1, 2)
# A doubling of the lists that adds less than this adds nothing.
_STILL = 0.002
# Numbers of lists that are tried: a fifth apart.
_RUNGS_A_DOUBLING = 4
# As many searches of all queries at most.
_MOST_TRIALS = 12
_ANSWERS = 10
_Z95 = 1.96


@dataclass(frozen=True, kw_only=True)
class Exam:
    """Queries with their exact answers, best first, and the exact score of any other product for its query.

    `score_of` takes numbers, a row per query, -1 where there is nothing to score, and returns scores, -inf for an unknown
    product. It is asked only about answers that are not among the exact ones: they may be ties.
    """

    queries: Scores
    vids: Vids
    scores: Scores
    score_of: Callable[[Vids], Scores]

    def __post_init__(self) -> None:
        if not len(self.queries) or len(self.queries) != len(self.vids) or self.vids.shape != self.scores.shape:
            raise InputError(
                f"an exam of {len(self.queries)} queries with answers {self.vids.shape} and scores {self.scores.shape} cannot be "
                "held. Give at least one query, and an exact answer and its score for each."
            )


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One search of all queries: how the index was asked, and the mean share of exact answers that it found."""

    search: Search
    recall: float
    error: float


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """The cheapest search that reached the goal, or the best that was found, with everything that was tried.

    `goal` is the target and its margin, `recall` and `error` (half of the 95 % interval) are what the held-out vectors
    saw. `reached` says whether `recall` reached at least the target. Where it missed the goal, `obstacle` says why: `codes`
    are too coarse, and more lists do not help; `lists`: recall still rose as the last ones were visited; `limit`: it
    still rose at the most that was allowed, or at the last of twelve searches.
    """

    search: Search
    recall: float
    error: float
    target: float
    goal: float
    reached: bool
    obstacle: Obstacle | None
    reason: str
    predicted_ms: float
    trials: tuple[Trial, ...]


def border(vectors: Scores, centroids: Scores | None) -> Scores:
    """Move held-out products to where shoppers ask from: out of their group of products, towards the next one.

    Without that, what a search is tuned to on products disappoints shoppers: at the probes that find .97 for held-out
    products, real queries found .92 (100,000 products, 1,024 lists). The centroids are gathered into a few groups; a vector moves by a part of the way from the centre of its own to that
    of the next nearest. Without centroids, or with too few, the vectors come back. Deterministic; float32, length one.
    """
    vectors = np.ascontiguousarray(vectors, np.float32)
    groups = 0 if centroids is None else min(_GROUPS, len(centroids) // 2)
    if centroids is None or groups < 2 or not len(vectors):  # noqa: PLR2004 - a next group takes two
        return vectors
    moved = vectors.copy()
    for turn, seed in enumerate(_SEEDS):
        means = faiss.Kmeans(centroids.shape[1], groups, niter=20, spherical=True, seed=seed, min_points_per_centroid=1)
        with one_thread():
            means.train(np.ascontiguousarray(centroids, np.float32))
        assert means.centroids is not None
        rows = slice(turn, None, len(_SEEDS))
        _, nearest = faiss.knn(vectors[rows], means.centroids, 2, metric=faiss.METRIC_INNER_PRODUCT)
        moved[rows] += np.float32(_STEP) * (means.centroids[nearest[:, 1]] - means.centroids[nearest[:, 0]])
    lengths = np.linalg.norm(moved, axis=1, keepdims=True)
    return np.where(lengths > 0, moved / np.maximum(lengths, np.finfo(np.float32).tiny), vectors).astype(np.float32)


def recall_of(ask: Ask, exam: Exam, search: Search) -> float:
    """Return the mean share of the ten exact answers that an index finds when it is asked so. Ties count as found."""
    return _trial(ask, exam, search).recall


def tune(
    ask: Ask, exam: Exam, *, spec: IndexSpec, n: int, target: float, margin: float | None = None, at_most: Search | None = None
) -> Tuned:
    """Return the cheapest search of `n` entries that finds `target` and a margin of the exact answers, by counted work.

    Recall is taken to rise with the lists visited and with the answers scored again; noise can break that by a few answers,
    and then the result is a fifth dearer than it could be. At most twelve searches. The same index gives the same result.
    """
    goal = goal_of(spec, target) if margin is None else min(1.0, target + margin)
    ladder = _Ladder(ask, exam, spec=spec, n=n, goal=goal, at_most=at_most)
    obstacle = ladder.climb()
    if obstacle is None:
        ladder.descend()
        ladder.trade()
    enough = [trial for trial in ladder.trials if trial.recall >= goal]
    if not enough:
        # Noise of a few answers must not choose a search of many times the work.
        most = max(trial.recall for trial in ladder.trials)
        enough = [trial for trial in ladder.trials if trial.recall >= target] or [t for t in ladder.trials if t.recall >= most]
    best = min(enough, key=lambda trial: predicted_ms(spec, n, trial.search))
    return Tuned(
        search=best.search,
        recall=best.recall,
        error=best.error,
        target=target,
        goal=goal,
        reached=best.recall >= target,
        obstacle=obstacle,
        reason=_reason(spec, best, target=target, goal=goal, obstacle=obstacle),
        predicted_ms=predicted_ms(spec, n, best.search),
        trials=tuple(ladder.trials),
    )


class _Ladder:
    """The searches of an index, from cheap to dear, and what those that were tried have found."""

    def __init__(self, ask: Ask, exam: Exam, *, spec: IndexSpec, n: int, goal: float, at_most: Search | None) -> None:
        self.trials: list[Trial] = []
        self._ask, self._exam, self._spec, self._n, self._goal = ask, exam, spec, n, goal
        nlist = spec.nlist or 1
        most = min(nlist, at_most.nprobe) if at_most else nlist
        doublings = range(math.ceil(math.log2(most)) * _RUNGS_A_DOUBLING + 1)
        self._probes = sorted({min(most, round(2 ** (rung / _RUNGS_A_DOUBLING))) for rung in doublings})
        dearest = at_most.refine if at_most else REFINES[-1]
        self._refines = [refine for refine in REFINES if refine <= dearest or refine == 1] if spec.refine else [1]
        self._limited = most < nlist
        first = first_search(spec, n, goal)
        self._at = self._rung(first.nprobe), max(at for at, refine in enumerate(self._refines) if refine <= first.refine)
        self._known: dict[tuple[int, int], Trial] = {}

    def climb(self) -> Obstacle | None:
        """Visit twice the lists, or score more answers again where lists no longer help, until the goal is reached."""
        (probe, refine), below = self._at, float("nan")
        while not self._reaches(probe, refine):
            found = self._known[probe, refine].recall
            rise, doublings = found - below, math.log2(self._probes[-1] / self._probes[probe])
            # Each doubling adds less than the one before: if all that are left bring no more than this one, lists cannot.
            hopeless = doublings == 0 or rise * doublings < self._goal - found
            if (hopeless and refine == len(self._refines) - 1) or len(self.trials) == _MOST_TRIALS:
                return self._obstacle(rise, ended=doublings == 0, hopeless=hopeless)
            if hopeless:
                refine, below = refine + 1, float("nan")
            else:
                probe, below = self._rung(round(1.9 * self._probes[probe])), found
        self._at = probe, refine
        return None

    def descend(self) -> None:
        """Halve the lists until the goal is missed, then cut the last step in two until it is one rung."""
        high, refine = self._at
        missed = [at for (at, known), trial in self._known.items() if known == refine and at < high and trial.recall < self._goal]
        low = max(missed, default=-1)
        while low < 0 < high and len(self.trials) < _MOST_TRIALS:
            probe = max(high - _RUNGS_A_DOUBLING, 0)
            low, high = (low, probe) if self._reaches(probe, refine) else (probe, high)
        while high - low > 1 and len(self.trials) < _MOST_TRIALS:
            middle = (low + high) // 2
            low, high = (low, middle) if self._reaches(middle, refine) else (middle, high)
        self._at = high, refine

    def trade(self) -> None:
        """Score fewer answers again for more lists, or more answers for fewer lists, while that costs less."""
        moved = True
        while moved and len(self.trials) < _MOST_TRIALS:
            probe, refine = self._at
            moves = [
                (probe, refine - 1),
                (probe + 1, refine - 1),
                (probe + 2, refine - 1),
                (probe - 2, refine + 1),
                (probe - 1, refine + 1),
            ]
            moved = False
            for move in moves:
                if len(self.trials) < _MOST_TRIALS and self._promises(*move) and self._reaches(*move):
                    self._at, moved = move, True
                    break

    def _promises(self, probe: int, refine: int) -> bool:
        """Say whether a search is cheaper than the best one, and no dearer one is known to miss the goal."""
        if not (0 <= probe < len(self._probes) and 0 <= refine < len(self._refines)) or self._cost(probe, refine) >= self._cost(*self._at):
            return False
        missed = [at for at, trial in self._known.items() if trial.recall < self._goal]
        return not any(probe <= p and refine <= r for p, r in missed)

    def _reaches(self, probe: int, refine: int) -> bool:
        if (probe, refine) not in self._known:
            self._known[probe, refine] = _trial(self._ask, self._exam, self._search(probe, refine))
            self.trials.append(self._known[probe, refine])
        return self._known[probe, refine].recall >= self._goal

    def _search(self, probe: int, refine: int) -> Search:
        return Search(nprobe=self._probes[probe], refine=self._refines[refine])

    def _cost(self, probe: int, refine: int) -> float:
        return predicted_ms(self._spec, self._n, self._search(probe, refine))

    def _rung(self, nprobe: int) -> int:
        """Return the first rung with at least so many lists, or the last."""
        return next((at for at, probes in enumerate(self._probes) if probes >= nprobe), len(self._probes) - 1)

    def _obstacle(self, rise: float, *, ended: bool, hopeless: bool) -> Obstacle:
        if not hopeless or (ended and self._limited):
            return "limit"
        return "lists" if ended and rise > _STILL else "codes"


def _trial(ask: Ask, exam: Exam, search: Search) -> Trial:
    """Ask all queries, and score what is not among the exact answers: it may be a tie."""
    found, _ = ask(exam.queries, _ANSWERS, search)
    other = np.array([~np.isin(row, exact[:_ANSWERS]) for row, exact in zip(found, exam.vids, strict=True)]) & (found >= 0)
    scores = np.full(found.shape, -np.inf, np.float32)
    if other.any():
        scores[other] = exam.score_of(np.where(other, found, -1))[other]
    recalls = recall_at(found, scores, exam.vids, exam.scores, _ANSWERS)
    return Trial(search=search, recall=float(recalls.mean()), error=float(_Z95 * recalls.std() / math.sqrt(len(recalls))))


def _reason(spec: IndexSpec, best: Trial, *, target: float, goal: float, obstacle: Obstacle | None) -> str:
    """Say in words what was found, and what stands in the way of more."""
    again = f", {best.search.refine} candidates an answer scored again" if spec.refine else ""
    words = f"recall {best.recall:.4f} (+-{best.error:.4f}) on held-out vectors at {best.search.nprobe} of {spec.nlist or 1} lists{again}"
    if obstacle is None:
        return f"{words}; asked was {target:g} and a margin, {goal:.4f}"
    lacks = {
        "codes": f"more lists do not help, the codes of {spec.factory} are too coarse",
        "lists": "it still rose as the last list was visited",
        "limit": "it still rose at the most that was allowed to be visited or tried",
    }[obstacle]
    return f"{words}; {target:g} and a margin, {goal:.4f}, was missed: {lacks}"
