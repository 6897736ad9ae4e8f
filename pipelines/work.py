"""The work of a run: changes dealt out to parts, and every part made durable. What is paid for already is copied."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.build import Build, Embedded, Space
from pipelines.capacity import Patience
from pipelines.contracts import Shard
from pipelines.diff.dealing import assign, dealt_parts
from pipelines.embed import EmbedJob, run_parts
from pipelines.errors import PlanError, SourceMoved
from pipelines.manifest import Manifest, ManifestObject, TablePin
from pipelines.parts import PartDone, PartWork
from pipelines.pool import PoolOptions
from pipelines.schema import ACTION, ATTR, CHANGES, DELETE, HASH, ID, ID_HASH, QUARANTINE, REASON, ROW, SHARD, TEXT, TEXT_HASH, VECTOR
from pipelines.storage import Store
from pipelines.stores import lance
from pipelines.stores.parquet import paid_texts, vectors_in
from pipelines.turns import Turn

# Below this a part is too small a window to sort by length: parts of 512 cost 8 % of the forward passes (docs/experiments.md).
_LEAST_PART_ROWS, _MOST_PART_ROWS = 2048, 32768
# A full build has about this many parts, so that a killed one repeats a small share.
_PARTS = 64


@dataclass(frozen=True, kw_only=True)
class Dealt:
    """The work of a run, dealt out to parts."""

    path: Path
    counts: Mapping[str, int]
    paid: Sequence[str]


def deal(build: Build, changes: Path, previous: Sequence[Path]) -> Dealt:
    """Deal a plan's changes out to parts; texts that are paid for already are copied."""
    known: pa.Table | Sequence[Path] = previous
    paid_keys: list[str] = []
    paid = pa.table({TEXT_HASH: pa.array([], HASH), "part": pa.array([], pa.int64())})
    if build.afresh:
        known = pa.table({TEXT_HASH: pa.array([], HASH)})
    if not build.afresh or build.paid_by:
        paid_keys, paid = paid_texts(
            build.store,
            fingerprint=build.space.card.fingerprint,
            vector=build.space.vector,
            skip=frozenset(item.key for item in build.base.parts) if build.base else frozenset(),
            own=f"vectors/{build.run_id}/",
            runs=build.paid_by if build.afresh else None,
        )
    rows = pq.read_metadata(changes).num_rows
    part_rows = build.embedding.part_rows or min(_MOST_PART_ROWS, max(_LEAST_PART_ROWS, -(-rows // _PARTS)))
    path = build.work / "dealt.parquet"
    counts = assign(changes, known=known, paid=paid, part_rows=part_rows, rewrite=build.rewrite, outcome=path, options=build.diff)
    return Dealt(path=path, counts=counts, paid=paid_keys)


def work_digest(space: Space, *, base: Manifest | None, changes: Path, part_rows: int | None) -> str:
    """Hash what a run is about to do: the same changes to the same base, for the same tower, give the same digest."""
    head = f"{space.card.fingerprint} {space.vector} {base.generation if base else ''} {part_rows}\n"
    with changes.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.sha256(head.encode())).hexdigest()


def embed(build: Build, dealt: Dealt, shards: Sequence[Shard], *, ahead: Turn | None = None) -> Embedded:
    """Make every part of the run durable, the ones with a forward pass first, because others copy from them.

    `ahead` of joining what is published, in turns with runs that go first, only those with a forward pass are made, and a
    catalog that moves is told and no error.
    """
    job = replace(_job(build, shards), turn=ahead)

    def waits(why: str) -> None:
        build.observer.event("embed.waits", why=why)

    done: list[PartDone] = []
    lost: list[pa.Table] = []
    rejected: list[pa.Table] = []

    def finish(works: Iterator[PartWork], stage: str, total: int | None) -> list[PartDone]:
        made = []
        with build.observer.stage(stage, total=total, unit="row") as progress:
            for item in run_parts(works, job, tell=waits, patience=_patience(build)):
                progress.advance(item.rows, tokens=item.tokens)
                build.store.failpoint(f"run.part:{stage}")
                made.append(item)
                done.append(item)
                lost.append(item.lost)
                rejected.append(item.rejected)
        return made

    works = (PartWork(number=n, kind="embed", rows=_plain(rows)) for n, rows in dealt_parts(dealt.path, kind="embed"))
    fresh, moved = [], ""
    try:
        fresh = finish(works, "embed", dealt.counts["embed_rows"])
    except SourceMoved as error:
        if ahead is None:
            raise
        moved = str(error)
    offset = dealt.counts["embed_parts"]
    homes = {item.number: item.object for item in fresh if item.object is not None}
    if ahead is None:
        finish(_others(build, dealt, offset=offset, homes=homes, lost=lost, rejected=rejected), "copy", None)
    objects = sorted((item.object for item in done if item.object is not None), key=lambda item: item.key)
    return Embedded(
        parts=tuple(objects),
        rejected=pa.concat_tables([QUARANTINE.empty_table(), *rejected]),
        lost=pa.concat_tables([CHANGES.empty_table(), *lost]),
        texts=sum(item.texts for item in done),
        tokens=sum(item.tokens for item in done),
        seconds=sum(item.seconds for item in done),
        waited=sum(item.waited for item in done),
        halvings=sum(item.halvings for item in done),
        retries=sum(max(0, item.attempts - 1) for item in done),
        skipped=sum(item.skipped for item in done),
        moved=moved,
    )


def _job(build: Build, shards: Sequence[Shard]) -> EmbedJob:
    options = build.embedding
    return EmbedJob(
        # Workers get a store of their own: the fail points of a test count what the driver does.
        store=Store.open(build.store.root, options=build.options),
        run_id=build.run_id,
        shards=shards,
        preparer=build.preparer,
        tower_objects=build.space.objects,
        tower=build.space.options,
        fingerprint=build.space.card.fingerprint,
        dims=build.space.card.dims,
        vector=build.space.vector,
        token_budget=options.token_budget,
        lanes=options.lanes,
        **{item.name: getattr(options, item.name) for item in fields(PoolOptions)},
    )


def _patience(build: Build) -> Patience | None:
    """Wait for room as long as the project says, and tell what is missing."""
    limit_s = build.embedding.wait_s
    if limit_s is None:
        return None
    return Patience(
        limit_s=limit_s,
        tell=lambda told: build.observer.event("capacity.waiting", **told.facts),
        lost=lambda why: build.observer.event("capacity.lost", level="warning", why=why),
    )


def _others(
    build: Build, dealt: Dealt, *, offset: int, homes: Mapping[int, ManifestObject], lost: list[pa.Table], rejected: list[pa.Table]
) -> Iterator[PartWork]:
    """Yield the parts that need no forward pass: copies, attributes, and last what goes, with what was lost on the way."""
    number = offset
    for _, rows in dealt_parts(dealt.path, kind="copy"):
        vectors = _vectors(build, dealt, rows, homes)
        there = pc.is_in(rows.column(TEXT_HASH), vectors.column(TEXT_HASH))
        missing = rows.filter(pc.invert(there))
        if missing.num_rows:
            lost.append(_plain(missing))
            rejected.append(_same_text(missing))
        if missing.num_rows < rows.num_rows:
            yield PartWork(number=number, kind="copy", rows=_plain(rows.filter(there)), vectors=vectors)
        number += 1
    for kind in (ATTR, DELETE):
        for _, rows in dealt_parts(dealt.path, kind=kind):
            yield PartWork(number=number, kind="attr" if kind == ATTR else "delete", rows=_plain(rows))
            number += 1
    # A product whose new text has no vector must not stay with its old one.
    stale = pa.concat_tables([CHANGES.empty_table(), *lost])
    stale = stale.filter(pc.equal(stale.column(ACTION), TEXT))
    if stale.num_rows:
        gone = stale.set_column(stale.schema.names.index(ACTION), ACTION, pa.repeat(pa.scalar(DELETE), stale.num_rows))
        yield PartWork(number=number, kind="delete", rows=gone.sort_by(ID_HASH))


def _vectors(build: Build, dealt: Dealt, rows: pa.Table, homes: Mapping[int, ManifestObject]) -> pa.Table:
    """Find the vector of every text of a part of copies: in the base's table, in this run's parts, in those of dead runs."""
    found = []
    for source in pc.unique(rows.column("source")).to_pylist():
        of_source = rows.filter(pc.equal(rows.column("source"), source))
        if source == "table":
            base = _table(build)
            hashes = pc.unique(of_source.column(TEXT_HASH))
            found.append(lance.vectors_of(build.store.uri(base.uri), version=base.version, text_hashes=hashes, options=build.options))
            continue
        for origin in pc.unique(of_source.column("origin")).to_pylist():
            hashes = pc.unique(of_source.filter(pc.equal(of_source.column("origin"), origin)).column(TEXT_HASH))
            key = dealt.paid[origin] if source == "paid" else homes[origin].key if origin in homes else None
            if key is not None:
                found.append(vectors_in(build.store, key, text_hashes=hashes))
    columns = pa.schema([(TEXT_HASH, HASH), (VECTOR, build.space.columns.field(VECTOR).type)])
    return pa.concat_tables([columns.empty_table(), *(table.cast(columns) for table in found)])


def _table(build: Build) -> TablePin:
    if build.base is None or build.base.table is None:
        raise PlanError("vectors were to be copied from a table that is not pinned. Run again with `--since beginning`.")
    return build.base.table


def _plain(rows: pa.Table) -> pa.Table:
    return rows.select(CHANGES.names)


def _same_text(rows: pa.Table) -> pa.Table:
    """Quarantine products whose text is that of a row that could not be embedded."""
    count = rows.num_rows
    fixed = {"stage": "embed", REASON: "embed_failed", "field": "text"}
    given = {SHARD: rows.column(SHARD), ROW: rows.column(ROW), ID: rows.column(ID)}
    columns = [
        given[item.name] if item.name in given else pa.repeat(pa.scalar(fixed.get(item.name, b""), item.type), count) for item in QUARANTINE
    ]
    return pa.Table.from_arrays(columns, schema=QUARANTINE)
