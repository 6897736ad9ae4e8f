"""The result of a contest as plain data: what everyone reached, against the baseline and against the limit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from encoder.bench.corpus import Corpus
from encoder.bench.fidelity import Fidelity
from encoder.bench.limits import Work
from encoder.bench.rivals import BASELINES, RIVALS
from encoder.bench.rounds import Entrant, Lap, Rounds
from encoder.bench.workbench import Started, Workbench

LIMIT_BEST, LIMIT_LINEAR = "limit", "limit-linear"
_LIMITS = {
    LIMIT_BEST: "limit: the matrix products alone, the fastest way",
    LIMIT_LINEAR: "limit: the matrix products alone, F.linear",
}


@dataclass(frozen=True, kw_only=True)
class Line:
    """A rival that was started: how to run it, with what, and how near its vectors are."""

    started: Started
    fidelity: Fidelity


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """All that was measured: `left_out` says of whom nothing was and why, `rate` is that of one large product, `ways` of the limits."""

    bench: Workbench
    corpus: Corpus
    lines: Mapping[str, Line]
    left_out: Mapping[str, Mapping[str, str]]
    entrants: Mapping[str, Entrant]
    rounds: Rounds
    work: Work
    rate: float | None
    ways: Mapping[str, Any]

    @property
    def flops_per_token(self) -> float:
        """Return the operations of a token, in the mean of the corpus."""
        return self.work.flops(self.corpus.lengths) / self.corpus.tokens

    def speeds(self, name: str) -> list[float]:
        """Return the tokens a second of each round; nothing for who did not finish them."""
        return [self.entrants[name].tokens / lap.wall_s for lap in self.rounds.laps.get(name, ())]

    def cpu_speeds(self, name: str) -> list[float]:
        """Return the tokens a CPU second of each round: a busy machine disturbs them less. Nothing where it is unknown."""
        laps = self.rounds.laps.get(name, [])
        return [self.entrants[name].tokens / lap.cpu_s for lap in laps if lap.cpu_s] if all(lap.cpu_s for lap in laps) else []

    @property
    def baseline(self) -> str | None:
        """Return who the others are compared with: sentence-transformers, and the sorted loop where it is not there."""
        return next((name for name in BASELINES if name in self.rounds.laps), None)

    def limits(self) -> list[float]:
        """Return the tokens a second of the limit in each round, the faster of its two ways; nothing where none was measured."""
        if self.rate is not None:
            return [self.rate / self.flops_per_token] * self.bench.options.rounds
        ways = [speeds for name in _LIMITS if (speeds := self.speeds(name))]
        return [max(speeds) for speeds in zip(*ways, strict=True)]


def result(outcome: Outcome) -> dict[str, Any]:
    """Return everything but the names of the machine."""
    corpus, work, limits = outcome.corpus, outcome.work, outcome.limits()
    different = work.flops(corpus.unique_lengths()) / work.flops(corpus.lengths)
    return {
        "tower": _tower(outcome),
        "corpus": corpus.facts(),
        "flops_per_token": round(outcome.flops_per_token),
        "matrix_tflops": outcome.rate and _short(outcome.rate / 1e12),
        "limit": {
            "kind": "counted" if outcome.rate is not None else "measured",
            "seconds": _short(corpus.tokens / float(np.median(limits))) if limits else None,
            "different_texts": _short(different),
            "ways": dict(outcome.ways),
        },
        "rivals": _table(outcome, different),
    }


def _table(outcome: Outcome, different: float) -> list[dict[str, Any]]:
    """Return a line for everyone, the fastest first, and those of whom nothing was measured behind them."""
    table = [_measured(outcome, name, laps, different) for name, laps in outcome.rounds.laps.items()]
    table.sort(key=lambda line: -line["tokens_per_s"]["median"])
    missing = {**outcome.left_out, **{name: {"status": "failed", "reason": why} for name, why in outcome.rounds.failures.items()}}
    return table + [{"name": name, "label": _label(name), **why} for name, why in missing.items()]


def _measured(outcome: Outcome, name: str, laps: Sequence[Lap], different: float) -> dict[str, Any]:
    speeds, entrant, limits = outcome.speeds(name), outcome.entrants[name], outcome.limits()
    of_limit = _range(_over(speeds, limits)) if limits else None
    line: dict[str, Any] = {
        "name": name,
        "label": _label(name),
        "status": "measured",
        "texts": entrant.texts,
        "texts_per_s": _range([entrant.texts / lap.wall_s for lap in laps]),
        "tokens_per_s": _range(speeds),
        "wall_s": [_short(lap.wall_s) for lap in laps],
        "cpu_s": [lap.cpu_s and _short(lap.cpu_s) for lap in laps],
        "grown_mib": _grown(laps),
        "baseline": outcome.baseline,
        "ratio": _range(_over(speeds, outcome.speeds(outcome.baseline))) if outcome.baseline else None,
        "of_limit": of_limit,
    }
    cpu, cpu_limit = outcome.cpu_speeds(name), outcome.cpu_speeds(LIMIT_BEST)
    if cpu and outcome.baseline and (others := outcome.cpu_speeds(outcome.baseline)):
        line["cpu_ratio"] = _range(_over(cpu, others))
    if cpu and cpu_limit:
        line["cpu_of_limit"] = _range(_over(cpu, cpu_limit))
    if of_limit and name in RIVALS and RIVALS[name].once:
        # Who runs identical texts once has less to do: against the limit of that.
        line["of_limit_of_different_texts"] = {share: _short(value * different) for share, value in of_limit.items()}
    if outcome.rate is not None:
        # Operations that were really run: a repeated text costs none where it is run once.
        run = different if name in RIVALS and RIVALS[name].once else 1.0
        reached, peak = float(np.median(speeds)) * outcome.flops_per_token * run, outcome.bench.options.peak
        line |= {"tflops": _short(reached / 1e12), "mfu": _short(reached / outcome.rate)}
        line["mfu_of_peak"] = _short(reached / (peak * 1e12)) if peak else None
    if name in outcome.lines:
        line |= {"cosine": outcome.lines[name].fidelity.facts(), "settings": dict(outcome.lines[name].started.settings)}
    return line


def _label(name: str) -> str:
    return _LIMITS.get(name) or RIVALS[name].label


def _over(speeds: Sequence[float], others: Sequence[float]) -> list[float]:
    return [speed / other for speed, other in zip(speeds, others, strict=True)]


def _grown(laps: Sequence[Lap]) -> float | None:
    """Return by how many MiB memory grew at most: the first lap says it, later ones find memory that it left."""
    known = [lap.grown_bytes for lap in laps if lap.grown_bytes is not None]
    return round(max(known) / 2**20, 1) if known else None


def _range(values: Sequence[float]) -> dict[str, float]:
    return {"min": _short(min(values)), "median": _short(float(np.median(values))), "max": _short(max(values))}


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def _tower(outcome: Outcome) -> dict[str, Any]:
    bench, config = outcome.bench, outcome.bench.model().config
    return {
        "label": bench.label,
        "fingerprint": bench.card.fingerprint,
        "model_type": bench.card.model_type,
        "pooling": bench.card.pooling,
        "layers": config.num_hidden_layers,
        "dims": bench.card.full_dims,
        "linear_parameters": outcome.work.linear_parameters,
        "device": str(bench.device),
        "dtype": str(bench.dtype).removeprefix("torch."),
        "threads": bench.threads,
        "halvings": bench.ours.halvings,
    }
