"""A Delta table as a catalog: its log names the files of one version, and each is read as the Parquet file that it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import deltalake
import pyarrow as pa
import pyarrow.dataset as ds
from deltalake.exceptions import DeltaError, DeltaProtocolError

from pipelines.contracts import PinnedObject, Shard, SourcePin, Window
from pipelines.errors import SourceError
from pipelines.sources.batches import limited
from pipelines.sources.objects import locate
from pipelines.sources.parquet import ParquetShard
from pipelines.sources.projection import Projection
from pipelines.sources.spec import SourceSpec
from pipelines.sources.windowing import effective, expression


class DeltaSource:
    """Reads the version that its latest `snapshot` pinned."""

    def __init__(self, spec: SourceSpec, projection: Projection) -> None:
        self._place, self._path = locate(spec.path or "", spec.options)
        self._spec, self._projection = spec, projection
        self._table: Any = None

    def snapshot(self) -> SourcePin:
        """Pin the configured version, or the latest one now, and what a reader of it must understand."""
        try:
            table = deltalake.DeltaTable(self._path, version=self._spec.version, storage_options=dict(self._place.options) or None)
            sizes = pa.table(table.get_add_actions()).column("size_bytes")
        except (DeltaError, OSError, ValueError) as error:
            which = "" if self._spec.version is None else f" version {self._spec.version}"
            raise SourceError(f"{self._path}{which} cannot be opened: {error}. Check the path, the version and the rights.") from error
        protocol = table.protocol()
        features = "+".join(sorted(protocol.reader_features or ()))
        pinned = PinnedObject(
            name=f"version {table.version()}",
            size=sum(sizes.to_pylist()),
            etag=f"{table.metadata().id} reader {protocol.min_reader_version} {features}".rstrip(),
        )
        self._table = table
        return SourcePin(kind="delta", address=self._path, objects=(pinned,))

    def read(self, window: Window) -> Sequence[Shard]:
        """Return one shard for each file whose statistics admit a row of the window."""
        return self._shards(self._projection, effective(window, updated_at=self._projection.updated_at))

    def ids(self) -> Sequence[Shard]:
        """Return shards that read only the id and the tombstone column."""
        return self._shards(self._projection.for_ids(), None)

    def _shards(self, projection: Projection, window: Window | None) -> Sequence[Shard]:
        if self._table is None:
            self.snapshot()
        try:
            dataset = self._table.to_pyarrow_dataset()
        except DeltaProtocolError as error:
            raise SourceError(
                f"{self._path} uses Delta features that this reader lacks: {error}. "
                "Rewrite the table without them (for deletion vectors: REORG TABLE ... APPLY (PURGE))."
            ) from error
        projection.require(dataset.schema.names, where=self._path)
        early = window if self._spec.limit is None else None
        test = None
        if early is not None and projection.updated_at is not None:
            test = expression(projection.updated_at, dataset.schema.field(projection.updated_at).type, early)
        fragments = sorted(dataset.get_fragments(filter=test), key=lambda fragment: str(fragment.path))
        shards = [self._shard(fragment, dataset.schema, projection, early) for fragment in fragments]
        return limited(shards, limit=self._spec.limit, window=window)

    def _shard(self, fragment: Any, schema: pa.Schema, projection: Projection, window: Window | None) -> ParquetShard:
        values = ds.get_partition_keys(fragment.partition_expression)
        partitions = self._table.metadata().partition_columns
        return ParquetShard(
            place=self._place,
            path=f"{self._path}/{fragment.path}",
            # A table never changes a file that it wrote: only its absence (after a vacuum) is a move.
            expected=None,
            projection=projection,
            window=window,
            max_expansion=self._spec.max_expansion,
            constants=tuple((name, schema.field(name).type, values.get(name)) for name in partitions),
        )


def make(spec: SourceSpec, projection: Projection) -> DeltaSource:
    """Return a Delta table as a catalog."""
    return DeltaSource(spec, projection)
