"""How a run went: one record that `state.json`, the metrics and the text that a person reads are all made from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar, get_args

from pipelines.errors import ManifestError
from pipelines.layout import byte_size, counted, millions, printable, took
from pipelines.manifest import Parser, Verdict, canonical, count, flag, generation_id, moment, optional, parse, read_fields, text
from pipelines.metrics import Key
from pipelines.telemetry import StageTime, per_second

Outcome = Literal["published", "built", "nothing", "gates_failed", "guarded", "interrupted", "failed", "prepared"]
T = TypeVar("T")

# Format 2 has the guards, and how long actors waited. Format 1 is read as one that does not say.
STATE_FORMAT = 2
MAX_STATE_BYTES = 1024 * 1024
MAX_ERROR_CHARACTERS = 2000
# The stage whose rates are the tower's.
EMBED = "embed"
# Names in `planned` and `actual`, and what the summary calls them.
COUNTS: Mapping[str, str] = {
    "add": "new",
    "text": "text",
    "attr": "attributes",
    "delete": "deleted",
    "texts": "texts",
    "reused": "reused",
    "tokens": "tokens",
}

_SUCCESSES = frozenset({"published", "nothing"})
_GRADES: Mapping[str, float] = {"passed": 1.0, "warned": 0.5, "failed": 0.0}


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What is known about a run at its end. Counts that are absent from a mapping were not reached.

    `planned` and `actual` use the names of COUNTS; `actual` also has read, quarantined, embedded_texts, embedded_tokens,
    halvings and attempts. `quarantined` is by reason, `retries` by kind, `recall` at 10 by index; `guards` say which passed.
    `actor_s` is the time that actors spent in forward passes, `actor_wait_s` the rest of their time from their start to
    their last part. Times are aware and kept in UTC.
    """

    run_id: str
    command: str
    alias: str
    outcome: Outcome
    exit_code: int
    started_at: datetime
    ended_at: datetime
    base: str | None = None
    generation: str | None = None
    stages: tuple[StageTime, ...] = ()
    planned: Mapping[str, int] = field(default_factory=dict)
    actual: Mapping[str, int] = field(default_factory=dict)
    quarantined: Mapping[str, int] = field(default_factory=dict)
    retries: Mapping[str, int] = field(default_factory=dict)
    index_action: str | None = None
    index_reason: str | None = None
    guards: Mapping[str, bool] = field(default_factory=dict)
    gates: Mapping[str, Verdict] = field(default_factory=dict)
    recall: Mapping[str, float] = field(default_factory=dict)
    bytes_written: int = 0
    generation_bytes: int | None = None
    orphan_bytes: int | None = None
    lease_conflicts: int = 0
    alias_seq: int | None = None
    in_step: datetime | None = None
    held: str | None = None
    error: str | None = None
    actor_s: float = 0.0
    actor_wait_s: float | None = None
    cost: float | None = None
    currency: str = ""

    def __post_init__(self) -> None:
        for name in ("started_at", "ended_at"):
            if getattr(self, name).tzinfo is None:
                raise ManifestError(f"run {self.run_id}: {name} {getattr(self, name)} has no time zone. Pass an aware clock.")
            object.__setattr__(self, name, getattr(self, name).astimezone(UTC))
        object.__setattr__(self, "in_step", self.in_step and self.in_step.astimezone(UTC))
        # Plain copies: counts come as NumPy numbers too, which JSON does not take.
        for name in ("planned", "actual", "quarantined", "retries"):
            object.__setattr__(self, name, {str(key): int(value) for key, value in getattr(self, name).items()})
        object.__setattr__(self, "recall", {str(key): float(value) for key, value in self.recall.items()})
        object.__setattr__(self, "guards", {str(key): bool(value) for key, value in self.guards.items()})
        object.__setattr__(self, "gates", dict(self.gates))
        object.__setattr__(self, "error", self.error and self.error[:MAX_ERROR_CHARACTERS])
        numbers = [
            self.actor_s,
            self.actor_wait_s or 0.0,
            self.cost or 0.0,
            *self.recall.values(),
            *(stage.seconds for stage in self.stages),
        ]
        if not all(math.isfinite(number) for number in numbers):
            raise ManifestError(
                f"run {self.run_id}: a time, a cost or a recall is no finite number ({numbers}). Leave out what was not measured."
            )

    @property
    def seconds(self) -> float:
        """How long the run took; a clock that was set back counts as no time."""
        return max((self.ended_at - self.started_at).total_seconds(), 0.0)

    def to_json(self) -> bytes:
        """Return the canonical bytes of `runs/<run>/state.json`."""
        times = {"started_at": self.started_at.isoformat(), "ended_at": self.ended_at.isoformat()}
        times |= {"in_step": self.in_step.isoformat()} if self.in_step else {}
        return canonical({"format_version": STATE_FORMAT, **asdict(self), **times})

    @classmethod
    def from_json(cls, data: bytes, *, where: str = "state.json") -> RunFacts:
        """Read what `to_json` wrote, or raise `ManifestError` naming what is wrong and where."""
        added: Mapping[str, Any] = {"guards": {}, "actor_wait_s": None}
        return parse(data, where=where, limit_bytes=MAX_STATE_BYTES, parsers=_PARSERS, build=cls, latest=STATE_FORMAT, added=added)


def cost_of(actor_s: float, *, per_hour: float | None) -> float | None:
    """Return what actors cost that were in forward passes for so long, None where no price is configured."""
    return None if per_hour is None else actor_s / 3600 * per_hour


def metrics_of(facts: RunFacts) -> dict[Key, float]:
    """Return the metrics of a run; what was not measured is left out, so that lasting metrics keep their last value."""
    actual, ended = facts.actual, facts.ended_at.timestamp()
    single: dict[str, float | None] = {
        "last_success_timestamp_seconds": ended if facts.exit_code == 0 and facts.outcome in _SUCCESSES else None,
        "last_run_timestamp_seconds": ended,
        "last_publish_seq": facts.alias_seq,
        "run_exit_code": facts.exit_code,
        "rows_read": actual.get("read"),
        "rows_embedded": actual.get("embedded_texts"),
        "rows_skipped": actual.get("reused"),
        "rows_deleted": actual.get("delete"),
        "embed_cost": facts.cost,
        "generation_bytes": facts.generation_bytes,
        "orphan_bytes": facts.orphan_bytes,
        "gpu_seconds_total": facts.actor_s,
        "lease_conflicts_total": facts.lease_conflicts,
        "oom_halvings_total": actual.get("halvings", 0),
    }
    embed = [stage for stage in facts.stages if stage.name == EMBED]
    if any(stage.rows for stage in embed):
        seconds = sum(stage.seconds for stage in embed)
        single["embed_rows_per_second"] = per_second(sum(stage.rows for stage in embed), seconds)
        single["embed_tokens_per_second"] = per_second(sum(stage.tokens for stage in embed), seconds)
    if facts.actor_s and facts.actor_wait_s is not None:
        single["embed_busy_ratio"] = facts.actor_s / (facts.actor_s + facts.actor_wait_s)
    stages = {"total": facts.seconds}
    for stage in facts.stages:
        stages[stage.name] = stages.get(stage.name, 0.0) + stage.seconds
    labelled: dict[str, Mapping[str, float]] = {
        "run_seconds": stages,
        "rows_quarantined": facts.quarantined,
        "guard_result": facts.guards,
        "gate_result": {gate: _GRADES[verdict] for gate, verdict in facts.gates.items() if verdict in _GRADES},
        "recall_at_10": facts.recall,
        "runs_total": {facts.outcome: 1},
        "retries_total": facts.retries,
    }
    return {(name, ()): float(value) for name, value in single.items() if value is not None} | {
        (name, (label,)): float(value) for name, values in labelled.items() for label, value in values.items()
    }


def summary_text(facts: RunFacts) -> str:
    """Lay a finished run out on a screen."""
    sections = (_head, _counts, _quarantine, _stages, _index, _gates, _bill, _next)
    return "".join(f"{printable(line.rstrip())}\n" for section in sections for line in section(facts))


def _head(facts: RunFacts) -> Iterator[str]:
    target = f"{facts.base or '(nothing published)'} -> {facts.generation or '(none)'}"
    yield f"Run  {facts.alias}  {target}  {facts.outcome.replace('_', ' ')}  in {took(facts.seconds)}"
    read = f"  rows read {facts.actual['read']:,}" if "read" in facts.actual else ""
    times = f"{facts.started_at:%Y-%m-%d %H:%M:%S} .. {facts.ended_at:%H:%M:%S} UTC"
    yield f"  run       {facts.run_id}  {facts.command}  {times}{read}"


def _counts(facts: RunFacts) -> Iterator[str]:
    actual = dict(facts.actual)
    actual.update({name: actual[done] for name, done in (("texts", "embedded_texts"), ("tokens", "embedded_tokens")) if done in actual})
    rows = [(name, called) for name, called in COUNTS.items() if facts.planned.get(name) or actual.get(name)]
    if not rows:
        return
    yield f"  products  {'':<10}  {'planned':>12}  {'actual':>12}"
    for name, called in rows:
        shown = [_amount(name, counts.get(name)) for counts in (facts.planned, actual)]
        yield f"            {called:<10}  {shown[0]:>12}  {shown[1]:>12}  {_difference(facts.planned.get(name), actual.get(name))}"
    if actual.get("halvings"):
        yield f"            batches halved for memory: {actual['halvings']:,}"
    if actual.get("attempts", 1) > 1:
        yield f"            attempts: {actual['attempts']:,}; finished parts were used again"


def _amount(name: str, number: int | None) -> str:
    return "-" if number is None else millions(number) if name == "tokens" else f"{number:,}"


def _difference(planned: int | None, actual: int | None) -> str:
    if planned is None or actual is None or planned == actual:
        return ""
    share = (actual - planned) / planned if planned else 0.0
    return f"{actual - planned:+,}" + (f" ({share:+.1%})" if abs(share) >= 0.0005 else "")  # noqa: PLR2004  what one digit can show


def _quarantine(facts: RunFacts) -> Iterator[str]:
    rows = facts.actual.get("quarantined", sum(facts.quarantined.values()))
    if rows:
        reasons = ", ".join(f"{code} {number:,}" for code, number in _largest(facts.quarantined))
        yield f"  rejected  {counted(rows, 'row')} in quarantine{': ' + reasons if reasons else ''}"


def _largest(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _stages(facts: RunFacts) -> Iterator[str]:
    label = "stages"
    for stage in facts.stages:
        share = f"{stage.seconds / facts.seconds:.0%}" if facts.seconds else ""
        line = f"  {label:<8}  {stage.name:<10}  {took(stage.seconds):>12}  {share:>5}"
        if stage.rows:
            line += f"  {counted(stage.rows, stage.unit)}{_rate(stage.rows, stage.seconds, stage.unit + 's')}{_rate(stage.tokens, stage.seconds, 'tokens')}"
        yield line
        label = ""


def _rate(number: int, seconds: float, noun: str) -> str:
    rate = per_second(number, seconds)
    return f"  {rate:,.0f} {noun}/s" if rate and number else ""


def _index(facts: RunFacts) -> Iterator[str]:
    if facts.index_action:
        yield f"  index     {facts.index_action}{': ' + facts.index_reason if facts.index_reason else ''}"
    if facts.recall:
        yield f"  recall    {', '.join(f'{name} {value:.3f}' for name, value in sorted(facts.recall.items()))} at 10"


def _gates(facts: RunFacts) -> Iterator[str]:
    if not facts.gates:
        return
    by = {verdict: sorted(name for name, found in facts.gates.items() if found == verdict) for verdict in get_args(Verdict)}
    parts = [f"{len(by['passed'])} passed"]
    parts += [f"{len(by[verdict])} {verdict} ({', '.join(by[verdict])})" for verdict in ("warned", "skipped") if by[verdict]]
    yield f"  gates     {', '.join(parts)}"
    if by["failed"]:
        yield f"  GATE      failed: {', '.join(by['failed'])}"


def _bill(facts: RunFacts) -> Iterator[str]:
    if facts.bytes_written:
        whole = f", the generation refers to {byte_size(facts.generation_bytes)}" if facts.generation_bytes is not None else ""
        yield f"  written   {byte_size(facts.bytes_written)}{whole}"
    if facts.cost is not None:
        # A price that two digits cannot show is not shown as nothing.
        price = "under 0.01" if 0 < facts.cost < 0.005 else f"{facts.cost:.2f}"  # noqa: PLR2004
        yield f"  cost      {f'{price} {facts.currency}'.rstrip()} for {took(facts.actor_s)} of forward passes"
    elif facts.actor_s:
        yield f"  cost      {took(facts.actor_s)} of forward passes; set `embed: cost_per_hour` to see a price"


def _next(facts: RunFacts) -> Iterator[str]:
    if facts.error:
        yield f"  ERROR     {facts.error}"
    if facts.held:
        yield f"  HELD      {facts.alias} is {facts.held}, so this generation waits"
    made = facts.generation or "<generation>"
    advice: Mapping[Outcome, str] = {
        "published": "readers see it now; `catalog-embed rollback` returns to the previous one",
        "built": f"not published: `catalog-embed publish {made}{' --release-hold' if facts.held else ''}`",
        "nothing": "nothing to do: the index is in step with the catalog",
        "gates_failed": f"not published, the candidate is kept: `catalog-embed validate {made}`",
        "guarded": "nothing was written: `catalog-embed plan --explain` shows what tripped",
        "interrupted": "nothing was published: start the same command again, finished parts are kept",
        "failed": "nothing was published: mend the cause and start the same command again, finished parts are kept",
        "prepared": "vectors are kept and nothing was published: the next `catalog-embed run` uses them",
    }
    if facts.command == "backfill":
        advice = {**advice, "nothing": "nothing to do: the index has what was asked for, as the catalog has it"}
    seq = f" as entry {facts.alias_seq} of {facts.alias}" if facts.outcome == "published" and facts.alias_seq is not None else ""
    yield f"  next      {advice[facts.outcome].replace('it now', f'it now{seq}', 1)} (exit {facts.exit_code})"


def _number(data: Any, where: str) -> float:
    if isinstance(data, bool) or not isinstance(data, int | float):
        raise ManifestError(f"{where}: expected a number, found {str(data)[:60]!r}.")
    try:
        return float(data)
    except OverflowError:
        raise ManifestError(f"{where}: the number is too large.") from None


def _choice(options: tuple[str, ...]) -> Parser[str]:
    def parser(data: Any, where: str) -> str:
        if data not in options:
            raise ManifestError(f"{where}: expected one of {', '.join(options)}, found {str(data)[:60]!r}.")
        return str(data)

    return parser


def _mapped(parser: Parser[T]) -> Parser[dict[str, T]]:
    def mapped(data: Any, where: str) -> dict[str, T]:
        if not isinstance(data, dict):
            raise ManifestError(f"{where}: expected an object, found {str(data)[:60]!r}.")
        return {name: parser(item, f"{where}.{name[:80]}") for name, item in data.items()}

    return mapped


def _stage_times(data: Any, where: str) -> tuple[StageTime, ...]:
    if not isinstance(data, list):
        raise ManifestError(f"{where}: expected a list, found {str(data)[:60]!r}.")
    parsers: Mapping[str, Parser[Any]] = {"name": text, "seconds": _number, "rows": count, "tokens": count, "unit": text}
    return tuple(StageTime(**read_fields(item, f"{where}[{number}]", parsers)) for number, item in enumerate(data))


_COUNTS: Callable[[Any, str], dict[str, int]] = _mapped(count)
_PARSERS: Mapping[str, Parser[Any]] = {
    "run_id": text,
    "command": text,
    "alias": text,
    "outcome": _choice(get_args(Outcome)),
    "exit_code": count,
    "started_at": moment,
    "ended_at": moment,
    "base": optional(generation_id),
    "generation": optional(generation_id),
    "stages": _stage_times,
    "planned": _COUNTS,
    "actual": _COUNTS,
    "quarantined": _COUNTS,
    "retries": _COUNTS,
    "index_action": optional(text),
    "index_reason": optional(text),
    "guards": _mapped(flag),
    "gates": _mapped(_choice(get_args(Verdict))),
    "recall": _mapped(_number),
    "bytes_written": count,
    "generation_bytes": optional(count),
    "orphan_bytes": optional(count),
    "lease_conflicts": count,
    "alias_seq": optional(count),
    "in_step": optional(moment),
    "held": optional(text),
    "error": optional(text),
    "actor_s": _number,
    "actor_wait_s": optional(_number),
    "cost": optional(_number),
    "currency": text,
}
