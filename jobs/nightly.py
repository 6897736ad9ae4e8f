"""The nightly run. So far its first half: resolve the window, open the published base, plan."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from jobs.cluster import connected
from jobs.logs import event
from jobs.settings import Settings
from pipelines.contracts import Source, Window
from pipelines.errors import ManifestError
from pipelines.generation import Base, Planned, PlanRequest, made_otherwise, make_plan, sample_changes, texts_of
from pipelines.plan import Deletes
from pipelines.publish import current, open_manifest
from pipelines.schema import ADD, TEXT
from pipelines.sources import open_source
from pipelines.storage import Store
from pipelines.window import resolve

# A partition of this size is joined in about a second and 1 GB; past it, partitions go to the cluster's workers.
_PARTITION_ROWS = 20_000_000


@dataclass(frozen=True, kw_only=True)
class Night:
    """What one run is asked to do, beyond the project's settings."""

    since: str = "last"
    now: datetime | None = None
    deletes: Deletes | None = None
    verbose: bool = False


def open_base(settings: Settings) -> Base | None:
    """Open the generation that the alias names, or None where nothing is published yet."""
    if "://" not in settings.store.root and not Path(settings.store.root).exists():
        return None
    store = Store.open(settings.store.root, options=settings.store.options)
    entry = current(store, settings.publish.alias)
    if entry is None:
        return None
    manifest = open_manifest(store, entry)
    if manifest.table is None:
        raise ManifestError(
            f"generation {manifest.generation} pins no table, so there is nothing to compare with. Run `catalog-embed doctor`."
        )
    return Base(
        generation=manifest.generation,
        live=manifest.counts["live"],
        watermark=manifest.window.until,
        table_uri=store.uri(manifest.table.uri),
        table_version=manifest.table.version,
        template_digest=manifest.template_digest,
        schema_digest=manifest.schema_digest,
        options=settings.store.options,
    )


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
    base = open_base(settings)
    source = open_source(settings.source, columns=settings.columns_read, fields=settings.schema.fields)
    request = _request(settings, night, base)
    with tempfile.TemporaryDirectory(prefix="catalog-embed-") as work, connected(settings.ray.address, verbose=night.verbose):
        event("plan.started", alias=request.alias, base=base.generation if base else "none", since=_shown(request.window))
        yield PlannedNight(result=make_plan(source, base=base, request=request, work=Path(work)), source=source, request=request)


def _request(settings: Settings, night: Night, base: Base | None) -> PlanRequest:
    now = night.now or datetime.now(tz=UTC)
    watermark = base.watermark if base else None
    # A catalog without update times cannot be narrowed, so its nights read everything.
    since = "beginning" if night.since == "last" and settings.columns.updated_at is None else night.since
    window = resolve(since, now=now, tz=settings.zone, lookback=settings.plan.lookback, watermark=watermark)
    if base and made_otherwise(base, template=settings.template, schema=settings.schema):
        window = Window(since=None, until=window.until)
    return PlanRequest(
        alias=settings.publish.alias,
        window=window,
        zone=settings.project.timezone,
        lookback=settings.plan.lookback,
        template=settings.template,
        normalizing=settings.normalizing(window),
        limits=settings.limits,
        deletes=night.deletes or settings.plan.deletes,
        diff=settings.diff,
        partitions=settings.plan.partitions or _partitions(base),
    )


def _partitions(base: Base | None) -> int:
    return 1 + (base.live if base else 0) // _PARTITION_ROWS


def _shown(window: Window) -> str:
    return window.since.isoformat() if window.since else "beginning"
