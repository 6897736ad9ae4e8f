"""A Lance table as a catalog: one version of it, cut into fragments; the window is a filter inside Lance's scanner."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import lance
import pyarrow as pa

from pipelines.contracts import PinnedObject, Shard, SourcePin, Window
from pipelines.errors import SourceError, SourceMoved
from pipelines.sources.batches import emit, limited
from pipelines.sources.objects import locate
from pipelines.sources.projection import Projection
from pipelines.sources.spec import SourceSpec
from pipelines.sources.windowing import effective, expression

SHARD_BYTES = 128 << 20
_SCAN_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class LanceTable:
    """The address of a table."""

    path: str
    options: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    def open(self, version: int | None) -> Any:
        """Open a version, or the latest; Lance's own errors get an address and an advice."""
        try:
            return lance.dataset(self.path, version=version, storage_options=dict(self.options) or None)
        except (ValueError, OSError, RuntimeError) as error:
            which = "" if version is None else f" version {version}"
            raise SourceError(f"{self.path}{which} cannot be opened: {error}. Check the path, the version and the rights.") from error


@dataclass(frozen=True, kw_only=True)
class LanceShard:
    """Some fragments of a pinned version, known by their numbers and by the digest of what they consist of."""

    table: LanceTable
    version: int
    fragments: tuple[int, ...]
    digest: str
    projection: Projection
    window: Window | None

    @property
    def name(self) -> str:
        """The table, its version, and the fragments."""
        return f"{self.table.path}@{self.version}#{self.fragments[0]}-{self.fragments[-1]}"

    def open(self) -> Iterator[pa.RecordBatch]:
        """Stream the window's rows of the pinned version, whatever was written since."""
        try:
            dataset = self.table.open(self.version)
        except SourceError as error:
            raise SourceMoved(f"{self.name} is no longer there. Plan again.") from error
        fragments = [dataset.get_fragment(number) for number in self.fragments]
        if any(fragment is None for fragment in fragments) or _digest(fragments) != self.digest:
            raise SourceMoved(f"{self.name} was replaced by another table. Plan again.")
        return emit(self._batches(dataset, fragments), projection=self.projection, window=self.window)

    def _batches(self, dataset: Any, fragments: Sequence[Any]) -> Iterator[pa.RecordBatch]:
        name, test = self.projection.updated_at, None
        if self.window is not None and name is not None:
            test = expression(name, dataset.schema.field(name).type, self.window)
        wanted = self.projection.wanted(dataset.schema.names)
        try:
            scanner = dataset.scanner(columns=wanted, filter=test, fragments=fragments, batch_size=_SCAN_ROWS, batch_readahead=2)
            yield from scanner.to_batches()
        except (ValueError, OSError, RuntimeError) as error:
            raise SourceError(f"{self.name} cannot be read: {error}. If its version was cleaned up, plan again.") from error


class LanceSource:
    """Reads the version that its latest `snapshot` pinned."""

    def __init__(self, spec: SourceSpec, projection: Projection) -> None:
        place, path = locate(spec.path or "", spec.options)
        self._table = LanceTable(path=path, options=place.options)
        self._spec, self._projection = spec, projection
        self._dataset: Any = None

    def snapshot(self) -> SourcePin:
        """Pin the configured version, or the latest one now, and the fragments that it consists of."""
        self._dataset = self._table.open(self._spec.version)
        fragments = self._dataset.get_fragments()
        pinned = PinnedObject(
            name=f"version {self._dataset.version}", size=sum(_stored_bytes(item) for item in fragments), etag=_digest(fragments)
        )
        return SourcePin(kind="lance", address=self._table.path, objects=(pinned,))

    def read(self, window: Window) -> Sequence[Shard]:
        """Return shards of whole fragments, in their order."""
        return self._shards(self._projection, effective(window, updated_at=self._projection.updated_at))

    def ids(self) -> Sequence[Shard]:
        """Return shards that read only the id and the tombstone column."""
        return self._shards(self._projection.for_ids(), None)

    def _shards(self, projection: Projection, window: Window | None) -> Sequence[Shard]:
        if self._dataset is None:
            self.snapshot()
        projection.require(self._dataset.schema.names, where=self._table.path)
        early = window if self._spec.limit is None else None
        shards = [
            LanceShard(
                table=self._table,
                version=self._dataset.version,
                fragments=tuple(fragment.fragment_id for fragment in group),
                digest=_digest(group),
                projection=projection,
                window=early,
            )
            for group in _groups(self._dataset.get_fragments())
        ]
        return limited(shards, limit=self._spec.limit, window=window)


def _groups(fragments: Sequence[Any]) -> Iterator[list[Any]]:
    """Gather consecutive fragments until a shard is large enough to be worth a task."""
    group: list[Any] = []
    size = 0
    for fragment in fragments:
        group.append(fragment)
        size += _stored_bytes(fragment)
        if size >= SHARD_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _stored_bytes(fragment: Any) -> int:
    return sum(file.file_size_bytes or 0 for file in fragment.metadata.files)


def _digest(fragments: Sequence[Any]) -> str:
    """Hash what fragments consist of: data files have random names, so equal digests mean equal rows."""
    parts: list[Mapping[str, Any]] = [fragment.metadata.to_json() for fragment in fragments]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def make(spec: SourceSpec, projection: Projection) -> LanceSource:
    """Return a Lance table as a catalog."""
    return LanceSource(spec, projection)
