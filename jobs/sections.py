"""The sections of the configuration: one frozen dataclass for each, which says what may be set, and checks it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal

from jobs.pushing import check_address
from pipelines.errors import InputError
from pipelines.gates import Waiver
from pipelines.index.triggers import RefreshOptions
from pipelines.layout import byte_count
from pipelines.plan import Deletes, Limits
from pipelines.pool import Tokenize
from pipelines.schema import VECTOR_INDEXES

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
    `resources` are named ones that each actor takes, such as `embedder: 1`; only nodes that have them hold actors.
    """

    vector: Literal["float32", "float16"] = "float32"
    part_rows: int | None = None
    actors: int | None = None
    gpus_per_actor: float | None = None
    token_budget: int | None = None
    threads: int | None = None
    lanes: int | None = None
    tokenize: Tokenize = "auto"
    resources: Mapping[str, float] = field(default_factory=dict)
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
        for name, each in self.resources.items():
            if name in ("CPU", "GPU", "memory") or not 0.0 < each < math.inf:
                raise InputError(
                    f"`resources` names what nodes were given beside CPUs and GPUs, such as `embedder: 1`, not `{name}: {each:g}`."
                )


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
    """Which indexes the table has beside the vectors'. Above `distribute_above` products the vectors' is built over the cluster."""

    type: str = "auto"
    scalar: tuple[str, ...] | None = None
    text: tuple[str, ...] = ()
    flat_below: int = 20_000
    fold_after: int = 8
    distribute_above: int = 20_000_000

    def __post_init__(self) -> None:
        if self.type not in VECTOR_INDEXES:
            raise InputError(f"`lance: type` is `{self.type}`, but must be one of: {', '.join(VECTOR_INDEXES)}.")
        if min(self.fold_after - 1, self.flat_below, self.distribute_above) < 0:
            raise InputError("`fold_after` is at least 1, `flat_below` and `distribute_above` are at least 0.")


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
    """The name under which readers find the index, how many generations stay behind it, and where a run leaves its metrics.

    `metrics` is a file for the node exporter, `pushgateway` an address: each has a history of its own, and both may be set.
    """

    alias: str = "prod"
    keep: int = 7
    grace: timedelta = timedelta(days=2)
    lease: timedelta = timedelta(minutes=10)
    metrics: str | None = None
    pushgateway: str | None = None

    def __post_init__(self) -> None:
        if self.pushgateway is not None:
            check_address(self.pushgateway)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The Ray cluster that does the work: `local` starts one for this run, `http(s)://host:8265` takes the whole command.

    `wait` is how long to wait for nodes; 0 fails at once. `insecure` allows a cluster that anybody may give work to.
    """

    address: str = "local"
    wait: timedelta = timedelta(hours=12)
    insecure: bool = False

    @property
    def wait_s(self) -> float | None:
        """Seconds to wait for nodes; None where none can come."""
        return None if self.address == "local" or not self.wait else self.wait.total_seconds()


@dataclass(frozen=True, kw_only=True)
class Judgments:
    """Where people's grades of products for queries lie, for `train`, `eval`, `mine`, `judge` and `calibrate`.

    `grades` are the names, lowest first, from `positive` on relevant; `columns` (our name: the file's), `labels` and `where` say how the file is read. `group`
    and `vertical` name columns of the catalog: the family of a variant, and what results are broken down by.
    """

    path: str | None = None
    queries: str | None = None
    grades: tuple[str, ...] = ("I", "C", "S", "E")
    positive: str = "S"
    columns: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    where: Mapping[str, str] = field(default_factory=dict)
    conflicts: Literal["refuse", "highest", "lowest"] = "refuse"
    group: str | None = None
    vertical: str | None = None
    licence: str = ""

    def __post_init__(self) -> None:
        if self.positive not in self.grades[1:]:
            raise InputError(
                f"`positive` is `{self.positive}`, which is not among the grades above the lowest: {', '.join(self.grades[1:])}."
            )
