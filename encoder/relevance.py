"""From a score to the probability that a product is relevant, and that it has the best grade: an isotonic curve for a tower.

The errors that an artifact states were measured on queries that its curve had not seen. Axes: N judged pairs, U different
scores, B blocks of a fit.
"""

# ruff: noqa: N803, N806 - arrays carry their shape in their names

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from encoder.errors import EncoderError
from encoder.examples import JUDGMENTS, Grades, conform

Floats: TypeAlias = npt.NDArray[np.float64]
Mask: TypeAlias = npt.NDArray[np.bool_]

FORMAT_VERSION = 1

_FILE = "relevance.json"


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """How much evidence a curve of its own needs, and how its error is measured."""

    min_pairs: int = 1_000
    min_outcomes: int = 50  # of either kind: with fewer, the steep part of the curve is guesswork
    folds: int = 5
    bins: int = 15

    def __post_init__(self) -> None:
        if min(self.min_pairs, self.min_outcomes, self.bins) < 1 or self.folds < 2:  # noqa: PLR2004  one to fit, one to measure
            raise EncoderError(f"{self} cannot be. Give min_pairs, min_outcomes and bins from 1, and folds from 2.")


@dataclass(frozen=True)
class Curve:
    """A probability that never falls as the score rises: straight between knots, flat outside them."""

    scores: tuple[float, ...]
    probabilities: tuple[float, ...]

    def __post_init__(self) -> None:
        numbers = (*self.scores, *self.probabilities)
        whole = len(self.scores) == len(self.probabilities) > 0 and all(
            isinstance(number, float) and math.isfinite(number) for number in numbers
        )
        rises = whole and all(low < high for low, high in zip(self.scores, self.scores[1:], strict=False))
        if not rises or list(self.probabilities) != sorted(self.probabilities) or self.probabilities[0] < 0 or self.probabilities[-1] > 1:
            raise EncoderError(
                "A curve needs finite, rising scores, and probabilities from 0 to 1 that never fall. Fit it with `calibrate`."
            )

    def __call__(self, scores: npt.ArrayLike) -> Floats:
        """Return the probability at each score."""
        return np.interp(np.asarray(scores, np.float64), self.scores, self.probabilities)

    def score_at(self, probability: float) -> float | None:
        """Return the lowest score whose probability reaches this one; None if none does. Below it lies what pruning takes away."""
        knots = np.array(self.probabilities)
        right = int(np.searchsorted(knots, probability))
        if right == len(knots):
            return None
        if right == 0 or knots[right] == probability:
            return self.scores[right]
        share = (probability - knots[right - 1]) / (knots[right] - knots[right - 1])
        return self.scores[right - 1] + float(share) * (self.scores[right] - self.scores[right - 1])


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A curve and how far it is off on queries that it had not seen: `ece` over bins of equal mass, and Brier's score."""

    curve: Curve
    rate: float
    ece: float
    brier: float


@dataclass(frozen=True, kw_only=True)
class Stratum:
    """What is known of all pairs, or of a vertical or locale. Without curves of its own it says why, and the overall ones hold."""

    kind: str
    name: str
    pairs: int
    queries: int
    relevant: Fit | None
    best: Fit | None
    fallback: str


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The curves of one tower, from one set of judgments. The first stratum is all pairs together."""

    tower: str
    judgments: str
    grades: Grades
    strata: tuple[Stratum, ...]

    def __post_init__(self) -> None:
        names = [(stratum.kind, stratum.name) for stratum in self.strata]
        own = all((stratum.relevant is None) == (stratum.best is None) == bool(stratum.fallback) for stratum in self.strata)
        if not names or names[0] != ("overall", "") or len(set(names)) < len(names) or not own or self.strata[0].relevant is None:
            raise EncoderError("A calibration begins with the curves of all pairs, and names each stratum once. Make it with `calibrate`.")

    def stratum(self, kind: str = "overall", name: str = "") -> Stratum:
        """Return the stratum whose curves hold for a vertical or locale: its own, or the overall one."""
        found = [item for item in self.strata if (item.kind, item.name) == (kind, name) and not item.fallback]
        return found[0] if found else self.strata[0]

    def probabilities(self, scores: npt.ArrayLike, *, kind: str = "overall", name: str = "") -> tuple[Floats, Floats]:
        """Return P(relevant) and P(best grade) at each score; the second is never above the first."""
        stratum = self.stratum(kind, name)
        assert stratum.relevant is not None
        assert stratum.best is not None
        relevant = stratum.relevant.curve(scores)
        return relevant, np.minimum(stratum.best.curve(scores), relevant)  # in exact arithmetic it never is above; rounding could

    def weights(self, scores: npt.ArrayLike, *, partial: float = 0.1, kind: str = "overall", name: str = "") -> Floats:
        """Return the expected gain, from 0 to 1, to blend with other signals: 1 for the best grade, `partial` for other relevant ones."""
        if not 0 <= partial <= 1:
            raise EncoderError(f"partial is {partial}. Give the gain of a relevant product, from 0 to 1.")
        relevant, best = self.probabilities(scores, kind=kind, name=name)
        return best + partial * (relevant - best)

    def to_json(self) -> bytes:
        """Return the canonical bytes: equal calibrations are equal bytes."""
        tree = {"format_version": FORMAT_VERSION, **asdict(self)}
        return json.dumps(tree, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n"

    @classmethod
    def from_json(cls, data: bytes) -> Calibration:
        """Read what `to_json` wrote, to the byte; whatever else is refused."""
        try:
            tree = json.loads(data.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise EncoderError(f"{_FILE} is not readable as JSON: {str(error)[:200]}. Calibrate again.") from error
        version = tree.get("format_version") if isinstance(tree, dict) else None
        if version != FORMAT_VERSION:
            found = str(version)[:40]
            raise EncoderError(f"{_FILE}: format_version is {found!r}, this version reads {FORMAT_VERSION}: upgrade, or calibrate again.")
        try:
            grades = Grades(names=tuple(tree["grades"]["names"]), positive=tree["grades"]["positive"])
            strata = tuple(_stratum(item) for item in tree["strata"])
            read = cls(tower=str(tree["tower"]), judgments=str(tree["judgments"]), grades=grades, strata=strata)
            same = read.to_json() == data
        except (KeyError, TypeError, ValueError, AttributeError, EncoderError) as error:
            raise EncoderError(f"{_FILE} cannot be read: {str(error)[:200]}. Calibrate again.") from error
        if not same:
            raise EncoderError(f"{_FILE} is not as `to_json` writes it: it is damaged or was edited. Calibrate again.")
        return read


def isotonic(scores_N: Floats, targets_N: Floats, weights_N: Floats | None = None) -> Curve:
    """Return the rising curve with the least squared error: pool adjacent violators, equal scores first."""
    scores_U, row_N = np.unique(np.asarray(scores_N, np.float64), return_inverse=True)
    weights_N = np.ones(len(scores_N)) if weights_N is None else np.asarray(weights_N, np.float64)
    if not len(scores_U) or not (np.isfinite(scores_U).all() and (weights_N > 0).all()):
        raise EncoderError(f"{len(scores_N)} pairs cannot be fitted. Give at least one, with finite scores and weights above 0.")
    weight_U = np.bincount(row_N, weights_N)
    mean_U = np.bincount(row_N, weights_N * targets_N) / weight_U
    means: list[float] = []
    masses: list[float] = []
    ends: list[int] = []
    for number, (mean, mass) in enumerate(zip(mean_U.tolist(), weight_U.tolist(), strict=True)):
        while means and means[-1] >= mean:
            last, weight = means.pop(), masses.pop()
            ends.pop()
            mean, mass = (last * weight + mean * mass) / (weight + mass), weight + mass  # noqa: PLW2901  the pooled block
        means.append(mean)
        masses.append(mass)
        ends.append(number)
    begins = [0, *(end + 1 for end in ends[:-1])]
    knots = {place: min(max(mean, 0.0), 1.0) for mean, begin, end in zip(means, begins, ends, strict=True) for place in (begin, end)}
    return Curve(tuple(scores_U[list(knots)].tolist()), tuple(knots.values()))


def calibrate(
    scores_N: npt.ArrayLike,
    judgments: pa.Table,
    *,
    tower: str,
    grades: Grades | None = None,
    verticals: Sequence[str] | None = None,
    options: CalibrationOptions | None = None,
) -> Calibration:
    """Fit the curves of all judged pairs, of each locale, and of each vertical (one name a pair, "" for none)."""
    grades, options = grades or Grades(), options or CalibrationOptions()
    judgments = conform(judgments, JUDGMENTS, "judgments")
    scores_N = np.asarray(scores_N, np.float64)
    if len(scores_N) != len(judgments) or not len(judgments) or not np.isfinite(scores_N).all():
        raise EncoderError(
            f"{len(scores_N)} scores for {len(judgments)} judged pairs. Give one finite score for each, and at least one pair."
        )
    if verticals is not None and len(verticals) != len(judgments):
        raise EncoderError(f"{len(verticals)} verticals for {len(judgments)} judged pairs. Give one for each, or none.")
    kinds: dict[str, Sequence[str]] = {"locale": judgments["locale"].to_pylist(), "vertical": verticals or ()}
    pairs = _Pairs(scores_N, judgments["grade"].to_numpy(), np.array(judgments["query_id"].to_pylist(), dtype=np.str_), grades)
    strata = [_fitted("overall", "", pairs, np.ones(len(scores_N), bool), options)]
    if strata[0].relevant is None:
        raise EncoderError(f"The judgments are too few to calibrate with: {strata[0].fallback}. Judge more pairs, or ask for less.")
    for kind, names in kinds.items():
        column = np.array(names, dtype=np.str_)
        strata += [_fitted(kind, name, pairs, column == name, options) for name in sorted(set(names) - {""})]
    return Calibration(tower=tower, judgments=judgments_digest(judgments), grades=grades, strata=tuple(strata))


def judgments_digest(judgments: pa.Table) -> str:
    """Return the sha256 of judgments, whatever their order and chunks."""
    rows = sorted(json.dumps(list(row.values()), ensure_ascii=True) for row in conform(judgments, JUDGMENTS, "judgments").to_pylist())
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def calibration_error(probabilities_N: Floats, outcomes_N: Floats, bins: int) -> float:
    """Return the mean distance of probability and outcome over bins of equal mass; equal probabilities stay in one bin."""
    edges = np.unique(np.quantile(probabilities_N, np.linspace(0, 1, bins + 1)[1:-1], method="inverted_cdf"))
    bin_N = np.searchsorted(edges, probabilities_N, side="left")
    return float(np.abs(np.bincount(bin_N, probabilities_N - outcomes_N)).sum() / len(outcomes_N))


def precision_threshold(scores_N: npt.ArrayLike, relevant_N: npt.ArrayLike, target: float) -> float | None:
    """Return the lowest score such that, of the pairs at or above it, so large a share is relevant; None if no score does it."""
    scores, relevant = np.asarray(scores_N, np.float64), np.asarray(relevant_N, np.float64)
    order = np.argsort(-scores, kind="stable")
    precision = np.cumsum(relevant[order]) / np.arange(1, len(order) + 1)
    last = np.diff(scores[order], append=-np.inf) < 0  # equal scores are cut together
    reached = np.flatnonzero((precision >= target) & last)
    return float(scores[order][reached[-1]]) if reached.size else None


@dataclass(frozen=True, eq=False)
class _Pairs:
    scores: Floats
    grade: npt.NDArray[np.int8]
    query: npt.NDArray[np.str_]
    grades: Grades


def _fitted(kind: str, name: str, pairs: _Pairs, chosen_N: Mask, options: CalibrationOptions) -> Stratum:
    """Fit the curves of some pairs, or say why there are none."""
    grade_N, queries = pairs.grade[chosen_N], np.unique(pairs.query[chosen_N])
    outcomes = {"relevant": grade_N >= pairs.grades.positive, "best": grade_N == pairs.grades.best}
    fewest = {label: int(min(outcome_N.sum(), (~outcome_N).sum())) for label, outcome_N in outcomes.items()}
    reasons = [f"{len(grade_N)} of {options.min_pairs} pairs"] * (len(grade_N) < options.min_pairs)
    reasons += [
        f"{count} of {options.min_outcomes} either way of {label}" for label, count in fewest.items() if count < options.min_outcomes
    ]
    reasons += [f"{len(queries)} of {options.folds} queries"] * (len(queries) < options.folds)
    fits: Mapping[str, Fit | None] = {"relevant": None, "best": None}
    if not reasons:
        fold_N = _folds(pairs.query[chosen_N], options.folds)
        fits = {
            label: _fit(pairs.scores[chosen_N], outcome_N.astype(np.float64), fold_N, options.bins) for label, outcome_N in outcomes.items()
        }
    return Stratum(kind=kind, name=name, pairs=len(grade_N), queries=len(queries), fallback=", ".join(reasons), **fits)


def _fit(scores_N: Floats, outcomes_N: Floats, fold_N: npt.NDArray[np.int64], bins: int) -> Fit:
    """Fit all pairs, and measure each fold with the curve of the others."""
    unseen_N = np.empty_like(scores_N)
    for fold in np.unique(fold_N):
        held_N = fold_N == fold
        unseen_N[held_N] = isotonic(scores_N[~held_N], outcomes_N[~held_N])(scores_N[held_N])
    return Fit(
        curve=isotonic(scores_N, outcomes_N),
        rate=float(outcomes_N.mean()),
        ece=calibration_error(unseen_N, outcomes_N, bins),
        brier=float(np.mean((unseen_N - outcomes_N) ** 2)),
    )


def _folds(queries_N: npt.NDArray[np.str_], folds: int) -> npt.NDArray[np.int64]:
    """Return the fold of each pair: queries in the order of their hashes, dealt in turn, so that no query is in two."""
    names, row_N = np.unique(queries_N, return_inverse=True)
    hashes = [hashlib.sha256(name.encode()).digest() for name in names.tolist()]
    fold_of = np.empty(len(names), np.int64)
    fold_of[sorted(range(len(names)), key=hashes.__getitem__)] = np.arange(len(names)) % folds
    return fold_of[row_N]


def _stratum(tree: Any) -> Stratum:
    """Read a stratum from its JSON."""
    fits = {}
    for label in ("relevant", "best"):
        fit = tree[label]
        fits[label] = fit and Fit(**{**fit, "curve": Curve(**{item.name: tuple(fit["curve"][item.name]) for item in fields(Curve)})})
    return Stratum(**{**tree, **fits})
