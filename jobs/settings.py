"""The project's settings, each section owned by the dataclass that reads it, put together from `jobs.config`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal
from zoneinfo import ZoneInfo

from jobs.config import Layer, build, described, layers
from pipelines.contracts import ColumnMap, Window
from pipelines.diff.engine import DiffOptions
from pipelines.errors import InputError
from pipelines.gates import GateLimits, Waiver
from pipelines.index.triggers import RefreshOptions
from pipelines.layout import byte_count
from pipelines.normalize import NormalizeOptions
from pipelines.plan import Deletes, Limits
from pipelines.pool import Tokenize
from pipelines.schema import VECTOR_INDEXES, ProductSchema
from pipelines.sources import SourceSpec
from pipelines.text import Template, parse
from pipelines.window import zone

DEFAULT_TEMPLATE = "{{ title }} | {{ brand }} | {{ category }} | {{ attributes | pairs(12) }} | {{ description | tokens(96) }}"


@dataclass(frozen=True, kw_only=True)
class Project:
    """What the project is called, and the zone in which its days begin."""

    project: str
    timezone: str = "UTC"


@dataclass(frozen=True, kw_only=True)
class Completeness:
    """What a feed must hold to be believed: rows against the published products, and the age of its newest row."""

    min_rows_ratio: float = Limits.min_rows_ratio
    max_age: timedelta | None = None


@dataclass(frozen=True, kw_only=True)
class Contract:
    """The promise that the catalog's owner makes."""

    completeness: Completeness = field(default_factory=Completeness)


@dataclass(frozen=True, kw_only=True)
class Document:
    """How a row becomes a product and a text."""

    template: str = DEFAULT_TEMPLATE
    filters: Mapping[str, str] = field(default_factory=dict)
    default_locale: str = "und"
    unsafe_ids: Literal["quarantine", "accept"] = "quarantine"
    max_id_bytes: int = 256
    max_text_bytes: int = 32768
    max_attributes: int = 256
    non_negative: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class StorePlace:
    """Where generations live: a folder, or s3://, gs://, az:// with the options of that service."""

    root: str = "index"
    options: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, kw_only=True)
class Planning:
    """How far back to look for late rows, and what the diff may use."""

    lookback: timedelta = timedelta(hours=6)
    deletes: Deletes = "auto"
    memory_mb: int = 1024
    threads: int = 2
    partitions: int | None = None


@dataclass(frozen=True, kw_only=True)
class Gates:
    """Where a plan stops being believable; all are shares of one. The limits of a generation stand beside them (GateLimits)."""

    max_delete_ratio: float = Limits.max_delete_ratio
    max_duplicate_ratio: float = Limits.max_duplicate_ratio
    quarantine_ratio: float = Limits.quarantine_ratio
    samples: int = 128
    waivers: tuple[Waiver, ...] = ()

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise InputError(f"`samples` is how many products the gates look at, at least 1, not {self.samples}.")


@dataclass(frozen=True, kw_only=True)
class TowerPlace:
    """The trained product tower. Without a path it is the packaged all-MiniLM-L6-v2."""

    path: str | None = None
    dims: int | None = None
    max_tokens: int | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """How vectors are made and kept. `vector` is how their numbers are stored; `cost_per_hour` is the price of one actor.

    `lanes` are packs that run side by side on a CPU. `tokenize` says who makes token ids: the tasks that read the texts, `ahead`, or the `actor`; `auto` is ahead of GPUs.
    """

    vector: Literal["float32", "float16"] = "float32"
    part_rows: int | None = None
    actors: int | None = None
    gpus_per_actor: float | None = None
    token_budget: int | None = None
    threads: int | None = None
    lanes: int | None = None
    tokenize: Tokenize = "auto"
    cost_per_hour: float | None = None
    currency: str = "EUR"

    def __post_init__(self) -> None:
        for name in ("part_rows", "actors", "token_budget", "threads", "lanes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"`{name}` is at least 1, not {value}.")
        for name in ("gpus_per_actor", "cost_per_hour"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < math.inf:
                raise InputError(f"`{name}` is a number from 0, not {value}.")
        if (gpus := self.gpus_per_actor) is not None and gpus > 1 and gpus % 1:
            raise InputError(f"`gpus_per_actor` is a share of a GPU or a whole number of them, not {gpus:g}.")


@dataclass(frozen=True, kw_only=True)
class FaissIndex:
    """What the FAISS index has to reach and may cost, for the whole index and for one query on one core.

    `type` is a factory such as `IVF1024,RaBitQfs,Refine(SQ8)`, or `auto`: chosen from the budget. From `distribute_above`
    products on, a full build is spread over the cluster.
    """

    type: str = "auto"
    recall_at_10: float = RefreshOptions.recall_at_10
    memory: str | None = None
    latency_ms: float | None = RefreshOptions.latency_ms
    distribute_above: int = RefreshOptions.distribute_above

    @property
    def memory_bytes(self) -> int | None:
        """The memory budget as a number."""
        return None if self.memory is None else byte_count(self.memory)


@dataclass(frozen=True, kw_only=True)
class LanceIndex:
    """Which indexes the table has beside the vectors'."""

    type: str = "auto"
    scalar: tuple[str, ...] | None = None
    text: tuple[str, ...] = ()
    flat_below: int = 20_000
    fold_after: int = 8

    def __post_init__(self) -> None:
        if self.type not in VECTOR_INDEXES:
            raise InputError(f"`lance: type` is `{self.type}`, but must be one of: {', '.join(VECTOR_INDEXES)}.")
        if self.fold_after < 1 or self.flat_below < 0:
            raise InputError(f"`fold_after` is at least 1 and `flat_below` at least 0, not {self.fold_after} and {self.flat_below}.")


@dataclass(frozen=True, kw_only=True)
class Indexes:
    """Both indexes of a generation."""

    faiss: FaissIndex = field(default_factory=FaissIndex)
    lance: LanceIndex = field(default_factory=LanceIndex)


@dataclass(frozen=True, kw_only=True)
class Refresh:
    """When an index that is extended every night is compacted (shares of live rows and of entries), and when it is trained anew.

    `imbalance_until` and `drift_until` are multiples of what training left, `probes_until` of the probes tuned then.
    """

    delta_until: float = RefreshOptions.delta_until
    tombstones_until: float = RefreshOptions.tombstones_until
    max_segments: int = RefreshOptions.max_segments
    imbalance_until: float = RefreshOptions.imbalance_until
    drift_until: float = RefreshOptions.drift_until
    probes_until: float = RefreshOptions.probes_until


@dataclass(frozen=True, kw_only=True)
class Publishing:
    """The name under which readers find the index, and how many generations stay behind it."""

    alias: str = "prod"
    keep: int = 7
    grace: timedelta = timedelta(days=2)
    lease: timedelta = timedelta(minutes=10)
    metrics: str | None = None


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The Ray cluster that does the work: `local` starts one for this run."""

    address: str = "local"


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
    asked = replace(settings, index=replace(settings.index, faiss=replace(settings.index.faiss, type=factory)))
    return asked if asked.refresh_options else settings  # made, and so checked


def _beside(config: Path, place: str) -> str:
    """Return a local place relative to the configuration's folder, and an address as it is."""
    if "://" in place:
        if "@" in place.split("://", 1)[1].split("/", 1)[0]:
            raise InputError(f"the address of {place.rpartition('@')[2]} holds credentials. Put them under `options`, as `${{NAME}}`.")
        return place
    if "\0" in place:
        raise InputError(f"a path holds a zero byte: {place!r}.")
    return str((config.parent / place).resolve())
