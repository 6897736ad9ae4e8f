"""Gates: what is measured of a candidate generation, against which limit, and what to do where it fails. No I/O.

Every gate is judged and reported, whether it passed or not. What nobody measured is `skipped` with a reason, never
passed; a number that is no number fails. A waiver turns one failure into a warning until its last day.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from difflib import get_close_matches
from typing import Any, Literal, get_args

from pipelines.errors import InputError, ManifestError
from pipelines.gate_advice import GATES
from pipelines.layout import printable

GATE_FAILED = 10
"""Exit code of a run that built a generation and did not publish it."""

GATES_FORMAT = 1
MAX_IDS = 10

# The literals of the manifest, which keeps the verdict of every gate.
Verdict = Literal["passed", "warned", "failed", "skipped"]
Sense = Literal["at least", "at most", "exactly"]

# Differences of two shares carry rounding noise: 0.97 - 0.965 is more than 0.005 in floating point.
_NOISE = 1e-9


@dataclass(frozen=True, kw_only=True)
class GateLimits:
    """Where a candidate stops being good enough. Shares of one, except the whole number of unindexed rows."""

    recall_floor: float = 0.95
    recall_max_drop: float = 0.005
    recall_filtered: float = 0.97
    self_retrieval: float = 0.99
    replay_cosine: float = 0.999
    unit_tolerance: float = 1e-3
    parity: float = 0.95
    max_churn: float = 0.5
    on_churn: Literal["warn", "fail"] = "warn"
    max_delete_ratio: float = 0.05
    max_identical: float = 0.01
    max_unindexed_rows: int = 0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name == "max_unindexed_rows":
                if type(value) is not int or value < 0:
                    raise InputError(f"`{name}` is a whole number of rows from 0, not {value}.")
            elif name == "on_churn":
                if value not in ("warn", "fail"):
                    raise InputError(f"`{name}` is `warn` or `fail`, not `{value}`.")
            elif not 0.0 <= value <= 1.0:
                raise InputError(f"`{name}` is a share between 0 and 1, not {value}. Five percent is 0.05.")


@dataclass(frozen=True, kw_only=True)
class Waiver:
    """Leave to publish although this gate fails, through the day `until`, for a written reason."""

    gate: str
    until: date
    reason: str

    def __post_init__(self) -> None:
        _known(self.gate, "a waiver")
        if not self.reason.strip():
            raise InputError(f"the waiver of gate `{self.gate}` gives no reason. Say why, for whoever reads the report.")


@dataclass(frozen=True, kw_only=True)
class FilteredRecall:
    """Recall under filters that pass a like share of the products. `error` is the standard error of the mean.

    `example` is the filter that found least, and `rows` how many products pass it.
    """

    band: str
    recall: float
    error: float
    queries: int
    example: str
    rows: int


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What the probes found. None means that nobody measured it; `skipped` says why, by gate.

    `parts_rows` are live rows after every part is applied. `recall`, its standard error,
    `recall_before` and `recall_filtered` are by index: faiss, lance.
    """

    expected_rows: int | None = None
    parts_rows: int | None = None
    table_rows: int | None = None
    index_rows: int | None = None
    deleted_found: tuple[str, ...] | None = None
    self_retrieval: float | None = None
    missing: tuple[str, ...] = ()
    non_finite: tuple[str, ...] | None = None
    norm_gap: float | None = None
    non_unit: tuple[str, ...] = ()
    identical: float | None = None
    identical_ids: tuple[str, ...] = ()
    tower: str | None = None
    fingerprints: tuple[str, ...] | None = None
    replay_cosine: float | None = None
    replay_ids: tuple[str, ...] = ()
    recall: Mapping[str, float] = field(default_factory=dict)
    recall_before: Mapping[str, float] = field(default_factory=dict)
    recall_error: Mapping[str, float] = field(default_factory=dict)
    recall_filtered: Mapping[str, Sequence[FilteredRecall]] = field(default_factory=dict)
    parity: float | None = None
    churn: float | None = None
    delete_ratio: float | None = None
    corrupt: tuple[str, ...] | None = None
    unindexed: Mapping[str, int] | None = None
    skipped: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.skipped:
            _known(name, "a reason to skip")


@dataclass(frozen=True, kw_only=True)
class Gate:
    """One judged gate. `ids` are at most ten examples: product ids, or keys for `checksums`."""

    name: str
    verdict: Verdict
    measured: float | str | None
    limit: float | str
    sense: Sense
    ids: tuple[str, ...] = ()
    advice: str = ""
    waiver: Waiver | None = None


@dataclass(frozen=True, kw_only=True)
class _Finding:
    """A measurement beside its limit, before waivers. `holds` is None where something was not measured."""

    measured: float | str | None
    limit: float | str
    sense: Sense
    holds: bool | None
    ids: Sequence[str] = ()
    note: str = ""


def judge(measured: Measured, limits: GateLimits, waivers: Sequence[Waiver], today: date) -> tuple[Gate, ...]:
    """Judge every gate, in the order of `GATES`; none is left out, and one failure hides no other."""
    findings = dict(_findings(measured, limits))
    # Of several waivers of one gate the one that lasts longest counts.
    waived = {waiver.gate: waiver for waiver in sorted(waivers, key=lambda waiver: waiver.until)}
    gates = []
    for name in GATES:
        found = findings[name]
        reason = measured.skipped.get(name) or found.note or "no probe reported it"
        gates.append(
            _judged(name, replace(found, note=reason), waived.get(name), today, mild=name == "churn" and limits.on_churn == "warn")
        )
    return tuple(gates)


def failed(gates: Sequence[Gate]) -> tuple[Gate, ...]:
    """Return the gates that forbid publishing."""
    return tuple(gate for gate in gates if gate.verdict == "failed")


def verdicts(gates: Sequence[Gate]) -> dict[str, Verdict]:
    """Return what the manifest keeps."""
    return {gate.name: gate.verdict for gate in gates}


def to_json(gates: Sequence[Gate]) -> bytes:
    """Return the bytes of `gates.json`, one spelling for equal gates."""
    tree = {"format": GATES_FORMAT, "gates": [asdict(gate) for gate in gates]}
    return json.dumps(tree, sort_keys=True, separators=(",", ":"), allow_nan=False, default=date.isoformat).encode("ascii") + b"\n"


def from_json(data: bytes, *, where: str = "gates.json") -> tuple[Gate, ...]:
    """Read what `to_json` wrote, or raise `ManifestError` saying where and what is wrong."""
    try:
        tree = json.loads(data)
        if tree["format"] != GATES_FORMAT:
            raise ManifestError(f"{where}: format {tree['format']!r}, this version reads {GATES_FORMAT}. Upgrade before reading it.")
        return tuple(_read(item) for item in tree["gates"])
    except (ValueError, TypeError, KeyError) as error:
        raise ManifestError(f"{where}: not the gates of a generation ({str(error)[:200]}). Restore it from a copy.") from error


def gates_text(gates: Sequence[Gate]) -> str:
    """Lay gates out on a screen: failures with their ids and what to do, everything else in one line each."""
    counts = [(sum(gate.verdict == verdict for gate in gates), verdict) for verdict in get_args(Verdict)]
    lines = ["Gates  " + "   ".join(f"{number} {_loud(verdict)}" for number, verdict in counts if number)]
    for gate in gates:
        shown = "not measured" if gate.measured is None else _shown(gate.measured)
        lines.append(f"  {_loud(gate.verdict):<8} {gate.name:<21} {shown}, limit {gate.sense} {_shown(gate.limit)}")
        if gate.verdict != "passed":
            lines += [f"{'':11}{printable(gate.advice)}"] if gate.advice else []
            lines += [f"{'':11}such as {', '.join(map(printable, gate.ids))}"] if gate.ids else []
    return "\n".join(lines) + "\n"


def _findings(measured: Measured, limits: GateLimits) -> Iterator[tuple[str, _Finding]]:
    yield "counts", _counts(measured)
    yield "deleted", _none_of(measured.deleted_found)
    yield "self_retrieval", _at_least(measured.self_retrieval, limits.self_retrieval, measured.missing)
    yield "finite", _none_of(measured.non_finite)
    yield "unit", _at_most(measured.norm_gap, limits.unit_tolerance, measured.non_unit)
    yield "identical", _at_most(measured.identical, limits.max_identical, measured.identical_ids)
    yield "fingerprint", _fingerprint(measured)
    yield "replay", _at_least(measured.replay_cosine, limits.replay_cosine, measured.replay_ids)
    yield "recall_faiss", _at_least(measured.recall.get("faiss"), limits.recall_floor)
    yield "recall_lance", _at_least(measured.recall.get("lance"), limits.recall_floor)
    for index in ("faiss", "lance"):
        yield f"recall_filtered_{index}", _filtered(measured.recall_filtered.get(index, ()), limits)
    yield "recall_drop", _drop(measured, limits)
    yield "parity", _at_least(measured.parity, limits.parity)
    yield "churn", _at_most(measured.churn, limits.max_churn)
    yield "delete_ratio", _at_most(measured.delete_ratio, limits.max_delete_ratio)
    yield "checksums", _none_of(measured.corrupt)
    yield "unindexed", _unindexed(measured, limits)


def _judged(name: str, found: _Finding, waiver: Waiver | None, today: date, *, mild: bool) -> Gate:
    """Turn a finding into a verdict: waivers soften failures, and only failures."""
    gate = Gate(name=name, verdict="passed", measured=_finite(found.measured), limit=found.limit, sense=found.sense)
    if found.holds is None:
        return replace(gate, verdict="skipped", advice=f"Not measured: {found.note}.")
    if found.holds:
        return gate
    gate = replace(gate, verdict="warned" if mild else "failed", ids=tuple(found.ids[:MAX_IDS]), advice=GATES[name][1])
    if mild or waiver is None:
        return gate
    if waiver.until < today:
        return replace(gate, advice=f"{gate.advice} The waiver ({waiver.reason}) ended on {waiver.until} and no longer counts.")
    return replace(gate, verdict="warned", advice=f"Waived until {waiver.until}: {waiver.reason}. {gate.advice}", waiver=waiver)


def _counts(measured: Measured) -> _Finding:
    told = {"parts": measured.parts_rows, "table": measured.table_rows, "index": measured.index_rows}
    known = {name: rows for name, rows in told.items() if rows is not None}
    expected = measured.expected_rows
    absent = [name for name in told if name not in known] + (["the plan"] if expected is None else [])
    # Two that disagree are wrong, whatever the third would have said.
    wrong = len({*known.values(), *([] if expected is None else [expected])}) > 1
    return _Finding(
        measured=", ".join(f"{name} {rows}" for name, rows in known.items()) or None,
        limit=expected if expected is not None else "equal counts",
        sense="exactly",
        holds=False if wrong else (None if absent else True),
        note=f"no count from {', '.join(absent)}",
    )


def _fingerprint(measured: Measured) -> _Finding:
    seen, tower = measured.fingerprints, measured.tower
    return _Finding(
        measured=None if seen is None else ", ".join(sorted(set(seen))) or "none",
        limit=tower or "one fingerprint",
        sense="exactly",
        holds=None if seen is None else len(set(seen)) == 1 and tower in (None, seen[0]),
    )


def _filtered(bands: Sequence[FilteredRecall], limits: GateLimits) -> _Finding:
    """Judge the band that is most clearly below the limit: few queries err by chance, and two standard errors are chance."""
    if not bands:
        return _at_least(None, limits.recall_filtered)
    # NaN compares as false with everything, and must not hide behind a band that is merely low.
    highest = [-math.inf if math.isnan(band.recall + band.error) else band.recall + 2 * band.error for band in bands]
    worst = bands[highest.index(min(highest))]
    noise = 0.0 if math.isnan(worst.error) else 2 * worst.error
    return _at_least(
        math.nan if math.isnan(worst.error) else worst.recall,
        limits.recall_filtered - noise,
        [f"{worst.band} of the products pass, recall {worst.recall:.3f}: {worst.example} ({worst.rows:,} products)"],
    )


def _drop(measured: Measured, limits: GateLimits) -> _Finding:
    both = measured.recall.keys() & measured.recall_before.keys()
    drops = {name: measured.recall_before[name] - measured.recall[name] for name in sorted(both)}
    # NaN compares as false with everything, and must not hide behind a smaller drop.
    worst = max(drops, key=lambda name: math.inf if math.isnan(drops[name]) else drops[name], default=None)
    # Two samples of one index differ by chance: a drop counts where it is larger than two standard errors of that.
    noise = 2 * math.sqrt(2) * measured.recall_error.get(worst, 0.0) if worst else 0.0
    found = _at_most(None if worst is None else drops[worst], limits.recall_max_drop + noise, [worst] if worst else ())
    return replace(found, note="no previous generation with a measured recall")


def _unindexed(measured: Measured, limits: GateLimits) -> _Finding:
    rows = measured.unindexed
    behind = [f"{name}: {number} rows" for name, number in sorted((rows or {}).items()) if number > limits.max_unindexed_rows]
    return _at_most(None if rows is None else max(rows.values(), default=0), limits.max_unindexed_rows, behind)


def _none_of(ids: Sequence[str] | None) -> _Finding:
    return _at_most(None if ids is None else len(ids), 0, ids or ())


def _at_most(measured: float | None, limit: float, ids: Sequence[str] = ()) -> _Finding:
    holds = None if measured is None else measured <= limit + _NOISE
    return _Finding(measured=measured, limit=limit, sense="at most", holds=holds, ids=ids)


def _at_least(measured: float | None, limit: float, ids: Sequence[str] = ()) -> _Finding:
    holds = None if measured is None else measured >= limit - _NOISE
    return _Finding(measured=measured, limit=limit, sense="at least", holds=holds, ids=ids)


def _known(name: str, what: str) -> None:
    if name not in GATES:
        near = get_close_matches(name, GATES, n=1)
        raise InputError(f"{what} names gate `{name[:80]}`, which does not exist.{f' Did you mean `{near[0]}`?' if near else ''}")


def _finite(value: float | str | None) -> float | str | None:
    """Return the value in a form that JSON has."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _read(item: Mapping[str, Any]) -> Gate:
    gate = Gate(**{**item, "ids": tuple(item["ids"])})
    if gate.verdict not in get_args(Verdict) or gate.sense not in get_args(Sense):
        raise ValueError(f"gate {gate.name!r} has the verdict {gate.verdict!r} and the sense {gate.sense!r}")
    waiver = item["waiver"]
    return gate if waiver is None else replace(gate, waiver=Waiver(**{**waiver, "until": date.fromisoformat(waiver["until"])}))


def _loud(verdict: str) -> str:
    return verdict.upper() if verdict == "failed" else verdict


def _shown(value: float | str) -> str:
    return f"{value:.6g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else printable(value)
