"""Small generations for tests of the store, the publish log and whatever reads them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from pipelines.contracts import ObjectRef, PinnedObject, SourcePin, Window
from pipelines.manifest import Manifest, ManifestObject
from pipelines.publish import LogEntry, publish, write_generation
from pipelines.storage import Store

START = datetime(2026, 11, 4, 2, 10, tzinfo=UTC)


def ticking(start: datetime = START, *, step: timedelta = timedelta(seconds=1)) -> Callable[[], datetime]:
    """A clock that moves one step at every look."""
    ticks = itertools.count()
    return lambda: start + step * next(ticks)


def sample_manifest(generation: str = "g000001", **changes: Any) -> Manifest:
    """A complete small manifest; name the fields that matter to the test."""
    manifest = Manifest(
        generation=generation,
        parent=None,
        created_at=START,
        run_id="run-1",
        source=SourcePin(kind="parquet", address="s3://shop/catalog/", objects=(PinnedObject(name="day=1/a.parquet", size=9, etag="e1"),)),
        window=Window(since=None, until=START - timedelta(minutes=5)),
        tower="3fa1c9",
        template_digest="ab" * 16,
        schema_digest="cd" * 16,
        config_digest="ef" * 16,
        counts={"live": 2, "rejected": 0},
        gates={"recall_at_10": "passed", "churn": "warned"},
        versions={"catalog-embed": "0.1.0"},
    )
    return replace(manifest, **changes)


def listed(ref: ObjectRef, role: str = "vectors", rows: int | None = 1) -> ManifestObject:
    return ManifestObject.of(ref, role=role, rows=rows)


def written(store: Store, generation: str, *, run_id: str = "run-1", parent: str | None = None) -> Manifest:
    """Write a generation with one part and one attachment, without publishing it."""
    part = store.put(f"vectors/{run_id}/part-{generation}.parquet", f"vectors of {generation}".encode())
    manifest = sample_manifest(generation, run_id=run_id, parent=parent, parts=(listed(part),))
    return write_generation(store, manifest, {"gates.json": b"{}\n"})


def published(store: Store, generation: str, *, expected_seq: int, run_id: str = "run-1", alias: str = "prod") -> LogEntry:
    """Write and publish a generation."""
    written(store, generation, run_id=run_id)
    return publish(store, alias=alias, generation=generation, expected_seq=expected_seq, run_id=run_id, clock=lambda: START)


def move(store: Store, generation: str, *, expected_seq: int, run_id: str = "run-x", **options: Any) -> LogEntry:
    """Publish a written generation on `prod`."""
    return publish(store, alias="prod", generation=generation, expected_seq=expected_seq, run_id=run_id, clock=lambda: START, **options)


def chain(store: Store, count: int) -> None:
    """Publish g000001 .. g00000n on `prod`."""
    for number in range(1, count + 1):
        published(store, f"g{number:06d}", expected_seq=number - 1, run_id=f"run-{number}")
