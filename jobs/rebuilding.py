"""`rebuild`: the live generation once more, from its vector log alone."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from jobs.nightly import Night, make_space, run_options
from jobs.records import Record, open_record
from jobs.settings import Settings
from pipelines.build import Build
from pipelines.contracts import Window
from pipelines.errors import InputError
from pipelines.gates import GATE_FAILED, Gate, failed, verdicts
from pipelines.generation import RunOptions, leased
from pipelines.heads import take_generation
from pipelines.leases import Lease
from pipelines.manifest import Manifest
from pipelines.prepare import Preparer
from pipelines.publish import LogEntry, current, open_manifest, publish
from pipelines.recovery import rebuild


def rebuild_live(settings: Settings, night: Night) -> Record:
    """Rebuild what the alias names, and publish the outcome if its gates pass."""
    with open_record(settings, command=night.command, listeners=night.listeners) as record:
        entry = current(record.store, settings.publish.alias)
        if entry is None:
            raise InputError("nothing is published yet, so there is nothing to rebuild. Run `catalog-embed run` first.")
        lost = open_manifest(record.store, entry)
        options = run_options(settings, record.store, make_space(settings, record.store), night)
        with tempfile.TemporaryDirectory(prefix="catalog-embed-") as folder, leased(options, record.run_id) as lease:
            build = _build(settings, options, record, lost, Path(folder))
            record.facts = replace(record.facts, base=lost.generation)
            made, gates = rebuild(build, lost, limits=options.limits, waivers=options.waivers, samples=options.samples)
            lease.check()
            _end(record, options, made, gates, entry=entry, lease=lease)
    return record


def _build(settings: Settings, options: RunOptions, record: Record, lost: Manifest, work: Path) -> Build:
    return Build(
        store=options.store,
        options=options.options,
        run_id=record.run_id,
        generation=take_generation(options.store, record.run_id),
        space=options.space,
        base=None,
        preparer=Preparer(normalizing=settings.normalizing(Window(since=None, until=lost.window.until)), template=settings.template),
        embedding=options.embedding,
        table=options.table,
        refresh=options.refresh,
        diff=settings.diff,
        work=work,
        observer=record.recorder,
    )


def _end(record: Record, options: RunOptions, made: Manifest, gates: tuple[Gate, ...], *, entry: LogEntry, lease: Lease) -> None:
    """Publish what passed, and note what the rebuild came to."""
    known = {gate.name.removeprefix("recall_"): gate.measured for gate in gates if gate.name in ("recall_faiss", "recall_lance")}
    facts = replace(
        record.facts,
        generation=made.generation,
        gates=verdicts(gates),
        recall={name: value for name, value in known.items() if isinstance(value, float)},
        index_action="rebuild",
        index_reason="made anew from the vector log",
        generation_bytes=sum(item.size for item in made.objects),
    )
    if failed(gates):
        record.facts = replace(facts, outcome="gates_failed", exit_code=GATE_FAILED)
    elif entry.hold or not options.publish:
        record.facts = replace(facts, outcome="built", exit_code=0, held=entry.reason or "held" if entry.hold else None)
    else:
        lease.check()
        moved = publish(
            options.store,
            alias=record.facts.alias,
            generation=made.generation,
            expected_seq=entry.seq,
            run_id=record.run_id,
            clock=options.clock,
            reason="rebuilt from the vector log",
        )
        record.facts = replace(facts, outcome="published", exit_code=0, alias_seq=moved.seq)
