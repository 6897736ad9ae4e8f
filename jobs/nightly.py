"""The nightly run: resolve the window, open what is published, plan, and carry the plan out under one lease."""

from __future__ import annotations

import hashlib
import importlib.metadata
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from encoder.registry import TowerOptions, default_tower, read_card
from jobs.cluster import connected
from jobs.logs import event
from jobs.records import Record, open_record
from jobs.settings import Settings
from pipelines.build import Embedded, EmbedOptions, Space, TableOptions
from pipelines.contracts import Source, Window
from pipelines.diff import Selection
from pipelines.diff.dealing import with_rows
from pipelines.errors import InputError, PlanError
from pipelines.generation import Located, RunOptions, carry_out, embed_ahead, leased
from pipelines.heads import heads
from pipelines.layout import ahead_of
from pipelines.leases import Lease
from pipelines.manifest import Manifest
from pipelines.plan import Deletes
from pipelines.planning import Base, Planned, PlanRequest, made_otherwise, make_plan, sample_changes, texts_of
from pipelines.schema import ADD, TEXT
from pipelines.sources import open_source
from pipelines.storage import Store
from pipelines.telemetry import Listener
from pipelines.towers import bring, install
from pipelines.turns import Turn
from pipelines.window import resolve
from pipelines.work import work_digest

# A partition of this size is joined in about a second and 1 GB; past it, partitions go to the cluster's workers.
_PARTITION_ROWS = 20_000_000
_VERSIONED = ("catalog-embed", "ray", "torch", "transformers", "pylance", "lancedb", "faiss-cpu", "pyarrow", "duckdb")


@dataclass(frozen=True, kw_only=True)
class Night:
    """What one run is asked to do, beyond the project's settings."""

    since: str = "last"
    until: datetime | None = None
    now: datetime | None = None
    deletes: Deletes | None = None
    verbose: bool = False
    publish: bool = True
    reason: str = ""
    command: str = "run"
    # The most actors that embed at a time.
    max_parallel: int | None = None
    # The patience with another run that holds the lease.
    wait: timedelta = timedelta(0)
    # A backfill: another tower beside the live one, or a part of the products.
    tower: Path | None = None
    selection: Selection | None = None
    # Names what is made again, in the words of who asked: started anew after a death, the backfill goes on with what it made.
    intent: str | None = None
    listeners: Sequence[Listener] = field(default=(), repr=False)


@dataclass(frozen=True, kw_only=True)
class Bases:
    """Where a night starts: the live generation, the one whose vectors are extended, and the number of the last log entry."""

    live: Manifest | None
    extended: Manifest | None
    seq: int


@dataclass(frozen=True, kw_only=True)
class PlannedNight:
    """A plan with its files, and what it was made from, so that one may look closer."""

    result: Planned
    source: Source
    request: PlanRequest

    def samples(self, limit: int) -> dict[str, list[tuple[str, str]]]:
        """Return up to `limit` products for each action, as id and text; what goes has no text."""
        chosen = sample_changes(self.result, limit=limit)
        texts = texts_of(self.source, [name for action in (ADD, TEXT) for name in chosen[action]], self.request)
        return {action: [(name, texts.get(name, "")) for name in names] for action, names in chosen.items()}


@contextmanager
def planned(settings: Settings, night: Night) -> Iterator[PlannedNight]:
    """Plan a night. The plan's files live until the block ends; nothing is written to the store."""
    bases = open_bases(settings, night)
    source = open_source_of(settings)
    request = plan_request(settings, night, bases)
    with (
        tempfile.TemporaryDirectory(prefix="catalog-embed-") as work,
        on_cluster(settings, verbose=night.verbose),
    ):
        event("plan.started", alias=request.alias, base=bases.live.generation if bases.live else "none", since=_shown(request.window))
        result = make_plan(source, base=base_of(settings, bases.extended), request=request, work=Path(work))
        yield PlannedNight(result=result, source=source, request=request)


def run_night(settings: Settings, night: Night) -> Record:
    """Plan a night and carry it out; the record of the run is in the store, whatever it came to."""
    with started(settings, night) as work:
        work.finish(*work.plan(settings, night))
    return work.record


@dataclass(frozen=True, kw_only=True)
class Work:
    """A run that has begun: it holds the lease and is connected to Ray."""

    settings: Settings
    record: Record
    source: Source
    options: RunOptions
    lease: Lease
    folder: Path
    intent: str | None = None

    def plan(self, settings: Settings, night: Night) -> tuple[Located, PlanRequest]:
        """Plan from what is published now; the plan's files live in the folder."""
        bases = open_bases(settings, night)
        request = plan_request(settings, night, bases)
        with self.record.recorder.stage("plan") as progress:
            result = make_plan(self.source, base=base_of(settings, bases.extended), request=request, work=self.folder)
            progress.advance(result.plan.rows.read)
        located = Located(
            plan=result.plan,
            changes=_located(result, self.folder, request),
            quarantine=result.quarantine,
            previous=result.previous,
            base=bases.extended,
            parent=bases.live.generation if bases.live else None,
            seq=bases.seq,
        )
        return located, request

    def embed(self, located: Located, request: PlanRequest, *, number: int) -> Embedded | None:
        """Embed what the n-th plan wants, in turns with runs that go first, and leave it for `finish`."""
        self.record.planned(located.plan)
        begun = self._begun(located, into=ahead_of(self.record.run_id, number))
        turn = Turn(store=Store.open(self.record.store.root, options=self.options.options), run_id=self.record.run_id)
        return embed_ahead(self.source, located, request, self.options, recorder=self.record.recorder, work=self.folder, turn=turn, **begun)

    def finish(self, located: Located, request: PlanRequest, *, ahead: Embedded | None = None) -> None:
        """Carry a plan out, and note what it came to, with what was embedded ahead of it."""
        self.record.planned(located.plan)
        begun = self._begun(located, into=self.record.run_id)
        how: dict[str, Any] = {"lease": self.lease, "recorder": self.record.recorder, "work": self.folder}
        ran = carry_out(self.source, located, request, self.options, **how, **begun)
        if ran.generation is not None:
            self.record.settle(self.intent)
        self.record.ended(ran if ahead is None or ran.embedded is None else replace(ran, embedded=ran.embedded.after(ahead)))

    def _begun(self, located: Located, *, into: str) -> dict[str, Any]:
        """Return under which name the work was begun, and which runs have paid for vectors that are to be made again."""
        options = self.options
        digest = work_digest(options.space, base=located.base, changes=located.changes, part_rows=options.embedding.part_rows)
        return {"run_id": self.record.resume(digest, into=into, intent=self.intent), "paid_by": self.record.begun(self.intent)}


@contextmanager
def started(settings: Settings, night: Night, *, ahead: bool = False) -> Iterator[Work]:
    """Begin a run: its record, its tower in the store, the lease, a folder for its files, and Ray.

    The lease is that of the space, or `ahead` that of the one backfill that embeds for it while other runs publish.
    """
    with open_record(settings, command=night.command, listeners=night.listeners) as record:
        space = make_space(settings, record.store, tower=night.tower)
        options = run_options(settings, record.store, space, night)
        source = open_source_of(settings)
        with (
            tempfile.TemporaryDirectory(prefix="catalog-embed-") as folder,
            leased(options, record.run_id, ahead=ahead, wait=night.wait, tell=record.waits) as lease,
            on_cluster(settings, verbose=night.verbose),
        ):
            yield Work(
                settings=settings, record=record, source=source, options=options, lease=lease, folder=Path(folder), intent=night.intent
            )


def on_cluster(settings: Settings, *, verbose: bool = False) -> AbstractContextManager[None]:
    """Use the project's cluster while the block runs."""
    ray = settings.ray
    return connected(ray.address, verbose=verbose, insecure=ray.insecure, wait_s=ray.wait_s)


def _located(result: Planned, work: Path, request: PlanRequest) -> Path:
    changes = work / "located.parquet"
    with_rows(result.changes, result.previous, result.current, outcome=changes, options=request.diff)
    return changes


def open_bases(settings: Settings, night: Night) -> Bases:
    """Open the live generation, and the one that this night's tower extends. Reads only."""
    if "://" not in settings.store.root and not Path(settings.store.root).exists():
        return Bases(live=None, extended=None, seq=0)
    store = open_store(settings)
    live, extended, seq = heads(store, settings.publish.alias, fingerprint_of(settings, night.tower))
    return Bases(live=live, extended=extended, seq=seq)


def open_store(settings: Settings) -> Store:
    """Open the store of the project."""
    return Store.open(settings.store.root, options=settings.store.options)


def tower_directory(settings: Settings, tower: Path | None = None) -> Path:
    """Return where the tower is that embeds: the one asked for, the configured one, or the packaged default."""
    if tower is not None:
        return tower
    if settings.tower.path and "://" in settings.tower.path:
        return bring(settings.tower.path, settings.store.options)
    return Path(settings.tower.path) if settings.tower.path else default_tower()


def tower_options(settings: Settings) -> TowerOptions:
    """Return what the project asks of its tower."""
    tower = settings.tower
    return TowerOptions(template_digest=settings.template.digest, dims=tower.dims, max_tokens=tower.max_tokens, dtype=tower.dtype)


def fingerprint_of(settings: Settings, tower: Path | None = None) -> str:
    """Return the fingerprint of the tower that embeds."""
    return read_card(tower_directory(settings, tower), tower_options(settings)).fingerprint


def make_space(settings: Settings, store: Store, *, tower: Path | None = None) -> Space:
    """Put the tower into the store, where workers and readers find it, and say how its vectors are kept."""
    directory = tower_directory(settings, tower)
    options = tower_options(settings)
    card = read_card(directory, options)
    return Space(
        directory=directory,
        card=card,
        options=options,
        objects=install(store, directory, card),
        schema=settings.schema,
        vector=settings.embed.vector,
    )


def run_options(settings: Settings, store: Store, space: Space, night: Night) -> RunOptions:
    """Gather how a plan is carried out."""
    embed, index = settings.embed, settings.index
    return RunOptions(
        store=store,
        options=settings.store.options,
        space=space,
        embedding=EmbedOptions(
            part_rows=embed.part_rows,
            actors=embed.actors,
            at_most=night.max_parallel,
            gpus_per_actor=embed.gpus_per_actor,
            token_budget=embed.token_budget,
            threads=embed.threads,
            lanes=embed.lanes,
            tokenize=embed.tokenize,
            resources=embed.resources,
            wait_s=settings.ray.wait_s,
        ),
        table=TableOptions(
            vector_index=index.lance.type,
            scalar=settings.scalar_columns,
            text=index.lance.text,
            flat_below=index.lance.flat_below,
            fold_after=index.lance.fold_after,
            distribute_above=index.lance.distribute_above,
        ),
        refresh=settings.refresh_options,
        limits=settings.gate_limits,
        waivers=settings.gates.waivers,
        samples=settings.gates.samples,
        publish=night.publish,
        reason=night.reason,
        lease=settings.publish.lease,
        config_digest=config_digest(settings),
        versions=versions(),
        # Leases and entries of the log follow the real clock, whatever moment a plan pretends it is.
        clock=lambda: datetime.now(tz=UTC),
    )


def config_digest(settings: Settings) -> str:
    """Hash the settings as they are shown, secrets masked."""
    return hashlib.sha256("\n".join(f"{key}={value}" for key, value, _ in settings.describe()).encode()).hexdigest()


def versions() -> Mapping[str, str]:
    """Return the versions that a generation is made with."""
    return {name: importlib.metadata.version(name) for name in _VERSIONED}


def open_source_of(settings: Settings) -> Source:
    """Open the project's catalog."""
    return open_source(settings.source, columns=settings.columns_read, fields=settings.schema.fields)


def base_of(settings: Settings, manifest: Manifest | None) -> Base | None:
    """Return what a plan needs of a generation."""
    if manifest is None:
        return None
    if manifest.table is None:
        raise PlanError(f"generation {manifest.generation} pins no table, so there is nothing to compare with. Run `catalog-embed doctor`.")
    return Base(
        generation=manifest.generation,
        live=manifest.counts["live"],
        watermark=manifest.window.until,
        table_uri=open_store(settings).uri(manifest.table.uri),
        table_version=manifest.table.version,
        template_digest=manifest.template_digest,
        schema_digest=manifest.schema_digest,
        tower=manifest.tower,
        options=settings.store.options,
    )


def plan_request(settings: Settings, night: Night, bases: Bases) -> PlanRequest:
    """Resolve what a night asks for against what is published."""
    now = night.now or datetime.now(tz=UTC)
    base = base_of(settings, bases.extended)
    beside = base_of(settings, bases.live) if bases.live is not None and bases.live is not bases.extended else None
    if night.selection is not None:
        _check_selectable(settings, base, live=bases.live)
    watermark = base.watermark if base else None
    # A catalog without update times cannot be narrowed, so its nights read everything.
    since = "beginning" if night.since == "last" and settings.columns.updated_at is None else night.since
    # A part of the catalog is what was asked for, to the second.
    lookback = settings.plan.lookback if night.until is None else timedelta(0)
    window = resolve(since, now=now, tz=settings.zone, lookback=lookback, watermark=watermark)
    if night.until is not None:
        window = Window(since=window.since, until=min(night.until, now), bounded=True)
    elif beside or (base and made_otherwise(base, template=settings.template, schema=settings.schema)):
        window = Window(since=None, until=window.until)
    return PlanRequest(
        alias=settings.publish.alias,
        window=window,
        zone=settings.project.timezone,
        lookback=lookback,
        template=settings.template,
        normalizing=settings.normalizing(window),
        limits=settings.limits,
        deletes="off" if night.selection is not None else night.deletes or settings.plan.deletes,
        diff=settings.diff,
        partitions=settings.plan.partitions or _partitions(base),
        tower=fingerprint_of(settings, night.tower),
        beside=beside,
        beside_allowed=night.tower is not None,
        selection=night.selection,
    )


def _check_selectable(settings: Settings, base: Base | None, *, live: Manifest | None) -> None:
    """Refuse a part of the products where only a whole catalog can be carried out."""
    if base is None:
        made = f"{live.generation} was made by another tower or template" if live else "nothing is published yet"
        raise InputError(
            f"{made}, so there is nothing to fill in. {'See `backfill --tower`' if live else 'Run `catalog-embed run` first'}."
        )
    if changed := made_otherwise(base, template=settings.template, schema=settings.schema):
        raise InputError(
            f"{' and '.join(changed)} changed since {base.generation}, which concerns every product. Run `catalog-embed run` first."
        )


def _partitions(base: Base | None) -> int:
    return 1 + (base.live if base else 0) // _PARTITION_ROWS


def _shown(window: Window) -> str:
    return window.since.isoformat() if window.since else "beginning"
