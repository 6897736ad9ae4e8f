"""A catalog of files, whatever their format: found, pinned, checked against the configuration, and cut into shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from pipelines.contracts import PinnedObject, Shard, SourcePin, Window
from pipelines.sources.batches import limited
from pipelines.sources.objects import Place, find, locate
from pipelines.sources.projection import Projection
from pipelines.sources.spec import SourceSpec
from pipelines.sources.windowing import effective

# Files that are looked into at once, for their columns and row groups.
_AT_ONCE = 16


class Format(Protocol):
    """What a file format knows."""

    def names(self, place: Place, pinned: PinnedObject) -> Sequence[str]:
        """Return the columns that a file shows; none where it holds no rows to tell them by."""
        ...

    def shards(self, place: Place, pinned: PinnedObject, *, projection: Projection, window: Window | None) -> Sequence[Shard]:
        """Cut one file into pieces for workers."""
        ...


class FileSource:
    """Reads what its latest `snapshot` pinned, and takes one first where there is none."""

    def __init__(self, spec: SourceSpec, projection: Projection, form: Format) -> None:
        self._spec, self._projection, self._form = spec, projection, form
        self._place, self._path = locate(spec.path or "", spec.options)
        self._pin: SourcePin | None = None

    def snapshot(self) -> SourcePin:
        """List the files now, with size and etag."""
        self._pin = SourcePin(kind=self._spec.type, address=self._path, objects=find(self._place, self._path))
        return self._pin

    def read(self, window: Window) -> Sequence[Shard]:
        """Return shards in the order of the file names; large Parquet and plain JSONL files give several."""
        return self._shards(self._projection, effective(window, updated_at=self._projection.updated_at))

    def ids(self) -> Sequence[Shard]:
        """Return shards that read only the id and the tombstone column."""
        return self._shards(self._projection.for_ids(), None)

    def _shards(self, projection: Projection, window: Window | None) -> Sequence[Shard]:
        objects = (self._pin or self.snapshot()).objects
        self._check(projection, objects)
        early = window if self._spec.limit is None else None
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            cut = pool.map(lambda item: self._form.shards(self._place, item, projection=projection, window=early), objects)
            shards = [shard for shards in cut for shard in shards]
        return limited(shards, limit=self._spec.limit, window=window)

    def _check(self, projection: Projection, objects: Sequence[PinnedObject]) -> None:
        """Require every mapped column in some file: one look in the common case, all files in the worst."""
        seen: dict[str, None] = {}
        for names in self._look(objects):
            projection.refuse_twins(names, where=self._path)
            seen |= dict.fromkeys(names)
            if seen and not projection.missing(seen):
                return
        if seen:
            projection.require(seen, where=self._path)

    def _look(self, objects: Sequence[PinnedObject]) -> Iterator[Sequence[str]]:
        """Yield the columns of the first file, then of the others, a few at a time."""
        yield self._form.names(self._place, objects[0])
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for start in range(1, len(objects), _AT_ONCE):
                yield from pool.map(lambda item: self._form.names(self._place, item), objects[start : start + _AT_ONCE])
