"""JSON Lines files: one object per line, values in the type that JSON gave them, nested values as JSON text.

Types are told per block: a number in one and a text in the next are both delivered as they are.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import pyarrow as pa

from pipelines.contracts import PinnedObject, Shard, Window
from pipelines.normalize.scalars import spell_floats
from pipelines.schema import ID
from pipelines.sources.batches import emit
from pipelines.sources.files import FileSource
from pipelines.sources.lines import chunks, compression, piece, records
from pipelines.sources.objects import Place, opened
from pipelines.sources.projection import Projection, broken_rows
from pipelines.sources.spec import SourceSpec

SHARD_BYTES = 128 << 20
_DEEPEST = 100


@dataclass(frozen=True, kw_only=True)
class JsonlShard:
    """One file, or the lines that begin in a byte range of a plain one."""

    place: Place
    pinned: PinnedObject
    projection: Projection
    window: Window | None
    max_expansion: int
    start: int = 0
    stop: int | None = None

    @property
    def name(self) -> str:
        """The file, and the byte range where it was split."""
        return self.pinned.name if self.stop is None else f"{self.pinned.name}#{self.start}-{self.stop}"

    def open(self) -> Iterator[pa.RecordBatch]:
        """Stream the window's rows; lines that are no JSON object come as rows of their own after their block."""
        with opened(self.place, self.pinned.name, expected=self.pinned) as file:
            yield from emit(self._batches(file), projection=self.projection, window=self.window)

    def _batches(self, file: pa.NativeFile) -> Iterator[pa.RecordBatch]:
        if self.stop is None:
            stream = chunks(file, name=self.pinned.name, max_expansion=self.max_expansion)
        else:
            stream = piece(file, start=self.start, stop=self.stop)
        for block, mask in records(stream):
            broken = [block] if mask is None else []
            rows = [] if mask is None else _objects(block, broken)
            if rows:
                yield _batch(rows, self.projection)
            if broken:
                yield broken_rows(broken)


def _objects(block: bytes, broken: list[bytes]) -> list[dict[str, Any]]:
    """Parse the lines of a block; those that hold no object end in `broken`."""
    try:
        lines = block.decode().split("\n")
    except UnicodeDecodeError:
        # Bytes that are not UTF-8 survive the parser as lone surrogates, and become bytes again in `_texts`.
        lines = block.decode("utf-8", "surrogateescape").split("\n")
    rows = []
    for line in lines:
        row = _parse(line)
        if isinstance(row, dict) and not (line.count("[") + line.count("{") > _DEEPEST and _too_deep(row)):
            rows.append(row)
        elif line.strip():
            broken.append(line.encode("utf-8", "surrogateescape"))
    return rows


def _too_deep(row: Any) -> bool:
    """Whether values nest beyond what no product has: they could be parsed, but perhaps not written again."""
    level = [row]
    for _ in range(_DEEPEST):
        inner = [value.values() if isinstance(value, dict) else value for value in level if isinstance(value, dict | list)]
        level = [value for values in inner for value in values]
    return bool(level)


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


# From here on a whole number is spelled with an exponent once it is a float.
_PLAIN_BELOW = 10**10
# From here on two neighbouring integers may be one double, so a float is no id.
_EXACT_BELOW = 2**53
_DECODER = json.JSONDecoder(parse_constant=_refuse)


def _parse(line: str) -> Any:
    """Return what a line holds, or None where it is no JSON (bottomless nesting and endless numbers included)."""
    try:
        return _DECODER.decode(line)
    except (ValueError, RecursionError):
        return None


def _batch(rows: Sequence[Mapping[str, Any]], projection: Projection) -> pa.RecordBatch:
    keys = [theirs for _, theirs in projection.columns]
    if projection.prefix is not None:
        keys += sorted({key for row in rows for key in row if key.startswith(projection.prefix)})
    keys = list(dict.fromkeys(keys))
    ids = {theirs for ours, theirs in projection.columns if ours == ID}
    columns = [_column([row.get(key) for row in rows], is_id=key in ids) for key in keys]
    return pa.RecordBatch.from_arrays(columns, names=[_name(key) for key in keys])


def _name(key: str) -> str:
    """Return a key as a column name: Arrow's are UTF-8."""
    return key.encode("utf-8", "replace").decode()


def _column(values: list[Any], *, is_id: bool) -> pa.Array:
    """Return values in their JSON type; nested values, numbers beyond 64 bits and mixtures become JSON text.

    What a value becomes must not depend on its neighbours: numbers are spelled in a mixture as normalising spells them in a
    column of their own, and an id that is no text and no whole number is dropped from a mixture, as it is rejected elsewhere.
    """
    kinds = {type(value) for value in values} - {type(None)}
    if not kinds:
        return pa.nulls(len(values))
    alike = kinds != {int, float} or all(type(value) is not int or abs(value) < _PLAIN_BELOW for value in values)
    if alike and kinds in ({bool}, {int}, {float}, {int, float}):
        with contextlib.suppress(pa.ArrowInvalid, OverflowError):
            return pa.array(values, pa.float64() if float in kinds else None)
    return _texts(values if kinds == {str} else [_spelled(value, is_id=is_id) for value in values])


def _spelled(value: Any, *, is_id: bool) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if is_id:
        whole = type(value) is int or (type(value) is float and value.is_integer() and abs(value) < _EXACT_BELOW)
        return str(int(value)) if whole else None
    if type(value) is float:
        return str(spell_floats(pa.array([value]))[0])
    return json.dumps(value, ensure_ascii=False)


def _texts(values: list[str | None]) -> pa.Array:
    """Return text; as bytes where some value is not UTF-8."""
    try:
        return pa.array(values, pa.string())
    except UnicodeEncodeError:
        return pa.array([None if value is None else _bytes(value) for value in values], pa.binary())


def _bytes(value: str) -> bytes:
    try:
        return value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        # An escape such as \ud800 names half a character; its bytes are not UTF-8 either.
        return value.encode("utf-8", "surrogatepass")


@dataclass(frozen=True, kw_only=True)
class JsonlFormat:
    """Knows the keys at a file's start. Plain files beyond `shard_bytes` are split at line ends."""

    max_expansion: int
    shard_bytes: int = SHARD_BYTES

    def names(self, place: Place, pinned: PinnedObject) -> Sequence[str]:
        """Return the keys of the file's first block (4 MiB); none for an empty file."""
        with opened(place, pinned.name, expected=pinned) as file:
            stream = chunks(file, name=pinned.name, max_expansion=self.max_expansion)
            block, mask = next(records(stream), (b"", b""))
            rows = [] if mask is None else _objects(block, [])
            return list(dict.fromkeys(key for row in rows for key in row))

    def shards(self, place: Place, pinned: PinnedObject, *, projection: Projection, window: Window | None) -> Sequence[Shard]:
        """Return one shard, or several for a large plain file."""

        def shard(start: int, stop: int | None) -> Shard:
            return JsonlShard(
                place=place,
                pinned=pinned,
                projection=projection,
                window=window,
                max_expansion=self.max_expansion,
                start=start,
                stop=stop,
            )

        if pinned.size <= self.shard_bytes:
            return [shard(0, None)]
        with opened(place, pinned.name, expected=pinned) as file:
            if compression(file) is not None:
                return [shard(0, None)]
        return [shard(start, min(start + self.shard_bytes, pinned.size)) for start in range(0, pinned.size, self.shard_bytes)]


def make(spec: SourceSpec, projection: Projection) -> FileSource:
    """Return a catalog of JSON Lines files."""
    return FileSource(spec, projection, JsonlFormat(max_expansion=spec.max_expansion))
