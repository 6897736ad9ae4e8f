"""Moving the alias and cleaning up: validate, publish, rollback, gc."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from jobs.inspect import named, require_store
from jobs.records import new_run_id
from jobs.settings import Settings
from pipelines.errors import NotFound, PlanError
from pipelines.gates import Gate, judge
from pipelines.generation import recall_of
from pipelines.probes import Candidate, measure
from pipelines.publish import LogEntry, current, publish, read_manifest, rollback
from pipelines.retention import GcPlan, Removed, RetentionOptions, TableSweep, apply_gc, plan_gc
from pipelines.stores import lance
from pipelines.telemetry import Recorder


def validate(settings: Settings, generation: str | None) -> tuple[str, tuple[Gate, ...]]:
    """Measure a generation again, every object of it read back, and judge it by today's limits. Nothing changes."""
    store = require_store(settings)
    manifest = named(settings, generation)
    before = None
    if manifest.parent is not None:
        with suppress(NotFound):
            before = read_manifest(store, manifest.parent)
    found = measure(
        Candidate(
            store=store,
            options=settings.store.options,
            manifest=manifest,
            base=before,
            recall_before=recall_of(store, before),
            samples=settings.gates.samples,
        ),
        Recorder("validate"),
    )
    return manifest.generation, judge(found, settings.gate_limits, settings.gates.waivers, datetime.now(tz=UTC).date())


def publish_candidate(settings: Settings, generation: str, *, reason: str, release_hold: bool) -> LogEntry:
    """Make a written candidate live, if it still follows what is live now."""
    store = require_store(settings)
    manifest = read_manifest(store, generation)
    head = current(store, settings.publish.alias)
    live = head.generation if head else None
    if live not in (manifest.parent, generation):
        raise PlanError(
            f"{generation} was built on {manifest.parent or 'nothing'}, but `{settings.publish.alias}` has moved on to {live or 'nothing'}: "
            "publishing it would undo what happened in between. Build it again with the same command; what is embedded is kept."
        )
    return publish(
        store,
        alias=settings.publish.alias,
        generation=generation,
        expected_seq=head.seq if head else 0,
        run_id=new_run_id(_now()),
        clock=_now,
        reason=reason,
        release_hold=release_hold,
    )


def roll_back(settings: Settings, *, to: str | None, hold: bool, reason: str) -> LogEntry:
    """Make the previous generation live again, or the one named."""
    store = require_store(settings)
    return rollback(store, alias=settings.publish.alias, run_id=new_run_id(_now()), reason=reason, clock=_now, to=to, hold=hold)


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What a collection found, and what it removed where it was told to."""

    plan: GcPlan
    removed: Removed | None


def collect(settings: Settings, *, apply: bool, keep: int | None, grace: timedelta | None) -> Collected:
    """Say what nothing needs any more, and with `apply` remove it."""
    store = require_store(settings)
    chosen = settings.publish
    options = RetentionOptions(keep=keep or chosen.keep, grace=grace or chosen.grace)
    plan = plan_gc(store, now=_now(), options=options)
    if not apply:
        return Collected(plan=plan, removed=None)

    def sweep(key: str, wanted: TableSweep) -> int:
        uri = store.uri(key)
        for tag in wanted.dropped:
            lance.untag(uri, tag, settings.store.options)
        versions = frozenset(wanted.kept.values())
        age = max(timedelta(0), _now() - wanted.cutoff)
        return len(lance.sweep(uri, keep_versions=versions, older_than=age, options=settings.store.options, dry_run=False).versions_removed)

    return Collected(plan=plan, removed=apply_gc(store, plan, sweep_table=sweep, clock=_now))


def _now() -> datetime:
    return datetime.now(tz=UTC)
