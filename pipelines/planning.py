"""The first half of a run: read, prepare, diff, judge. It stops before anything is written to the store."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import partial
from itertools import repeat
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.contracts import Source, SourcePin, Window
from pipelines.diff import Difference, Selection, combine, count_texts, diff, first_ids, merge
from pipelines.diff.dealing import with_rows
from pipelines.diff.engine import DiffOptions
from pipelines.errors import InputError, PlanError, SourceMoved
from pipelines.manifest import Manifest
from pipelines.normalize import NormalizeOptions
from pipelines.plan import ActionCounts, Deletes, Embedding, Limits, Plan, RowCounts, another_tower, check
from pipelines.prepare import Prepared, Preparer, PresentIds, TextsOf
from pipelines.schema import (
    ATTR,
    DELETE,
    EXCERPT,
    FIELD,
    HASH,
    ID,
    ID_HASH,
    PUBLISHED,
    QUARANTINE,
    REASON,
    ROW,
    SCANNED,
    SHARD,
    STAGE,
    TEXT,
    TEXT_HASH,
    UPDATED_AT,
    ProductSchema,
)
from pipelines.spool import Spool
from pipelines.text import Template
from pipelines.workers import scan, spread

DUPLICATE_ID = "duplicate_id"
# What a saved plan holds beside plan.json, which lists their sha256.
PLAN_FILES = ("changes.parquet", "quarantine.parquet")

# For catalogs so small that no text falls into the sample.
_TOKENS_PER_BYTE = 0.25


@dataclass(frozen=True, kw_only=True)
class Base:
    """The published generation that a plan starts from."""

    generation: str
    live: int
    watermark: datetime
    table_uri: str
    table_version: int
    template_digest: str
    schema_digest: str
    tower: str = ""
    options: Mapping[str, str] = field(default_factory=dict, repr=False)
    manifest: Manifest | None = None


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What to plan, and within which bounds."""

    alias: str
    window: Window
    zone: str
    lookback: timedelta
    template: Template
    normalizing: NormalizeOptions
    limits: Limits
    deletes: Deletes = "auto"
    diff: DiffOptions = field(default_factory=DiffOptions)
    partitions: int = 1
    partitions_in_flight: int = 2
    # The tower that will embed, by its fingerprint, and the live generation where another tower made that one.
    tower: str = ""
    beside: Base | None = None
    beside_allowed: bool = False
    selection: Selection | None = None

    def __post_init__(self) -> None:
        if self.deletes not in ("auto", "tombstones", "scan", "off"):
            raise InputError(f"--deletes `{self.deletes}` is unknown. Use auto, tombstones, scan or off.")
        if self.partitions < 1:
            raise InputError(f"`partitions` is at least 1, not {self.partitions}.")

    @property
    def scans_ids(self) -> bool:
        """Whether all ids are read beside the window: a narrow window alone cannot tell what is gone."""
        return not self.window.full and self.deletes in ("auto", "scan")


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A plan and the files behind it, in a work folder that the caller removes."""

    plan: Plan
    changes: Path
    quarantine: Path
    previous: list[Path]
    current: list[Path]


@dataclass
class _Tally:
    """What is counted while batches stream by."""

    until: datetime
    read: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    repaired: Counter[str] = field(default_factory=Counter)
    sample_tokens: int = 0
    sample_bytes: int = 0
    newest: datetime | None = None

    def reject(self, reason: str, count: int) -> None:
        """Count rows that are rejected after their batch was prepared."""
        if count:
            self.rejected[reason] += count

    def add(self, batch: Prepared) -> None:
        """Count one batch."""
        self.read += batch.rows_in
        self.repaired.update(dict(batch.repaired))
        self.sample_tokens += batch.sample_tokens
        self.sample_bytes += batch.sample_bytes
        self.rejected.update(batch.rejected.column(REASON).to_pylist())
        times = batch.rows.column(UPDATED_AT)
        # A time in the future was set to `until`; it says nothing about how fresh the feed is.
        newest = pc.max(times.filter(pc.less(times, pa.scalar(self.until, times.type)))).as_py()
        if newest is not None:
            self.newest = max(newest, self.newest or newest)


@dataclass(frozen=True, kw_only=True)
class _Sides:
    """Both sides of the diff, spooled, and what was learnt on the way."""

    pin: SourcePin
    previous: list[Path]
    current: list[Path]
    present: list[Path] | None
    num_present: int | None
    rejects: Spool
    tally: _Tally


def make_plan(source: Source, *, base: Base | None, request: PlanRequest, work: Path) -> Planned:
    """Compare a source with the published generation. Reads only; every file it makes lies in `work`."""
    sides = _read_sides(source, base, request, work)
    difference = _diff(sides, request, work)
    sides.rejects.add(_conflict_rejects(difference.conflicts))
    sides.tally.reject(DUPLICATE_ID, difference.conflicts.num_rows)
    quarantine = work / "quarantine.parquet"
    merge(sides.rejects.close(), by=(SHARD, ROW, REASON), outcome=quarantine, options=request.diff)
    return Planned(
        plan=_judge(sides, difference, base, request),
        changes=difference.changes,
        quarantine=quarantine,
        previous=sides.previous,
        current=sides.current,
    )


def make_room(directory: Path) -> None:
    """Make the folder for a plan to be saved in; refuse one that holds anything, before any work is done."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        taken = any(directory.iterdir())
    except OSError as error:
        raise InputError(f"cannot save a plan in {directory}: {error.strerror}. Choose a folder that you may write to.") from error
    if taken:
        raise InputError(f"{directory} is not empty. A plan is never written over another: choose a new folder for --out.")


def save(planned: Planned, directory: Path) -> None:
    """Write a plan where `apply` finds it: changes with ids, quarantined rows, and plan.json last, which makes it whole."""
    make_room(directory)
    with_rows(planned.changes, planned.previous, planned.current, outcome=directory / "changes.parquet")
    shutil.copyfile(planned.quarantine, directory / "quarantine.parquet")
    data = {**planned.plan.to_json(), "files": {name: file_sha256(directory / name) for name in PLAN_FILES}}
    text = json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    (directory / "plan.json").write_text(text, encoding="utf-8")


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sample_changes(planned: Planned, *, limit: int) -> dict[str, list[str]]:
    """Return up to `limit` ids for each action: the ones with the smallest hashes, so always the same."""
    return first_ids(planned.changes, planned.previous, planned.current, limit=limit)


def texts_of(source: Source, ids: Sequence[str], request: PlanRequest) -> dict[str, str]:
    """Read the source once more and return the texts of these products, as the tower would read them."""
    look = TextsOf(normalizing=request.normalizing, template=request.template, ids=tuple(ids))
    rows = [row for table in scan(source.read(request.window), look) for row in table.to_pylist()] if ids else []
    return {row[ID]: row["text"] for row in rows}


def _read_sides(source: Source, base: Base | None, request: PlanRequest, work: Path) -> _Sides:
    """Pin the source, then spool the published state, the catalog and, for a narrow window, all ids there are."""
    pin = source.snapshot()
    previous = Spool(work, "previous", PUBLISHED, partitions=request.partitions)
    if base is not None:
        from pipelines.stores.lance import read_published  # noqa: PLC0415  a second of imports that a first plan need not pay

        for table in read_published(base.table_uri, version=base.table_version, options=base.options):
            previous.add(table)
        if previous.num_rows != base.live:
            raise PlanError(
                f"generation {base.generation} promises {base.live} products but its table holds {previous.num_rows}. "
                "Run `catalog-embed doctor`, then `catalog-embed rollback`."
            )
    current = Spool(work, "current", SCANNED, partitions=request.partitions)
    rejects = Spool(work, "rejects", QUARANTINE)
    tally = _Tally(until=request.window.until)
    preparer = Preparer(normalizing=request.normalizing, template=request.template)
    for table in scan(source.read(request.window), preparer.packed):
        for batch in Prepared.unpack(table):
            current.add(batch.rows)
            rejects.add(batch.rejected)
            tally.add(batch)
    present = _spool_present(source, request, work) if request.scans_ids else None
    now = source.snapshot()
    if now != pin:
        raise SourceMoved(f"the catalog changed while it was read ({'; '.join(pin.moved(now)[:3])}). Plan again when the export is done.")
    return _Sides(
        pin=pin,
        previous=previous.close(),
        current=current.close(),
        present=present.close() if present else None,
        num_present=present.num_rows if present else None,
        rejects=rejects,
        tally=tally,
    )


def _spool_present(source: Source, request: PlanRequest, work: Path) -> Spool:
    """Spool the id hashes of every product that the source holds and does not call deleted."""
    present = Spool(work, "present", pa.schema([(ID_HASH, HASH)]), partitions=request.partitions)
    for table in scan(source.ids(), PresentIds(normalizing=request.normalizing)):
        present.add(table)
    return present


def _diff(sides: _Sides, request: PlanRequest, work: Path) -> Difference:
    """Diff in one join, or partition by partition on the cluster's workers; the outcome is the same."""
    absent_goes = request.window.full and request.deletes != "tombstones"
    how = partial(diff, absent_goes=absent_goes, deletes=request.deletes != "off", selection=request.selection, options=request.diff)
    outcome = work / "changes.parquet"
    if request.partitions == 1:
        return how(sides.previous, sides.current, present=sides.present, outcome=outcome)
    partitions = zip(sides.previous, sides.current, sides.present or repeat(None), strict=False)
    parts: list[Difference] = []
    arguments = ((how, *map(_read, partition)) for partition in partitions)
    for index, (difference, changes) in enumerate(spread(_diff_partition, arguments, in_flight=request.partitions_in_flight)):
        path = work / f"changes-{index:03d}.parquet"
        path.write_bytes(changes)
        parts.append(replace(difference, changes=path))
    return combine(parts, outcome=outcome, options=request.diff)


def _read(path: Path | None) -> pa.Table | None:
    return None if path is None else pq.read_table(path)


def _diff_partition(
    how: Callable[..., Difference], previous: pa.Table, current: pa.Table, present: pa.Table | None
) -> tuple[Difference, bytes]:
    """Diff one partition on a worker, which has no folder in common with the driver."""
    with tempfile.TemporaryDirectory(prefix="catalog-embed-") as folder:
        outcome = Path(folder) / "changes.parquet"
        return how(previous, current, present=present, outcome=outcome), outcome.read_bytes()


def _conflict_rejects(conflicts: pa.Table) -> pa.Table:
    """Turn rows that lost against an equally new one into quarantine records."""
    fixed = {STAGE: "diff", REASON: DUPLICATE_ID, FIELD: ID, EXCERPT: b""}
    columns = [
        pa.repeat(pa.scalar(fixed[item.name], item.type), conflicts.num_rows) if item.name in fixed else conflicts.column(item.name)
        for item in QUARANTINE
    ]
    return pa.Table.from_arrays(columns, schema=QUARANTINE)


def _judge(sides: _Sides, difference: Difference, base: Base | None, request: PlanRequest) -> Plan:
    """Put the counts together, check that every row is accounted for, and measure the plan against its limits."""
    tally = sides.tally
    rows = RowCounts(
        read=tally.read,
        live=difference.live,
        deleted=difference.tombstones,
        duplicate=difference.duplicates,
        quarantined=sum(tally.rejected.values()),
    )
    counts = difference.actions
    base_live = base.live if base else 0
    live_before = max(base_live, request.beside.live if request.beside else 0)
    actions = ActionCounts(**counts, same=base_live - counts[TEXT] - counts[ATTR] - counts[DELETE])
    guards = check(
        rows=rows,
        actions=actions,
        base_live=base_live,
        live_before=live_before,
        window=request.window,
        live_now=rows.live if request.window.full else sides.num_present,
        newest=tally.newest,
        limits=request.limits,
    )
    if request.beside is not None and not request.beside_allowed:
        guards = (*guards, another_tower(request.beside.tower, request.tower))
    return Plan(
        alias=request.alias,
        base=base.generation if base else None,
        base_live=base_live,
        window=request.window,
        zone=request.zone,
        lookback_s=request.lookback.total_seconds(),
        source=sides.pin,
        template=request.template.source,
        template_digest=request.template.digest,
        schema_digest=request.normalizing.schema.digest,
        deletes=request.deletes,
        deletes_checked=request.deletes in ("auto", "scan"),
        rows=rows,
        actions=actions,
        embedding=_embedding(sides, difference, request),
        rejected=dict(tally.rejected),
        repaired=dict(tally.repaired),
        unseen=difference.unseen,
        newest=tally.newest,
        notes=_notes(base, request),
        tower=request.tower,
        guards=guards,
    )


def made_otherwise(base: Base, *, template: Template, schema: ProductSchema) -> list[str]:
    """Say what changed in how products are made since the base: any of it means that the whole catalog must be read."""
    changed = [("the template", base.template_digest, template.digest), ("the filter columns", base.schema_digest, schema.digest)]
    return [what for what, before, now in changed if before != now]


def _notes(base: Base | None, request: PlanRequest) -> tuple[str, ...]:
    if request.beside is not None:
        what = made_otherwise(request.beside, template=request.template, schema=request.normalizing.schema)
        why = what[0] if what and what[0] == "the template" else "the tower"
        start = f"vectors of {base.generation} are extended" if base else "every text is embedded into a space of its own"
        return (f"{why} changed since {request.beside.generation}: {start}, beside the live one",)
    changed = made_otherwise(base, template=request.template, schema=request.normalizing.schema) if base else []
    return (f"{' and '.join(changed)} changed since {base.generation}, so the whole catalog is read",) if base and changed else ()


def _embedding(sides: _Sides, difference: Difference, request: PlanRequest) -> Embedding:
    """Count the texts to embed; their tokens follow from the share of tokens in the bytes of the sampled texts."""
    again = request.selection is not None and request.selection.again
    known = pa.table({TEXT_HASH: pa.array([], HASH)}) if again else sides.previous
    texts = count_texts(difference.changes, known, options=request.diff)
    tally = sides.tally
    ratio = tally.sample_tokens / tally.sample_bytes if tally.sample_bytes else _TOKENS_PER_BYTE
    return Embedding(rows=texts.rows, texts=texts.texts, reused=texts.reused, tokens=round(texts.text_bytes * ratio))
