"""What the floors promise each other: windows, pins, column maps, and the three methods that make a source. No I/O."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa

from pipelines.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Window:
    """The rows to read: updated at or after `since`, or without an update time. All times are aware.

    `until` is the moment the window was resolved. It is recorded, becomes the next watermark and caps future
    timestamps, but filters nothing unless `bounded`: a row newer than `until` is merely fresher.
    """

    since: datetime | None
    until: datetime
    bounded: bool = False

    def __post_init__(self) -> None:
        for moment in (self.since, self.until):
            if moment is not None and moment.tzinfo is None:
                raise InputError(f"window boundary {moment} has no time zone. Set `timezone` in the configuration.")
        if self.since is not None and self.since >= self.until:
            raise InputError(f"the window is empty: it starts at {self.since} and ends at {self.until}.")

    @property
    def full(self) -> bool:
        """Whether the window holds the whole catalog, so that absence means deleted."""
        return self.since is None and not self.bounded


@dataclass(frozen=True, kw_only=True)
class DeletedRule:
    """The column that marks a tombstone, and the value it then has."""

    column: str
    equals: bool | str | int = True


@dataclass(frozen=True, kw_only=True)
class ColumnMap:
    """Where a source keeps what the pipeline needs: `columns` maps our field to the source's column.

    `attributes` is one column (a map, a struct or a JSON text), or a prefix such as `attr_*`, or a list of columns.
    """

    id: str = "id"
    locale: str | None = None
    updated_at: str | None = None
    deleted: DeletedRule | None = None
    attributes: str | tuple[str, ...] | None = None
    columns: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PinnedObject:
    """One thing that was there to read: a file with its size and etag, a table with its version, a query with its answer."""

    name: str
    size: int
    etag: str


@dataclass(frozen=True, kw_only=True)
class SourcePin:
    """What a source held when it was looked at. Two equal pins mean that a second read gives the same rows."""

    kind: str
    address: str
    objects: tuple[PinnedObject, ...]

    @property
    def bytes(self) -> int:
        """Size of everything pinned, as the source reports it."""
        return sum(item.size for item in self.objects)

    @property
    def digest(self) -> str:
        """Return one hash over kind, address and objects, whatever their order."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Return the pin as JSON types; objects are sorted by name."""
        objects = [{"name": o.name, "size": o.size, "etag": o.etag} for o in sorted(self.objects, key=lambda o: o.name)]
        return {"kind": self.kind, "address": self.address, "objects": objects}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SourcePin:
        """Read back what `to_json` wrote."""
        return cls(kind=data["kind"], address=data["address"], objects=tuple(PinnedObject(**item) for item in data["objects"]))

    def moved(self, now: SourcePin) -> list[str]:
        """Say in words what differs between this pin and a later one; empty when nothing moved."""
        before, after = ({o.name: o for o in pin.objects} for pin in (self, now))
        if (self.kind, self.address) != (now.kind, now.address):
            return [f"{self.kind} {self.address} became {now.kind} {now.address}"]
        gone = [f"{name} is gone" for name in sorted(before.keys() - after.keys())]
        new = [f"{name} is new" for name in sorted(after.keys() - before.keys())]
        changed = [f"{name} changed" for name in sorted(before.keys() & after.keys()) if before[name] != after[name]]
        return gone + new + changed


@dataclass(frozen=True, kw_only=True)
class ObjectRef:
    """One stored object and what it must hold: its key under the store's root, its size in bytes, its sha256 in hex."""

    key: str
    size: int
    sha256: str


@runtime_checkable
class Shard(Protocol):
    """A piece of a source that one worker reads. Picklable and small: it holds addresses, never rows."""

    @property
    def name(self) -> str:
        """What a person calls it (file name and row groups, table fragment); stable between runs."""
        ...

    def open(self) -> Iterator[pa.RecordBatch]:
        """Stream the shard's rows in bounded batches. Columns carry our names, values are still the source's."""
        ...


@runtime_checkable
class Source(Protocol):
    """A catalog. Every implementation passes the one behaviour suite in tests/pipelines/test_sources.py."""

    def snapshot(self) -> SourcePin:
        """Pin what is there now, without reading rows."""
        ...

    def read(self, window: Window) -> Sequence[Shard]:
        """Return the shards that hold the window's rows: only mapped columns, filtered inside the reader."""
        ...

    def ids(self) -> Sequence[Shard]:
        """Return shards that give, for every row there is, only what deletes need: id, and the tombstone column."""
        ...


# The two indexes of a generation, as its manifest names them.
FAISS_INDEX, LANCE_INDEX = "faiss", "lance"

# Two measurements of one index with a few products more or less differ by this much.
_SLACK = 0.01


@dataclass(frozen=True, kw_only=True)
class IndexUse:
    """One index of a generation: what the run did to it, which trigger asked for it, and how readers ask it.

    `search` are the parameters that were tuned on vectors held out of the training, and `recall` what they reached there;
    `target` is what was asked for, `trained_recall` what the last training reached. `trigger` is None where nothing but the night's own changes called for the action.
    """

    action: str
    trigger: str | None
    reason: str
    search: Mapping[str, int] = field(default_factory=dict)
    recall: float | None = None
    target: float | None = None
    trained_recall: float | None = None

    def needs(self, target: float) -> float:
        """Return the recall below which more is done: the target, or nearly what training reached where it missed the target.

        An index that cannot reach its target is not trained anew every night, but once when the target is raised.
        """
        if self.trained_recall is None or self.target is None or target > self.target:
            return target
        return min(target, self.trained_recall - _SLACK)


class Spread(Protocol):
    """Calls a function with each of the arguments, here or on a cluster, and yields the results in any order."""

    def __call__(self, function: Callable[..., Any], arguments: Iterable[tuple[Any, ...]], *, in_flight: int) -> Iterator[Any]:
        """Keep at most `in_flight` calls under way; an argument is not made before its turn."""
        ...


def one_by_one(function: Callable[..., Any], arguments: Iterable[tuple[Any, ...]], *, in_flight: int) -> Iterator[Any]:
    """Be the spread of one process."""
    del in_flight
    return itertools.starmap(function, arguments)
