"""Make a generation's table and index anew from the vector log: no forward pass, no source, nothing of the old ones is read."""

from __future__ import annotations

from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

from pipelines.build import Build
from pipelines.candidate import indexed, whole_index
from pipelines.contracts import FAISS_INDEX, LANCE_INDEX
from pipelines.errors import InputError
from pipelines.gates import Gate, GateLimits, Waiver, judge, to_json, verdicts
from pipelines.manifest import Manifest, canonical
from pipelines.probes import Candidate, measure
from pipelines.publish import write_generation
from pipelines.stores import lance
from pipelines.stores.parquet import replay


def rebuild(
    build: Build, lost: Manifest, *, limits: GateLimits, waivers: tuple[Waiver, ...], samples: int
) -> tuple[Manifest, tuple[Gate, ...]]:
    """Write a generation of the same content as `lost`, and return it with its gates. The caller holds the lease.

    `build` names a table of its own. Every part is verified by its sha256 while it is read.
    """
    if lost.schema_digest != build.space.schema.digest or lost.tower != build.space.card.fingerprint:
        raise InputError(
            f"{lost.generation} was made with another tower, template or other filter columns than the configuration names. "
            "Set them back for the rebuild, and change them in a run of its own."
        )
    store, uri, spec = build.store, build.table_uri, build.spec
    with build.observer.stage("table", total=lost.counts["live"]) as progress:
        lance.restore(uri, version=None, options=build.options)
        version = lance.build(uri, replay(store, lost.parts, build.space.columns), spec, build.options)
        progress.advance(lance.counts(uri, version=version, options=build.options))
    applied = indexed(build, version=version, previous=None)
    index = whole_index(build, applied, live=lost.counts["live"])
    use = replace(index.use, trigger=None, reason="made anew from the vector log")
    kept = tuple(item for item in lost.attachments if item.role != "attachment")
    manifest = replace(
        lost,
        generation=build.generation,
        parent=lost.generation,
        created_at=datetime.now(tz=UTC),
        run_id=build.run_id,
        table=applied.pin,
        segments=index.segments,
        tombstones=index.tombstones,
        attachments=kept,
        indexes={FAISS_INDEX: use, LANCE_INDEX: applied.use},
        gates={},
    )
    found = measure(
        Candidate(store=store, options=build.options, manifest=manifest, samples=samples, recall_filtered=limits.recall_filtered),
        build.observer,
    )
    gates = judge(found, limits, waivers, datetime.now(tz=UTC).date())
    report: dict[str, Any] = {"format": 1, "rebuilt_from": lost.generation, "index": asdict(use)}
    attachments = {"gates.json": to_json(gates), "report.json": canonical(report)}
    return write_generation(store, replace(manifest, gates=verdicts(gates)), attachments), gates
