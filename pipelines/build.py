"""What a run builds with: the space of a tower, the options of each stage, and the names that follow from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa

from encoder.registry import TowerCard, TowerOptions
from pipelines.diff.engine import DiffOptions
from pipelines.index.triggers import RefreshOptions
from pipelines.manifest import Manifest, ManifestObject
from pipelines.pool import PoolOptions
from pipelines.prepare import Preparer
from pipelines.schema import ProductSchema, table_schema
from pipelines.storage import Store
from pipelines.stores import lance
from pipelines.telemetry import Observer
from pipelines.workers import spread


@dataclass(frozen=True, kw_only=True)
class Space:
    """Where the vectors of one tower live, and how they are kept."""

    directory: Path
    card: TowerCard
    options: TowerOptions
    objects: tuple[ManifestObject, ...]
    schema: ProductSchema
    vector: str

    @property
    def columns(self) -> pa.Schema:
        """The columns of the table."""
        return table_schema(self.schema, dims=self.card.dims, vector=self.vector)


@dataclass(frozen=True, kw_only=True)
class EmbedOptions(PoolOptions):
    """Which actors embed, how large a part is, and how texts are packed."""

    part_rows: int | None = None
    token_budget: int | None = None
    lanes: int | None = None
    # How long to wait for room on a cluster that may grow, None where it cannot.
    wait_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """Which indexes the table has, and when they are folded."""

    vector_index: str = "auto"
    scalar: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    flat_below: int = 20_000
    fold_after: int = 8
    distribute_above: int = lance.TableSpec.distribute_above


@dataclass(frozen=True, kw_only=True)
class Build:
    """Everything that carrying out a plan needs beside the plan's files."""

    store: Store
    options: Mapping[str, str] = field(repr=False)
    run_id: str
    # Empty while vectors are made ahead of a generation.
    generation: str
    space: Space
    base: Manifest | None
    preparer: Preparer
    embedding: EmbedOptions
    table: TableOptions
    refresh: RefreshOptions
    diff: DiffOptions
    work: Path
    observer: Observer
    # How many products a search is measured with.
    samples: int = 128
    # The filter columns changed since the base, so the table is written anew with the vectors that it has.
    rewrite: bool = False
    # Vectors are made again although the table has them, but for those that these runs have made again.
    afresh: bool = False
    paid_by: frozenset[str] = frozenset()

    @property
    def extends(self) -> Manifest | None:
        """The base whose table is extended, or None where a new table is built."""
        return None if self.rewrite else self.base

    @property
    def table_key(self) -> str:
        """Where the table is. Every table that is built whole has its own folder, so none that is published is touched."""
        if self.extends is not None and self.extends.table is not None:
            return self.extends.table.uri
        return f"tables/{self.space.card.fingerprint[:16]}-{self.generation}.lance"

    @property
    def table_uri(self) -> str:
        """The address of the table."""
        return self.store.uri(self.table_key)

    @property
    def workers(self) -> lance.Workers:
        """Who builds the pieces of a big table's vector index."""
        return lance.Workers(spread=spread)

    @property
    def spec(self) -> lance.TableSpec:
        """The table's columns and indexes."""
        options = self.table
        return lance.TableSpec(
            schema=self.space.columns,
            scalar=options.scalar,
            text=options.text,
            vector_index=options.vector_index,
            flat_below=options.flat_below,
            fold_after=options.fold_after,
            distribute_above=options.distribute_above,
        )


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """What the embed stage left: parts, and what could not be embedded."""

    parts: tuple[ManifestObject, ...]
    rejected: pa.Table
    lost: pa.Table
    texts: int
    tokens: int
    seconds: float
    waited: float
    halvings: int
    retries: int
    skipped: int
    # Why what was made ahead is not all: the catalog is no longer what was planned from.
    moved: str = ""

    def after(self, ahead: Embedded) -> Embedded:
        """Return these parts with what it cost to embed ahead of them added."""
        costs = ("texts", "tokens", "seconds", "waited", "halvings", "retries")
        return replace(self, **{name: getattr(self, name) + getattr(ahead, name) for name in costs})
