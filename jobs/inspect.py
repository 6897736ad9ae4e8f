"""Looking at what is there: status, runs, generations, differences, one product's way, searching, exporting."""

from __future__ import annotations

import tempfile
from collections.abc import Generator, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from jobs.nightly import Bases, Night, on_cluster, open_source_of, open_store, plan_request
from jobs.records import all_runs
from jobs.settings import Settings
from jobs.watching import Working, working
from pipelines.diff import diff, first_ids
from pipelines.errors import CatalogEmbedError, InputError, NotFound, SourceError
from pipelines.gates import from_json
from pipelines.hashes import id_hashes, text_hashes, vids
from pipelines.index.segments import FAISS, read_roster, read_tombstones, segments_of
from pipelines.layout import byte_size, duration, printable
from pipelines.leases import live_leases
from pipelines.manifest import GENERATION, Manifest, generation_number
from pipelines.planning import texts_of
from pipelines.publish import current, history, open_manifest, read_manifest
from pipelines.reader import Reader, open_generation
from pipelines.retention import pins
from pipelines.schema import (
    ACTION,
    ATTR_HASH,
    FIELD,
    ID,
    ID_HASH,
    LIVE,
    REASON,
    ROW,
    SCANNED,
    SHARD,
    STAGE,
    STATE,
    TEXT_BYTES,
    TEXT_HASH,
    UPDATED_AT,
    VECTOR,
)
from pipelines.storage import Store
from pipelines.stores import lance
from pipelines.stores.parquet import decode, export, read_part
from pipelines.summary import RunFacts


@dataclass(frozen=True, kw_only=True)
class Status:
    """How the alias stands."""

    alias: str
    generation: str | None
    seq: int = 0
    held: bool = False
    reason: str = ""
    published_at: datetime | None = None
    watermark: datetime | None = None
    lag_s: float | None = None
    stale: bool = False
    live: int = 0
    tower: str = ""
    gates: Mapping[str, str] | None = None
    segments: int = 0
    bytes: int = 0
    working: tuple[Working, ...] = ()
    last_run: RunFacts | None = None

    def text(self) -> str:
        """Lay it out on a screen."""
        lines = [*self._published()] if self.generation else [f"{self.alias}: nothing is published yet. Start with `catalog-embed run`."]
        lines += [f"  working    {item.shown()}" for item in self.working]
        if self.last_run is not None and self.generation is not None:
            last = self.last_run
            lines += [f"  last run   {last.run_id}  {last.command}  {last.outcome.replace('_', ' ')}  exit {last.exit_code}"]
        return "\n".join(lines)

    def _published(self) -> Iterator[str]:
        yield f"{self.alias}  {self.generation}  entry {self.seq}" + (
            f"  HELD: {printable(self.reason) or 'no reason given'}" if self.held else ""
        )
        yield f"  published  {self.published_at:%Y-%m-%d %H:%M} UTC, {self.live:,} products, {self.segments} segments, {byte_size(self.bytes)}"
        behind = duration(max(self.lag_s or 0.0, 0.0))
        yield f"  watermark  {self.watermark:%Y-%m-%d %H:%M} UTC, in step {behind} ago{'  STALE' if self.stale else ''}"
        yield f"  tower      {self.tower[:12]}"
        bad = sorted(name for name, verdict in (self.gates or {}).items() if verdict not in ("passed", "skipped"))
        yield f"  gates      {len(self.gates or {})} judged{', look at ' + ', '.join(bad) if bad else ', none warned'}"


def require_store(settings: Settings) -> Store:
    """Open a store that must be there."""
    if "://" not in settings.store.root and not Path(settings.store.root).exists():
        raise NotFound(f"there is no store at {settings.store.root} yet. Run `catalog-embed run` to make the first generation.")
    return open_store(settings)


def look(settings: Settings, *, max_lag: timedelta | None, now: datetime | None = None) -> Status:
    """Return how the alias stands; `stale` says whether the watermark is older than `max_lag`."""
    store = require_store(settings)
    at = now or datetime.now(tz=UTC)
    entry = current(store, settings.publish.alias)
    now_working = working(store, at)
    runs = [facts for facts in all_runs(store).values() if facts is not None]
    last = runs[-1] if runs else None
    if entry is None:
        return Status(alias=settings.publish.alias, generation=None, working=now_working, last_run=last, stale=max_lag is not None)
    manifest = open_manifest(store, entry)
    lag = (at - manifest.window.until).total_seconds()
    # A night without changes publishes nothing, and yet the index is in step: such a run counts as well.
    in_step = [facts.in_step for facts in runs if facts.in_step is not None and facts.base == manifest.generation]
    lag = min([lag, *((at - moment).total_seconds() for moment in in_step)])
    return Status(
        alias=settings.publish.alias,
        generation=manifest.generation,
        seq=entry.seq,
        held=entry.hold,
        reason=entry.reason,
        published_at=entry.at,
        watermark=manifest.window.until,
        lag_s=lag,
        stale=max_lag is not None and lag > max_lag.total_seconds(),
        live=manifest.counts["live"],
        tower=manifest.tower,
        gates=dict(manifest.gates),
        segments=sum(item.role == FAISS for item in manifest.segments),
        bytes=sum(item.size for item in manifest.objects),
        working=now_working,
        last_run=last,
    )


def running(store: Store) -> frozenset[str]:
    """Return the runs that hold a lease now."""
    return frozenset(lease.run_id for lease in live_leases(store, datetime.now(tz=UTC)).values())


@dataclass(frozen=True, kw_only=True)
class Listed:
    """A generation that was written, and how it stands: live, published before, or a candidate. Without a manifest it is damaged."""

    name: str
    manifest: Manifest | None
    standing: str


def generations(settings: Settings) -> Iterator[Listed]:
    """Yield every generation that was written whole, oldest first."""
    store = require_store(settings)
    entries = history(store, settings.publish.alias)
    published = {entry.generation for entry in entries}
    pinned = pins(store)
    names = {info.key.split("/")[1] for info in store.list("generations") if info.key.endswith("/manifest.json")}
    for name in sorted(filter(GENERATION.fullmatch, names), key=generation_number):
        try:
            manifest = read_manifest(store, name)
        except CatalogEmbedError as error:
            yield Listed(name=name, manifest=None, standing=f"damaged: {error}")
            continue
        if entries and entries[-1].generation == name:
            standing = "live, held" if entries[-1].hold else "live"
        elif name in published:
            standing = "published before"
        else:
            standing = f"gates failed: {', '.join(manifest.failed_gates)}" if manifest.failed_gates else "candidate"
        if name in pinned:
            standing += f", pinned by {pinned[name].by}{': ' + pinned[name].reason if pinned[name].reason else ''}"
        yield Listed(name=name, manifest=manifest, standing=standing)


def lineage(store: Store, manifest: Manifest) -> Iterator[Manifest]:
    """Yield a generation and those that it grew from, newest first, as far as they are kept."""
    yield manifest
    with suppress(NotFound):
        while manifest.parent is not None:
            manifest = read_manifest(store, manifest.parent)
            yield manifest


def quarantined(store: Store, manifest: Manifest) -> Iterator[tuple[str, pa.Table]]:
    """Yield the run and the rejected rows of every run that led to a generation, newest first."""
    for one in lineage(store, manifest):
        for item in one.attachments:
            if item.role == "quarantine":
                yield one.run_id, decode(store.read_verified(item), where=item.key)


def named(settings: Settings, generation: str | None) -> Manifest:
    """Return the manifest of a generation, or of the live one."""
    store = require_store(settings)
    if generation is not None:
        return read_manifest(store, generation)
    entry = current(store, settings.publish.alias)
    if entry is None:
        raise NotFound(f"alias `{settings.publish.alias}` names nothing yet. Run `catalog-embed run` first.")
    return open_manifest(store, entry)


def compare(settings: Settings, before: str, after: str, *, limit: int) -> tuple[Mapping[str, int], Mapping[str, list[str]]]:
    """Return how many products two generations differ in, by action, and up to `limit` ids of each."""
    store = require_store(settings)
    one, two = read_manifest(store, before), read_manifest(store, after)
    with tempfile.TemporaryDirectory(prefix="catalog-embed-") as folder:
        previous, now = _state(store, one, settings), _scanned(_state(store, two, settings))
        found = diff(previous, now, outcome=Path(folder) / "changes.parquet", options=settings.diff)
        return found.actions, first_ids(found.changes, previous, now, limit=limit)


def _state(store: Store, manifest: Manifest, settings: Settings) -> pa.Table:
    table = _table(manifest)
    return pa.concat_tables(lance.read_published(store.uri(table.uri), version=table.version, options=settings.store.options))


def _scanned(rows: pa.Table) -> pa.Table:
    filled = {STATE: pa.repeat(pa.scalar(LIVE, pa.int8()), rows.num_rows), TEXT_BYTES: pa.repeat(pa.scalar(0, pa.int32()), rows.num_rows)}
    filled |= {SHARD: pa.repeat("generation", rows.num_rows), ROW: pa.array(range(rows.num_rows), pa.int64())}
    filled |= {UPDATED_AT: pa.nulls(rows.num_rows, SCANNED.field(UPDATED_AT).type)}
    return pa.Table.from_arrays(
        [filled.get(item.name, rows.column(item.name) if item.name in rows.schema.names else None) for item in SCANNED], schema=SCANNED
    )


def _table(manifest: Manifest) -> Any:
    if manifest.table is None:
        raise InputError(f"{manifest.generation} pins no table. Choose another generation.")
    return manifest.table


def reader(settings: Settings, *, generation: str | None = None) -> Reader:
    """Open the live generation, or another, for one look."""
    require_store(settings)
    return open_generation(
        settings.store.root, settings.publish.alias, options=settings.store.options, generation=generation, reload_s=None
    )


def export_to(settings: Settings, target: Path, *, generation: str | None) -> tuple[str, int]:
    """Write one clean snapshot of a generation as Parquet; return its id and how many rows it has."""
    manifest = named(settings, generation)
    table, store = _table(manifest), require_store(settings)
    uri, options = store.uri(table.uri), settings.store.options
    columns = [ID, TEXT_HASH, ATTR_HASH, *lance.TableSearcher(uri, table.version, options).kept, VECTOR]
    rows = lance.read_rows(uri, version=table.version, columns=columns, options=options, batch_rows=1 << 14)
    written = export(rows, Store.open(target))
    return manifest.generation, sum(item.rows or 0 for item in written)


def trace(settings: Settings, product: str, *, verbose: bool) -> Iterator[tuple[str, str]]:
    """Follow one product from its row to the gates; yield what each step knows of it."""
    store = require_store(settings)
    manifest = named(settings, None)
    id_hash = id_hashes(pa.array([product], pa.string()))
    yield "product", product
    yield "id hash", id_hash[0].as_py().hex()
    now = yield from _from_source(settings, product, verbose=verbose)
    table = _table(manifest)
    searcher = lance.TableSearcher(store.uri(table.uri), table.version, settings.store.options)
    rows = searcher.rows([product], [TEXT_HASH, ATTR_HASH, *searcher.kept]).to_pylist()
    yield "generation", f"{manifest.generation}, tower {manifest.tower[:12]}"
    if rows:
        row = rows[0]
        yield "table", f"version {table.version}: text hash {row[TEXT_HASH].hex()}, attribute hash {row[ATTR_HASH].hex()}"
        for name in searcher.kept:
            yield f"  {name}", str(row[name])
        if now is not None and now != row[TEXT_HASH].hex():
            yield "note", "the text has changed since: the next run embeds it again"
    else:
        yield "table", f"version {table.version} has no such product"
        if now is not None:
            yield "note", "the catalog has it and the index does not: `catalog-embed backfill --reason missing` adds it"
    yield from _from_quarantine(store, manifest, product)
    yield from _from_parts(store, manifest, id_hash)
    yield from _from_segments(store, manifest, id_hash)
    yield from _from_gates(store, manifest, product)


def _from_source(settings: Settings, product: str, *, verbose: bool) -> Generator[tuple[str, str], None, str | None]:
    """Read the product's row once more, show its text as it would be now, and return the text's hash."""
    request = plan_request(settings, Night(since="beginning"), Bases(live=None, extended=None, seq=0))
    try:
        with on_cluster(settings, verbose=verbose):
            found = texts_of(open_source_of(settings), [product], request)
    except SourceError as error:
        yield "source", f"cannot be read now: {error}"
        return None
    if product not in found:
        yield "source", "no live row has this id"
        return None
    text = found[product]
    now: str = text_hashes(pa.array([text]))[0].as_py().hex()
    yield "text now", text
    yield "text hash now", now
    return now


def _from_quarantine(store: Store, manifest: Manifest, product: str) -> Iterator[tuple[str, str]]:
    """Say in which runs the product's row was rejected, and why."""
    for run_id, rows in quarantined(store, manifest):
        for row in rows.filter(pc.equal(rows.column(ID), product)).to_pylist():
            yield "quarantine", f"run {run_id}: {row[STAGE]}, {row[REASON]} in {row[FIELD]}, row {row[ROW]} of {row[SHARD]}"


def _from_parts(store: Store, manifest: Manifest, id_hash: pa.Array) -> Iterator[tuple[str, str]]:
    """Name the parts of the vector log that hold the product, newest first."""
    for item in reversed(manifest.parts):
        rows = read_part(store, item, columns=[ID_HASH, ACTION, TEXT_HASH])
        for row in rows.filter(pc.is_in(rows.column(ID_HASH), id_hash)).to_pylist():
            text = row[TEXT_HASH].hex() if row[TEXT_HASH] else "-"
            yield "part", f"{item.key}: {row[ACTION]}, text hash {text}"


def _from_segments(store: Store, manifest: Manifest, id_hash: pa.Array) -> Iterator[tuple[str, str]]:
    number = vids(id_hash)
    segments = segments_of(store, manifest)
    hidden = read_tombstones(store, manifest)
    for segment in segments:
        at, there = read_roster(store, segment).position(number)
        if there[0]:
            gone = segment.name in hidden and hidden[segment.name][at[0]]
            yield (
                "segment",
                f"{segment.name} ({segment.kind}, {segment.rows:,} rows): number {number[0]}{', hidden by a tombstone' if gone else ''}",
            )


def _from_gates(store: Store, manifest: Manifest, product: str) -> Iterator[tuple[str, str]]:
    key = f"generations/{manifest.generation}/gates.json"
    for gate in from_json(store.get(key), where=key):
        if product in gate.ids:
            yield "gate", f"{gate.name}: {gate.verdict}, measured {gate.measured}"
