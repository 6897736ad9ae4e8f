"""The plan: what a run would do, and the guards that decide whether it may. Pure data and rules; no I/O."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from datetime import datetime
from typing import Any, Literal

from pipelines.contracts import SourcePin, Window
from pipelines.errors import InputError, PlanError

PLAN_FORMAT = 1

GUARD_TRIPPED, QUARANTINE_FULL = 12, 13

Deletes = Literal["auto", "tombstones", "scan", "off"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Where a plan stops being believable. Ratios are shares of one; `max_age_s` is off when None."""

    min_rows_ratio: float = 0.90
    max_age_s: float | None = None
    max_delete_ratio: float = 0.05
    max_duplicate_ratio: float = 0.01
    quarantine_ratio: float = 0.0005

    def __post_init__(self) -> None:
        for name in ("min_rows_ratio", "max_delete_ratio", "max_duplicate_ratio", "quarantine_ratio"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise InputError(f"`{name}` is a share between 0 and 1, not {value}. Five percent is 0.05.")


@dataclass(frozen=True, kw_only=True)
class RowCounts:
    """What became of every row that was read."""

    read: int
    live: int
    deleted: int
    duplicate: int
    quarantined: int

    def __post_init__(self) -> None:
        told = self.live + self.deleted + self.duplicate + self.quarantined
        if told != self.read:
            raise PlanError(
                f"{self.read} rows were read but {told} are accounted for ({self}). This is a fault in catalog-embed: please report it."
            )


@dataclass(frozen=True, kw_only=True)
class ActionCounts:
    """What becomes of every product."""

    add: int
    text: int
    attr: int
    delete: int
    same: int

    @property
    def changed(self) -> int:
        """Products that a run would touch."""
        return self.add + self.text + self.attr + self.delete


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """What the tower would have to read. Tokens are estimated from a hashed sample of the texts."""

    rows: int
    texts: int
    reused: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Guard:
    """One check of a plan: what was measured against which limit, and what to do where it failed."""

    name: str
    passed: bool
    measured: float
    limit: float
    advice: str
    exit_code: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The difference between a catalog and a published generation, with all that is needed to judge it."""

    alias: str
    base: str | None
    base_live: int
    window: Window
    zone: str
    lookback_s: float
    source: SourcePin
    template: str
    template_digest: str
    schema_digest: str
    deletes: Deletes
    deletes_checked: bool
    rows: RowCounts
    actions: ActionCounts
    embedding: Embedding
    rejected: Mapping[str, int]
    repaired: Mapping[str, int]
    unseen: int
    newest: datetime | None
    tower: str = ""
    notes: tuple[str, ...] = ()
    guards: tuple[Guard, ...] = ()

    @property
    def failed(self) -> tuple[Guard, ...]:
        """Guards that stop the run."""
        return tuple(guard for guard in self.guards if not guard.passed)

    @property
    def exit_code(self) -> int:
        """0, or the code of the gravest guard that failed: a wrong source outranks a full quarantine."""
        return min((guard.exit_code for guard in self.failed), default=0)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON types."""
        return {"format": PLAN_FORMAT, "changed": self.actions.changed, "exit_code": self.exit_code, **_plain(self)}

    @classmethod
    def from_json(cls, data: Any, *, where: str) -> Plan:
        """Read back what `to_json` wrote, or raise `PlanError` saying that it is no plan of this version."""
        try:
            if data["format"] != PLAN_FORMAT:
                raise PlanError(f"{where}: a plan of format {data['format']!r}, this version reads {PLAN_FORMAT}. Plan again.")
            values = {item.name: data[item.name] for item in fields(cls)}
            values |= {
                "window": Window(
                    since=_moment(data["window"]["since"]), until=_moment(data["window"]["until"]), bounded=data["window"]["bounded"]
                ),
                "source": SourcePin.from_json(data["source"]),
                "rows": RowCounts(**data["rows"]),
                "actions": ActionCounts(**data["actions"]),
                "embedding": Embedding(**data["embedding"]),
                "newest": _moment(data["newest"]),
                "notes": tuple(data["notes"]),
                "guards": tuple(Guard(**_numbers(guard)) for guard in data["guards"]),
            }
            return cls(**values)
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"{where}: not a plan of this version ({str(error)[:200]}). Plan again with `plan --out`.") from error


def check(
    *,
    rows: RowCounts,
    actions: ActionCounts,
    base_live: int,
    window: Window,
    live_now: int | None,
    newest: datetime | None,
    limits: Limits,
    live_before: int | None = None,
) -> tuple[Guard, ...]:
    """Measure a plan against its limits; every guard reports, whether it passed or not.

    `live_now` is how many products the catalog holds, None where nobody counted; `live_before` how many readers
    see today where that is not the base. Of a narrow window without rows only
    its start is known to be older than the newest row.
    """
    before = base_live if live_before is None else live_before
    guards = [
        _guard(
            "duplicates",
            rows.duplicate / max(rows.read, 1),
            limits.max_duplicate_ratio,
            "The feed repeats ids. Look at `plan --explain`; if repeats are normal, raise `gates.max_duplicate_ratio`.",
        ),
        _guard(
            "quarantine",
            rows.quarantined / max(rows.read, 1),
            limits.quarantine_ratio,
            "Rows were rejected; `plan --explain` lists the reasons and `plan --out` writes the rows. Mend the feed, or raise `gates.quarantine_ratio`.",
            exit_code=QUARANTINE_FULL,
        ),
    ]
    if base_live:
        guards.append(
            _guard(
                "deletes",
                actions.delete / base_live,
                limits.max_delete_ratio,
                "More products would vanish than a night explains. If that is right, raise `gates.max_delete_ratio` for this run.",
            )
        )
    if live_now is not None:
        guards.append(
            _guard(
                "completeness",
                live_now / before if before else float(live_now > 0),
                limits.min_rows_ratio if before else 1.0,
                "The feed is empty or cut short. Check the export; if the catalog did shrink, lower `source.completeness.min_rows_ratio`.",
                at_least=True,
            )
        )
    if limits.max_age_s is not None:
        latest = newest or window.since
        age_s = (window.until - latest).total_seconds() if latest else float("inf")
        guards.append(
            _guard(
                "freshness",
                age_s,
                limits.max_age_s,
                "The newest row is older than the contract allows: the export has probably stopped. Raise `source.completeness.max_age` if not.",
            )
        )
    return tuple(guards)


def another_tower(live: str, wanted: str) -> Guard:
    """Return the guard against embedding the whole catalog again by surprise."""
    return _guard(
        "tower",
        1.0,
        0.0,
        f"The configured tower or its template ({wanted[:12]}) is not what the live index was made with ({live[:12]}). If the index was switched, set `tower: path` and `document: template` to what it has; if it shall be, build beside it with `catalog-embed backfill --tower`, then `publish`.",
    )


def _guard(name: str, measured: float, limit: float, advice: str, *, exit_code: int = GUARD_TRIPPED, at_least: bool = False) -> Guard:
    passed = measured >= limit if at_least else measured <= limit
    return Guard(name=name, passed=passed, measured=measured, limit=limit, advice=advice, exit_code=exit_code)


def _plain(value: Any) -> Any:
    """Turn dataclasses, times and pins into JSON types; a number that JSON lacks becomes null."""
    match value:
        case SourcePin():
            plain: Any = {**value.to_json(), "digest": value.digest}
        case datetime():
            plain = value.isoformat()
        case Mapping():
            plain = {key: _plain(item) for key, item in sorted(value.items())}
        case tuple() | list():
            plain = [_plain(item) for item in value]
        case float():
            plain = value if math.isfinite(value) else None
        case _ if is_dataclass(value):
            plain = {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
        case _:
            plain = value
    return plain


def _moment(text: str | None) -> Any:
    return None if text is None else datetime.fromisoformat(text)


def _numbers(guard: Mapping[str, Any]) -> dict[str, Any]:
    return {**guard, **{name: float(guard[name]) for name in ("measured", "limit")}}
