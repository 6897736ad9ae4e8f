"""A run, in order: lease, base, plan, guards, embed, apply, segment, gates, generation, publish.

Killed anywhere, a run leaves what is published untouched; the next one repeats at most the parts that were in flight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.build import Build, Embedded, EmbedOptions, Space, TableOptions
from pipelines.candidate import apply, segment
from pipelines.contracts import FAISS_INDEX, LANCE_INDEX, Source, Window
from pipelines.diff.dealing import first_embedded
from pipelines.errors import SourceMoved
from pipelines.gates import GATE_FAILED, Gate, GateLimits, Measured, Waiver, failed, judge, to_json, verdicts
from pipelines.heads import recall_of, take_generation
from pipelines.index.triggers import RefreshOptions, candidates
from pipelines.index.update import NextIndex
from pipelines.leases import BACKFILL, WRITING, Lease, held
from pipelines.manifest import Manifest, ManifestObject, canonical
from pipelines.plan import QUARANTINE_FULL, Guard, Plan
from pipelines.planned_rows import fetch
from pipelines.planning import PlanRequest
from pipelines.prepare import Preparer
from pipelines.probes import Candidate, measure
from pipelines.publish import LogEntry, current, publish, write_generation
from pipelines.schema import ACTION, ID, ID_HASH, REASON, TEXT
from pipelines.storage import Store
from pipelines.stores.parquet import write_rows
from pipelines.telemetry import Recorder
from pipelines.turns import Turn
from pipelines.work import deal, embed

Outcome = Literal["published", "built", "nothing", "gates_failed", "guarded"]

_REPLAYED = 16


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a plan is carried out."""

    store: Store
    options: Mapping[str, str] = field(repr=False)
    space: Space
    embedding: EmbedOptions
    table: TableOptions
    refresh: RefreshOptions
    limits: GateLimits
    waivers: tuple[Waiver, ...] = ()
    samples: int = 128
    publish: bool = True
    reason: str = ""
    lease: timedelta = timedelta(minutes=10)
    config_digest: str = "none"
    versions: Mapping[str, str] = field(default_factory=dict)
    clock: Callable[[], datetime]


@dataclass(frozen=True, kw_only=True)
class Located:
    """A plan and its files: the changes with their rows in the source, the rejected rows, and the state it starts from."""

    plan: Plan
    changes: Path
    quarantine: Path
    previous: Sequence[Path]
    base: Manifest | None
    # What the alias named when this was planned, and in which entry.
    parent: str | None
    seq: int


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What a run came to."""

    outcome: Outcome
    exit_code: int
    run_id: str
    plan: Plan
    generation: str | None = None
    entry: LogEntry | None = None
    gates: tuple[Gate, ...] = ()
    embedded: Embedded | None = None
    index: NextIndex | None = None
    recall: Mapping[str, float] = field(default_factory=dict)
    quarantined: Mapping[str, int] = field(default_factory=dict)
    guards: tuple[Guard, ...] = ()
    # Up to when the base is known to be in step with the catalog, where nothing had to be done.
    in_step: datetime | None = None
    # Why a good candidate was not published: somebody holds the alias.
    held: str | None = None
    bytes_written: int = 0
    bytes_total: int = 0


def lease_name(fingerprint: str, kind: str = WRITING) -> str:
    """Return what runs of a tower lease: its space."""
    return f"{kind}{fingerprint[:16]}"


def leased(
    options: RunOptions, run_id: str, *, ahead: bool = False, wait: timedelta = timedelta(0), tell: Callable[[str], object] = str
) -> Any:
    """Hold the lease of the space while the block runs; `ahead` that of the one backfill that may embed for it beside other runs."""
    name = lease_name(options.space.card.fingerprint, BACKFILL if ahead else WRITING)
    return held(options.store, name, run_id=run_id, ttl=options.lease, clock=options.clock, wait=wait, tell=tell)


def embed_ahead(
    source: Source,
    located: Located,
    request: PlanRequest,
    options: RunOptions,
    *,
    recorder: Recorder,
    run_id: str,
    paid_by: frozenset[str],
    work: Path,
    turn: Turn,
) -> Embedded | None:
    """Make the parts of a plan that need a forward pass durable, in turns with runs that go first. Nobody's reading changes.

    Without the lease of the table: what is published may move meanwhile, and `carry_out` takes from the parts what then still fits.
    """
    if located.plan.failed or not located.plan.actions.changed:
        return None
    build = _build(located, request, options, recorder=recorder, run_id=run_id, paid_by=paid_by, work=work)
    with recorder.stage("deal"):
        dealt = deal(build, located.changes, located.previous)
    return embed(build, dealt, source.read(request.window), ahead=turn)


def carry_out(
    source: Source,
    located: Located,
    request: PlanRequest,
    options: RunOptions,
    *,
    lease: Lease,
    recorder: Recorder,
    run_id: str,
    paid_by: frozenset[str] = frozenset(),
    work: Path,
) -> Ran:
    """Carry a plan out: the caller holds the lease, and made the plan from the base that is still live."""
    plan = located.plan
    if plan.failed:
        return Ran(outcome="guarded", exit_code=plan.exit_code, run_id=run_id, plan=plan, guards=plan.failed, quarantined=plan.rejected)
    if not plan.actions.changed and located.base is not None and not _rewrites(located, request) and not _outrun(located, options):
        base = located.base.generation
        if options.publish and request.selection is None and base != located.parent:
            # A run that was to publish it died in between.
            built: dict[str, Any] = {"run_id": run_id, "plan": plan, "generation": base, "quarantined": plan.rejected}
            return _published(located, request, options, lease=lease, facts=built)
        in_step = _settled(located, request).until
        return Ran(outcome="nothing", exit_code=0, run_id=run_id, plan=plan, quarantined=plan.rejected, in_step=in_step)
    # A budget or a factory that cannot be had is said before anything is embedded.
    candidates(max(plan.base_live + plan.actions.add - plan.actions.delete, 1), options.space.card.dims, options.refresh)
    build = _build(located, request, options, recorder=recorder, run_id=run_id, paid_by=paid_by, work=work)
    build = replace(build, generation=take_generation(options.store, run_id))
    with recorder.stage("deal"):
        dealt = deal(build, located.changes, located.previous)
    options.store.failpoint("run.dealt")
    embedded = embed(build, dealt, source.read(request.window))
    if (now := source.snapshot()) != plan.source:
        moved = "; ".join(plan.source.moved(now)[:3])
        raise SourceMoved(f"the catalog changed while it was read again ({moved}). Run again: vectors that are made are kept.")
    quarantined = Counter(plan.rejected)
    quarantined.update(embedded.rejected.column(REASON).to_pylist())
    kept = _keep_quarantine(options.store, located, embedded, run_id=run_id)
    if (guard := _too_many(plan, sum(quarantined.values()), request)) is not None:
        return Ran(outcome="guarded", exit_code=guard.exit_code, run_id=run_id, plan=plan, guards=(guard,), quarantined=quarantined)
    texts = _some_texts(source, located, request, embedded)
    lease.check()
    facts: dict[str, Any] = {"quarantined": quarantined, "quarantine": kept, "texts": texts}
    return _finish(located, request, options, build, embedded, lease=lease, recorder=recorder, **facts)


def _outrun(located: Located, options: RunOptions) -> bool:
    """Whether a candidate of another tower is in step with the catalog, and yet no longer follows the live generation.

    A generation of the same content that follows it costs no vector, and can be published.
    """
    base = located.base
    return base is not None and not options.publish and located.parent not in (base.generation, base.parent)


def _some_texts(source: Source, located: Located, request: PlanRequest, embedded: Embedded) -> Mapping[str, str]:
    """Return the texts of a few products that have new vectors: the gates embed them again, one by one.

    Also where an earlier attempt embedded them: what its gates refused must not pass by being there already.
    """
    chosen = first_embedded(located.changes, limit=_REPLAYED)
    chosen = chosen.filter(pc.invert(pc.is_in(chosen.column(ID_HASH), embedded.lost.column(ID_HASH))))
    if not chosen.num_rows:
        return {}
    shards = {shard.name: shard for shard in source.read(request.window)}
    rows, texts = fetch(chosen, shards.get, Preparer(normalizing=request.normalizing, template=request.template))
    return dict(zip(rows.column(ID).to_pylist(), texts.to_pylist(), strict=True))


def _rewrites(located: Located, request: PlanRequest) -> bool:
    """Whether the filter columns changed since the base: then the table is written anew, with the vectors that it has."""
    return located.base is not None and located.base.schema_digest != request.normalizing.schema.digest


def _build(
    located: Located, request: PlanRequest, options: RunOptions, *, recorder: Recorder, run_id: str, paid_by: frozenset[str], work: Path
) -> Build:
    return Build(
        store=options.store,
        options=options.options,
        run_id=run_id,
        generation="",
        space=options.space,
        base=located.base,
        preparer=Preparer(normalizing=request.normalizing, template=request.template),
        embedding=options.embedding,
        table=options.table,
        refresh=options.refresh,
        diff=request.diff,
        work=work,
        observer=recorder,
        samples=options.samples,
        rewrite=_rewrites(located, request),
        afresh=request.selection is not None and request.selection.again,
        paid_by=paid_by,
    )


def _too_many(plan: Plan, quarantined: int, request: PlanRequest) -> Guard | None:
    """Return the guard that trips where rows that could not be embedded fill the quarantine."""
    share, limit = quarantined / max(plan.rows.read, 1), request.limits.quarantine_ratio
    if share <= limit or quarantined == plan.rows.quarantined:
        return None
    advice = "Rows could not be embedded; the run's quarantine.parquet lists them. Mend them, or raise `gates.quarantine_ratio`."
    return Guard(name="quarantine", passed=False, measured=share, limit=limit, advice=advice, exit_code=QUARANTINE_FULL)


def _finish(
    located: Located,
    request: PlanRequest,
    options: RunOptions,
    build: Build,
    embedded: Embedded,
    *,
    lease: Lease,
    recorder: Recorder,
    quarantined: Mapping[str, int],
    quarantine: tuple[ManifestObject, ...],
    texts: Mapping[str, str],
) -> Ran:
    """Apply, index, measure, write the generation, and publish it if it is good."""
    plan, store = located.plan, options.store
    actions = plan.actions
    lost_updates = int(pc.sum(pc.equal(embedded.lost.column(ACTION), TEXT)).as_py() or 0)
    lost_adds = embedded.lost.num_rows - lost_updates
    live = plan.base_live + actions.add - actions.delete - lost_adds - lost_updates
    if build.rewrite:
        live = actions.add + actions.text + actions.attr - embedded.lost.num_rows
    applied = apply(build, embedded, live=live)
    index = segment(build, embedded, applied, live=live)
    manifest = Manifest(
        generation=build.generation,
        parent=located.parent,
        created_at=options.clock(),
        run_id=build.run_id,
        source=plan.source,
        window=_settled(located, request),
        tower=options.space.card.fingerprint,
        template_digest=plan.template_digest,
        schema_digest=plan.schema_digest,
        config_digest=options.config_digest,
        table=applied.pin,
        parts=(*(build.extends.parts if build.extends else ()), *embedded.parts),
        segments=index.segments,
        tombstones=index.tombstones,
        attachments=(*options.space.objects, *quarantine),
        indexes={FAISS_INDEX: index.use, LANCE_INDEX: applied.use},
        counts={"live": live, "rejected": sum(quarantined.values()), "read": plan.rows.read},
        versions=options.versions,
    )
    lease.check()
    measured = _measure(located, options, embedded, manifest, texts=texts, recorder=recorder)
    gates = judge(measured, options.limits, options.waivers, options.clock().date())
    store.failpoint("run.judged")
    lease.check()
    report = canonical({"format": 1, "plan": plan.to_json(), "index": index.report, "table_index": asdict(applied.use)})
    whole = write_generation(
        store,
        replace(manifest, gates=verdicts(gates)),
        {"gates.json": to_json(gates), "report.json": report},
    )
    facts: dict[str, Any] = {
        "run_id": build.run_id,
        "plan": plan,
        "generation": build.generation,
        "gates": gates,
        "embedded": embedded,
        "index": index,
        "recall": measured.recall,
        "quarantined": quarantined,
        "bytes_written": _written(whole, located.base),
        "bytes_total": sum(item.size for item in whole.objects),
    }
    if failed(gates):
        return Ran(outcome="gates_failed", exit_code=GATE_FAILED, **facts)
    if not options.publish:
        return Ran(outcome="built", exit_code=0, **facts)
    return _published(located, request, options, lease=lease, facts=facts)


def _published(located: Located, request: PlanRequest, options: RunOptions, *, lease: Lease, facts: Mapping[str, Any]) -> Ran:
    """Make a good generation live, unless somebody holds the alias."""
    store = options.store
    lease.check()
    if (head := current(store, request.alias)) is not None and head.hold:
        return Ran(outcome="built", exit_code=0, held=f"held on {head.generation} ({head.reason or 'no reason given'})", **facts)
    entry = publish(
        store,
        alias=request.alias,
        generation=facts["generation"],
        expected_seq=located.seq,
        run_id=facts["run_id"],
        clock=options.clock,
        reason=options.reason,
    )
    return Ran(outcome="published", exit_code=0, entry=entry, **facts)


def _settled(located: Located, request: PlanRequest) -> Window:
    """Return the window up to which the new generation is whole.

    A part of the catalog, or one that leaves a gap behind the last watermark, moves the watermark no further: what lies
    between is read by the next run.
    """
    window, base = located.plan.window, located.base
    if base is None:
        return window
    gap = window.since is not None and window.since > base.window.until
    return base.window if gap or window.bounded or request.selection is not None else window


def _keep_quarantine(store: Store, located: Located, embedded: Embedded, *, run_id: str) -> tuple[ManifestObject, ...]:
    """Keep every rejected row, those of the plan and those that could not be embedded, beside the run's parts."""
    rows = pa.concat_tables([pq.read_table(located.quarantine).cast(embedded.rejected.schema), embedded.rejected])
    if not rows.num_rows:
        return ()
    ref = store.put(f"vectors/{run_id}/quarantine.parquet", write_rows(rows))
    return (ManifestObject.of(ref, role="quarantine", rows=rows.num_rows),)


def _measure(
    located: Located, options: RunOptions, embedded: Embedded, manifest: Manifest, *, texts: Mapping[str, str], recorder: Recorder
) -> Measured:
    """Probe the candidate, with the plan and the previous generation beside it."""
    return measure(
        Candidate(
            store=options.store,
            options=options.options,
            manifest=manifest,
            base=located.base,
            recall_before=recall_of(options.store, located.base),
            new_parts=embedded.parts,
            texts=texts,
            delete_ratio=located.plan.actions.delete / located.plan.base_live if located.plan.base_live else 0.0,
            samples=options.samples,
            recall_filtered=options.limits.recall_filtered,
            token_budget=options.embedding.token_budget,
        ),
        recorder,
    )


def _written(manifest: Manifest, base: Manifest | None) -> int:
    before = {item.key for item in base.objects} if base else set()
    return sum(item.size for item in manifest.objects if item.key not in before)
