"""Moving the alias and cleaning up: validate, publish, rollback, gc, pin, and the lease of a dead run."""

from __future__ import annotations

import getpass
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

from jobs.inspect import named, require_store
from jobs.nightly import fingerprint_of, open_store
from jobs.records import new_run_id, note_metrics
from jobs.settings import Settings
from pipelines.errors import NotFound, PlanError
from pipelines.gates import Gate, judge
from pipelines.generation import lease_name
from pipelines.heads import recall_of
from pipelines.index.segments import segments_of
from pipelines.leases import BACKFILL, WRITING, LeaseEntry, break_lease
from pipelines.manifest import check_generation
from pipelines.probes import Candidate, measure
from pipelines.publish import LogEntry, current, history, publish, read_manifest, rollback
from pipelines.retention import GcPlan, Pin, Removed, RetentionOptions, TableSweep, apply_gc, pin, pins, plan_gc, unpin
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
    """Make a written candidate live, if it still follows what is live now. What is live already stays as it is."""
    store = require_store(settings)
    alias = settings.publish.alias
    manifest = read_manifest(store, generation)
    head = current(store, alias)
    live = head.generation if head else None
    if head is not None and live == generation and not (head.hold and release_hold):
        return head
    if live not in (manifest.parent, generation):
        if any(entry.generation == generation for entry in history(store, alias)):
            raise PlanError(f"{generation} was live on `{alias}` before {live}: `catalog-embed rollback --to {generation}` returns to it.")
        raise PlanError(
            f"{generation} was built on {manifest.parent or 'nothing'}, but `{alias}` has moved on to {live or 'nothing'}: "
            "publishing it would undo what happened in between. Build it again with the same command; what is embedded is kept."
        )
    return publish(
        store,
        alias=alias,
        generation=generation,
        expected_seq=head.seq if head else 0,
        run_id=new_run_id(_now()),
        clock=_now,
        reason=reason,
        release_hold=release_hold,
    )


def other_tower(settings: Settings, generation: str) -> str | None:
    """Say so where the next run would use another tower than a generation was made with."""
    made, configured = read_manifest(require_store(settings), generation).tower, fingerprint_of(settings)
    if made == configured:
        return None
    return f"{generation} was made by the tower {made[:12]}, and the configuration names {configured[:12]}: change `tower: path` before the next run"


def roll_back(settings: Settings, *, to: str | None, hold: bool, reason: str) -> LogEntry:
    """Make the previous generation live again, or the one named."""
    store = require_store(settings)
    alias, run_id, readable = settings.publish.alias, new_run_id(_now()), partial(segments_of, store)
    return rollback(store, alias=alias, run_id=run_id, reason=reason, clock=_now, to=to, hold=hold, check=readable)


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
    note_metrics(settings, {("orphan_bytes", ()): float(plan.bytes)})
    if not apply:
        return Collected(plan=plan, removed=None)

    def sweep(key: str, wanted: TableSweep) -> int:
        uri, options = store.uri(key), settings.store.options
        age = max(timedelta(0), _now() - wanted.cutoff)
        strays = lance.stray_tags(uri, keep=wanted.kept.keys(), older_than=age, options=options) if wanted.strays else ()
        for tag in {*wanted.dropped, *strays}:
            lance.untag(uri, tag, options)
        versions = frozenset(wanted.kept.values())
        return len(lance.sweep(uri, keep_versions=versions, older_than=age, options=options, dry_run=False).versions_removed)

    removed = apply_gc(store, plan, sweep_table=sweep, clock=_now)
    note_metrics(settings, {("orphan_bytes", ()): 0.0})
    return Collected(plan=plan, removed=removed)


def keep(settings: Settings, generation: str, *, reason: str) -> Pin:
    """Keep a generation from being collected until it is let go."""
    return pin(require_store(settings), generation, reason=reason, by=getpass.getuser(), clock=_now)


def let_go(settings: Settings, generation: str) -> bool:
    """Leave a generation to its age; say whether it was kept by hand."""
    store = require_store(settings)
    there = generation in pins(store)
    unpin(store, check_generation(generation))
    return there


def end_lease(settings: Settings, *, tower: Path | None = None, ahead: bool = False) -> LeaseEntry | None:
    """Take the lease from a run that is dead or must not publish, or from a backfill that embeds ahead; return who had it."""
    if "://" not in settings.store.root and not Path(settings.store.root).exists():
        return None
    name = lease_name(fingerprint_of(settings, tower), BACKFILL if ahead else WRITING)
    return break_lease(open_store(settings), name, run_id=new_run_id(_now()), clock=_now)


def _now() -> datetime:
    return datetime.now(tz=UTC)
