"""Whether a difference is more than chance: bootstrap over queries, Holm's correction, the smallest effect one could have seen.

Axes: N queries, C columns (metrics of systems, or differences of two systems), R resamples, B resamples of one block.
"""

# ruff: noqa: N803, N806 - arrays carry their shape in their names

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from encoder.errors import EncoderError

Floats: TypeAlias = npt.NDArray[np.float64]

_BLOCK = 4_000_000  # 32 MB of draws at a time
_POWER = 2.8  # 1.96 + 0.84: found in four of five repetitions at the level of 5 %


@dataclass(frozen=True, kw_only=True)
class BootstrapOptions:
    """How many times the queries are drawn again, from which seed, and how much of the outcomes an interval holds."""

    resamples: int = 10_000
    seed: int = 0
    level: float = 0.95

    def __post_init__(self) -> None:
        if self.resamples < 1 or not 0 < self.level < 1 or self.seed < 0:
            raise EncoderError(f"{self} is no bootstrap. Give resamples from 1, a level between 0 and 1, and a seed from 0.")


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over queries with its percentile interval; all None where no query has a value."""

    mean: float | None
    low: float | None
    high: float | None
    count: int


@dataclass(frozen=True, kw_only=True)
class Difference(Estimate):
    """The mean of a system minus that of the baseline over the same queries.

    `p` is two-sided, from the resamples on the other side of zero; `mde` is the effect that so many queries find in four
    of five repetitions.
    """

    p: float | None
    mde: float | None


def estimates(values_NC: Floats, options: BootstrapOptions | None = None) -> list[Estimate]:
    """Return the mean and interval of each column; a NaN is a query that does not count in it."""
    options = options or BootstrapOptions()
    means_RC, counts = resampled_means(values_NC, options), np.isfinite(values_NC).sum(axis=0).tolist()
    return [
        Estimate(**_interval(values_N, means_R, options.level), count=count)
        for values_N, means_R, count in zip(values_NC.T, means_RC.T, counts, strict=True)
    ]


def differences(system_NC: Floats, baseline_NC: Floats, options: BootstrapOptions | None = None) -> list[Difference]:
    """Compare the columns of two systems query by query; a query counts where both have a value."""
    if system_NC.shape != baseline_NC.shape:
        raise EncoderError(f"A system of {system_NC.shape} is compared with one of {baseline_NC.shape}. Measure the same queries.")
    options = options or BootstrapOptions()
    gaps_NC = system_NC - baseline_NC
    means_RC = resampled_means(gaps_NC, options)
    found = []
    for gaps_N, means_R in zip(gaps_NC.T, means_RC.T, strict=True):
        kept_N = gaps_N[np.isfinite(gaps_N)]
        p = _two_sided(means_R) if kept_N.size else None
        found.append(Difference(**_interval(gaps_N, means_R, options.level), count=kept_N.size, p=p, mde=minimum_detectable_effect(kept_N)))
    return found


def resampled_means(values_NC: Floats, options: BootstrapOptions) -> Floats:
    """Return the mean of each column in each resample of the queries; all columns see the same draws, so that pairs stay pairs.

    A resample that has no value of a column gives NaN there.
    """
    known_NC = np.isfinite(values_NC)
    filled_NC = np.where(known_NC, values_NC, 0.0)
    queries, generator = len(values_NC), np.random.default_rng(options.seed)
    means_RC = np.full((options.resamples, values_NC.shape[1]), np.nan)
    # Columns without a NaN need no second product: every resample has as many values as there are queries.
    partial_C = ~known_NC.all(axis=0)
    block = max(1, _BLOCK // max(queries, 1))
    for begin in range(0, options.resamples if queries else 0, block):
        size = min(block, options.resamples - begin)
        draws_BN = generator.integers(queries, size=(size, queries)) + np.arange(size)[:, None] * queries
        times_BN = np.bincount(draws_BN.ravel(), minlength=size * queries).reshape(size, queries).astype(np.float64)
        totals_BC = np.full((size, values_NC.shape[1]), float(queries))
        totals_BC[:, partial_C] = times_BN @ known_NC[:, partial_C]
        np.divide(times_BN @ filled_NC, totals_BC, out=means_RC[begin : begin + size], where=totals_BC > 0)
    return means_RC


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p values corrected by Holm for all being asked at once, in their order."""
    raw = np.asarray(p_values, np.float64)
    if not ((raw >= 0) & (raw <= 1)).all():
        raise EncoderError(f"The p values are {list(p_values)[:20]}. Give numbers from 0 to 1.")
    order = np.argsort(raw, kind="stable")
    corrected = np.empty_like(raw)
    corrected[order] = np.minimum(np.maximum.accumulate(raw[order] * np.arange(len(raw), 0, -1)), 1.0)
    return [float(value) for value in corrected]


def minimum_detectable_effect(gaps_N: Floats) -> float | None:
    """Return 2.8 standard errors of a mean difference; None for fewer than two queries."""
    count = len(gaps_N)
    return _POWER * float(np.std(gaps_N, ddof=1)) / float(np.sqrt(count)) if count > 1 else None


def _interval(values_N: Floats, means_R: Floats, level: float) -> dict[str, float | None]:
    values_N, means_R = values_N[np.isfinite(values_N)], means_R[np.isfinite(means_R)]
    if not values_N.size or not means_R.size:
        return {"mean": None, "low": None, "high": None}
    low, high = np.quantile(means_R, [(1 - level) / 2, (1 + level) / 2])
    return {"mean": float(values_N.mean()), "low": float(low), "high": float(high)}


def _two_sided(means_R: Floats) -> float:
    """Return twice the smaller tail; one is added to both counts, since the sample itself is an outcome and p is never 0."""
    means_R = means_R[np.isfinite(means_R)]
    tail = min(int((means_R <= 0).sum()), int((means_R >= 0).sum()))
    return min(1.0, 2 * (tail + 1) / (means_R.size + 1))
