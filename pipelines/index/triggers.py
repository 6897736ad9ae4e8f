"""When an index is extended, folded, compacted or trained anew: rules over what was measured, with no engine and no file.

Deltas and tombstones cost a reader nothing, because it merges segments when it opens them. They cost space and the
time of opening; compaction ends that. What decays with time is the fit of the centroids, and only training mends it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from pipelines.errors import InputError
from pipelines.index.choosing import Budget, choose_spec, fitting, memory_bytes, ranked
from pipelines.index.spec import IndexSpec, Segment, check_factory

Action = Literal["none", "delta", "fold", "compact", "rebuild"]
Trigger = Literal["empty", "first", "format", "settings", "size", "segments", "deltas", "tombstones", "imbalance", "drift", "recall"]
TRIGGERS: tuple[Trigger, ...] = (
    "empty",
    "first",
    "format",
    "settings",
    "size",
    "segments",
    "deltas",
    "tombstones",
    "imbalance",
    "drift",
    "recall",
)


# Entries that all lie on their centroids, as equal texts do, have no drift to multiply.
_LEAST_DRIFT = 1e-3


@dataclass(frozen=True, kw_only=True)
class RefreshOptions:
    """When an index is extended, and when it is made anew, and what it has to reach.

    `delta_until` is a share of live products, `tombstones_until` of stored entries: past either, segments are compacted.
    Past `max_segments` the deltas are folded into one. `imbalance_until` and `drift_until` are multiples of what training
    left: past either, the lists are trained again. `probes_until` is how many times more entries a query may visit than
    after training before the lists are trained again. `factory` overrides the choice of the index. From
    `distribute_above` products on, workers encode them.
    """

    delta_until: float = 0.5
    tombstones_until: float = 0.35
    max_segments: int = 32
    imbalance_until: float = 1.5
    drift_until: float = 1.25
    probes_until: float = 1.3
    recall_at_10: float = 0.97
    memory_bytes: int | None = None
    latency_ms: float | None = None
    factory: str | None = None
    distribute_above: int = 2_000_000

    def __post_init__(self) -> None:
        for name in ("delta_until", "tombstones_until", "recall_at_10"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise InputError(f"`{name}` is {value}; it is a share, from 0 to 1.")
        for name in ("imbalance_until", "drift_until", "probes_until"):
            value = getattr(self, name)
            if not value >= 1:
                raise InputError(f"`{name}` is {value}; it is a multiple of what training left, from 1.")
        if self.distribute_above < 0:
            raise InputError(f"`distribute_above` is {self.distribute_above}; it is a number of products, from 0.")
        if self.max_segments < 1:
            raise InputError(f"`max_segments` is {self.max_segments}; at least one segment is needed.")
        for name in ("memory_bytes", "latency_ms"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"`{name}` is {value}; a budget is more than nothing.")
        if self.factory is not None:
            check_factory(self.factory)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What becomes of the index tonight, which trigger asked for it (None: the night's own changes), and why, in words."""

    action: Action
    trigger: Trigger | None
    reason: str


@dataclass(frozen=True, kw_only=True)
class Change:
    """What a night brings: new entries, older entries that it hides, entries hidden before, and products live afterwards."""

    num_added: int
    num_gone: int
    num_hidden: int
    num_live: int


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How well the lists fit what they hold now, beside what they were trained on."""

    imbalance: float
    trained_imbalance: float
    spread: float
    trained_spread: float


def decide(segments: Sequence[Segment], change: Change, *, options: RefreshOptions, dims: int) -> Decision:
    """Say what a night's counts call for. The first rule that holds decides."""
    base = next((segment for segment in segments if segment.kind == "base"), None)
    if not change.num_live:
        return Decision(action="rebuild" if segments else "none", trigger="empty", reason="no product is live")
    if base is None:
        return Decision(action="rebuild", trigger="first", reason="there is no base segment yet")
    if misfit := _misfit(base, change, options, dims=dims):
        return misfit
    if not change.num_added and not change.num_gone:
        return Decision(action="none", trigger=None, reason="no vector is new and none is gone")
    if worn := _worn(segments, change, options):
        return worn
    reason = f"{change.num_added} entries are new and {change.num_gone} are hidden, within the limits"
    return Decision(action="delta", trigger=None, reason=reason)


def decide_fit(fit: Fit, options: RefreshOptions) -> Decision | None:
    """Say whether the lists no longer fit what they hold, or None."""
    if fit.imbalance > options.imbalance_until * fit.trained_imbalance:
        now = f"lists are {fit.imbalance:.2f} times as costly as even ones, {fit.trained_imbalance:.2f} after training"
        return Decision(action="rebuild", trigger="imbalance", reason=f"{now}: more than {options.imbalance_until:g} times as much")
    if fit.spread > options.drift_until * fit.trained_spread + _LEAST_DRIFT:
        now = f"entries are {fit.spread:.4f} from their centroids, {fit.trained_spread:.4f} after training"
        return Decision(action="rebuild", trigger="drift", reason=f"{now}: more than {options.drift_until:g} times as far")
    return None


def candidates(rows: int, dims: int, options: RefreshOptions) -> Sequence[IndexSpec]:
    """Return the indexes to try for so many products: the asked one, or those that suit the budget, the best first."""
    if options.factory is not None or options.recall_at_10 <= 0:
        return [wanted(rows, dims, options)]
    budget = Budget(recall=options.recall_at_10, memory_bytes=options.memory_bytes, latency_ms=options.latency_ms)
    return [choice.spec for choice in ranked(rows, dims, budget)]


def wanted(rows: int, dims: int, options: RefreshOptions) -> IndexSpec:
    """Return the index that so many products should have."""
    if options.factory is not None:
        return fitting(IndexSpec(factory=options.factory, dims=dims), rows)
    return choose_spec(rows, dims, recall=options.recall_at_10, memory_bytes=options.memory_bytes, latency_ms=options.latency_ms)


def _misfit(base: Segment, change: Change, options: RefreshOptions, *, dims: int) -> Decision | None:
    """Say whether the base is of the wrong kind. What the budget would choose today counts past a factor of two in size."""
    if base.spec.dims != dims:
        return Decision(action="rebuild", trigger="settings", reason=f"the base has {base.spec.dims} dimensions and the tower {dims}")
    if options.factory is not None:
        asked = wanted(change.num_live, dims, options).factory
        reason = f"the base is {base.spec.factory} and the configuration asks for {asked}"
        return Decision(action="rebuild", trigger="settings", reason=reason) if base.spec.factory != asked else None
    if base.trained is not None and base.trained.rows / 2 <= change.num_live <= base.trained.rows * 2:
        taken = memory_bytes(base.spec, change.num_live)
        if options.memory_bytes is None or taken <= options.memory_bytes:
            return None
        reason = f"{base.spec.factory} would take {taken} bytes of memory, more than {options.memory_bytes}"
        return Decision(action="rebuild", trigger="size", reason=reason)
    # Compared at the borders of a band, so that a catalog at the border of two kinds does not alternate between them.
    chosen = wanted(change.num_live, dims, options).factory
    if base.spec.factory in {chosen, *_near(change.num_live, dims, options)}:
        return None
    reason = f"{change.num_live} products are live, and {chosen} suits them better than {base.spec.factory}"
    return Decision(action="rebuild", trigger="size", reason=reason)


def _near(rows: int, dims: int, options: RefreshOptions) -> Iterator[str]:
    """Yield what half and twice as many products should have, where the budget allows anything."""
    for size in (max(rows // 2, 1), rows * 2):
        with suppress(InputError):
            yield wanted(size, dims, options).factory


def _worn(segments: Sequence[Segment], change: Change, options: RefreshOptions) -> Decision | None:
    """Say which limit of an incremental index is passed."""
    fresh = change.num_added + sum(segment.rows for segment in segments if segment.kind == "delta")
    if fresh > options.delta_until * change.num_live:
        reason = f"delta segments would hold {fresh} of {change.num_live} live products, more than {options.delta_until:.0%}"
        return Decision(action="compact", trigger="deltas", reason=reason)
    hidden = change.num_hidden + change.num_gone
    entries = change.num_added + sum(segment.rows for segment in segments)
    if hidden > options.tombstones_until * entries:
        reason = f"tombstones would hide {hidden} of {entries} entries, more than {options.tombstones_until:.0%}"
        return Decision(action="compact", trigger="tombstones", reason=reason)
    count = len(segments) + bool(change.num_added)
    if count > options.max_segments:
        return Decision(action="fold", trigger="segments", reason=f"there would be {count} segments, more than {options.max_segments}")
    return None
