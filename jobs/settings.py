"""The project's settings, each section owned by the dataclass that reads it, put together from `jobs.config`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from jobs.config import Layer, build, described, layers
from jobs.sections import (
    Cluster,
    Completeness,
    Contract,
    Document,
    Embedding,
    Gates,
    Indexes,
    Judgments,
    Planning,
    Project,
    Publishing,
    Refresh,
    StorePlace,
    TowerPlace,
)
from pipelines.contracts import ColumnMap, Window
from pipelines.diff.engine import DiffOptions
from pipelines.errors import InputError
from pipelines.gates import GateLimits
from pipelines.index.spec import check_factory
from pipelines.index.triggers import RefreshOptions
from pipelines.normalize import NormalizeOptions
from pipelines.plan import Limits
from pipelines.schema import ProductSchema
from pipelines.sources import SourceSpec
from pipelines.text import Template, parse
from pipelines.window import zone

SECTIONS: Mapping[str, tuple[type, ...]] = {
    "": (Project,),
    "source": (SourceSpec, ColumnMap, Contract),
    "document": (Document,),
    "store": (StorePlace,),
    "plan": (Planning,),
    "tower": (TowerPlace,),
    "embed": (Embedding,),
    "index": (Indexes,),
    "refresh": (Refresh,),
    "gates": (Gates, GateLimits),
    "publish": (Publishing,),
    "ray": (Cluster,),
    "judgments": (Judgments,),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that a command needs to know, checked."""

    project: Project
    source: SourceSpec
    columns: ColumnMap
    completeness: Completeness
    document: Document
    store: StorePlace
    plan: Planning
    gates: Gates
    gate_limits: GateLimits
    tower: TowerPlace
    embed: Embedding
    index: Indexes
    refresh: Refresh
    publish: Publishing
    ray: Cluster
    judgments: Judgments
    origins: Layer = field(repr=False)

    @property
    def zone(self) -> ZoneInfo:
        """The zone in which `yesterday` is meant."""
        return zone(self.project.timezone)

    @property
    def template(self) -> Template:
        """The parsed template."""
        return parse(self.document.template)

    @property
    def schema(self) -> ProductSchema:
        """The columns of a normalised product."""
        template = self.template
        return ProductSchema(text=template.text_fields, filters=self.document.filters, attributes=template.uses_attributes)

    @property
    def limits(self) -> Limits:
        """The limits that a plan is measured against."""
        max_age = self.completeness.max_age
        return Limits(
            min_rows_ratio=self.completeness.min_rows_ratio,
            max_age_s=max_age.total_seconds() if max_age else None,
            max_delete_ratio=self.gates.max_delete_ratio,
            max_duplicate_ratio=self.gates.max_duplicate_ratio,
            quarantine_ratio=self.gates.quarantine_ratio,
        )

    @property
    def refresh_options(self) -> RefreshOptions:
        """When the FAISS index is extended, and when it is built anew."""
        faiss = self.index.faiss
        return RefreshOptions(
            **{item.name: getattr(self.refresh, item.name) for item in fields(Refresh)},
            recall_at_10=faiss.recall_at_10,
            memory_bytes=faiss.memory_bytes,
            latency_ms=faiss.latency_ms,
            distribute_above=faiss.distribute_above,
            factory=None if faiss.type == "auto" else faiss.type,
        )

    @property
    def scalar_columns(self) -> tuple[str, ...]:
        """The columns that filters are fast on: all of them, unless some are named."""
        named = self.index.lance.scalar
        return tuple(self.document.filters) if named is None else named

    @property
    def diff(self) -> DiffOptions:
        """What the join may use."""
        return DiffOptions(memory_mb=self.plan.memory_mb, threads=self.plan.threads)

    @property
    def columns_read(self) -> ColumnMap:
        """The column map without what nothing reads."""
        return self.columns if self.template.uses_attributes else replace(self.columns, attributes=None)

    def normalizing(self, window: Window) -> NormalizeOptions:
        """How rows of a window are normalised."""
        document = self.document
        return NormalizeOptions(
            schema=self.schema,
            deleted=self.columns.deleted,
            now=window.until,
            default_locale=document.default_locale,
            unsafe_ids=document.unsafe_ids,
            max_id_bytes=document.max_id_bytes,
            max_text_bytes=document.max_text_bytes,
            max_attributes=document.max_attributes,
            non_negative=document.non_negative,
        )

    def describe(self) -> Iterator[tuple[str, str, str]]:
        """Yield every option as (key, value, origin), secrets masked."""
        for key, value, origin in described(self.origins, SECTIONS):
            yield key.removeprefix("."), value, origin


def load(path: Path, *, target: str | None = None, overrides: Mapping[str, Any] | None = None) -> Settings:
    """Read and check the configuration at `path`; relative places in it are relative to its folder."""
    layer = layers(path=path, target=target, overrides=overrides or {}, sections=SECTIONS)
    source = build(SourceSpec, "source", layer)
    store = build(StorePlace, "store", layer)
    tower = build(TowerPlace, "tower", layer)
    publish = build(Publishing, "publish", layer)
    judged = build(Judgments, "judgments", layer)
    settings = Settings(
        project=build(Project, "", layer),
        source=replace(source, path=_beside(path, source.path)) if source.path else source,
        columns=build(ColumnMap, "source", layer),
        completeness=build(Contract, "source", layer).completeness,
        document=build(Document, "document", layer),
        store=replace(store, root=_beside(path, store.root)),
        plan=build(Planning, "plan", layer),
        gates=build(Gates, "gates", layer),
        gate_limits=build(GateLimits, "gates", layer),
        tower=replace(tower, path=_beside(path, tower.path)) if tower.path else tower,
        embed=build(Embedding, "embed", layer),
        index=build(Indexes, "index", layer),
        refresh=build(Refresh, "refresh", layer),
        publish=replace(publish, metrics=_beside(path, publish.metrics)) if publish.metrics else publish,
        ray=build(Cluster, "ray", layer),
        judgments=replace(judged, **{name: _beside(path, place) for name in ("path", "queries") if (place := getattr(judged, name))}),
        origins=layer,
    )
    if settings.template.uses_attributes and settings.columns.attributes is None:
        raise InputError(
            "the template reads `attributes`, but `source.attributes` does not say where they are. Map it, or drop them from the template."
        )
    unread = sorted(set(settings.columns.columns) - set(settings.schema.fields))
    if unread:
        fields = ", ".join(settings.schema.fields)
        raise InputError(f"`source.columns` maps `{unread[0]}`, which neither the template nor a filter reads. They read: {fields}.")
    for name in (*settings.scalar_columns, *settings.index.lance.text):
        if name not in settings.document.filters:
            kept = ", ".join(settings.document.filters) or "none"
            raise InputError(
                f"`index.lance` names `{name}`, which the table does not keep. Add it to `document.filters`; they are: {kept}."
            )
    # Every mistake that can be found without reading a row is found here.
    (
        settings.zone,
        settings.schema,
        settings.limits,
        settings.refresh_options,
        settings.normalizing(Window(since=None, until=datetime.now(tz=settings.zone))),
    )
    return settings


def with_index(settings: Settings, factory: str) -> Settings:
    """Return settings that ask for this FAISS index."""
    if factory != "auto":
        check_factory(factory)
    return replace(settings, index=replace(settings.index, faiss=replace(settings.index.faiss, type=factory)))


def _beside(config: Path, place: str) -> str:
    """Return a local place relative to the configuration's folder, and an address as it is."""
    if "://" in place:
        if "@" in place.split("://", 1)[1].split("/", 1)[0]:
            raise InputError(f"the address of {place.rpartition('@')[2]} holds credentials. Put them under `options`, as `${{NAME}}`.")
        return place
    if "\0" in place:
        raise InputError(f"a path holds a zero byte: {place!r}.")
    return str((config.parent / place).resolve())
