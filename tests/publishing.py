"""Publish what a plan says, without vectors: the state that later plans are compared with, written through the real store."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from pathlib import Path

import lance
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.nightly import Night, planned
from jobs.settings import Settings, load
from pipelines.contracts import SourcePin
from pipelines.manifest import Manifest, TablePin
from pipelines.planning import Planned
from pipelines.publish import current, next_generation, publish, write_generation
from pipelines.schema import HASH, ID_HASH, LIVE, PUBLISHED, STATE
from pipelines.storage import Store


def publish_catalog(config: Path, *, now: datetime) -> str:
    """Plan the whole catalog and publish its live products as the next generation; return its id."""
    settings = load(config)
    with planned(settings, Night(since="beginning", now=now)) as night:
        return publish_state(settings, live_rows(night.result), night.result, now=now)


def live_rows(result: Planned) -> pa.Table:
    """The rows that a full build would keep. For catalogs without duplicates."""
    rows = pa.concat_tables([pq.read_table(path) for path in result.current])
    rows = rows.filter(pc.equal(rows.column(STATE), LIVE))
    assert len(set(rows.column(ID_HASH).to_pylist())) == rows.num_rows
    columns = [
        pa.chunked_array([chunk.storage for chunk in rows.column(field.name).chunks], HASH)
        if field.type == HASH
        else rows.column(field.name)
        for field in PUBLISHED
    ]
    return pa.Table.from_arrays(columns, schema=PUBLISHED)


def publish_state(settings: Settings, rows: pa.Table, result: Planned, *, now: datetime) -> str:
    """Write a table and a manifest for these rows and publish them."""
    store = Store.open(settings.store.root, options=settings.store.options)
    head = current(store, settings.publish.alias)
    generation = next_generation(store)
    uri = f"tables/{generation}.lance"
    options = dict(settings.store.options) or None
    table = lance.write_dataset(rows, store.uri(uri), data_storage_version="2.2", storage_options=options)
    plan = result.plan
    manifest = Manifest(
        generation=generation,
        parent=head.generation if head else None,
        created_at=now,
        run_id=f"run-{uuid.uuid4().hex}",
        source=SourcePin(kind=plan.source.kind, address=plan.source.address, objects=plan.source.objects),
        window=plan.window,
        tower=plan.tower or "none",
        template_digest=plan.template_digest,
        schema_digest=plan.schema_digest,
        config_digest="none",
        table=TablePin(uri=uri, version=table.version, tag=generation),
        counts={"live": rows.num_rows},
    )
    write_generation(store, manifest, {})
    publish(
        store,
        alias=settings.publish.alias,
        generation=generation,
        expected_seq=head.seq if head else 0,
        run_id=manifest.run_id,
        clock=lambda: now.astimezone(UTC),
    )
    return generation
