"""What a generation is: every object it needs by size and sha256, and where they come from. Canonical JSON, strict to read.

Equal manifests give equal bytes. A manifest of an unknown format, with a missing, extra, repeated or mistyped key is
refused by name, because a reader that guesses could serve a mixture.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Any, Literal, TypeVar, get_args

from pipelines.contracts import IndexUse, ObjectRef, PinnedObject, SourcePin, Window
from pipelines.errors import InputError, ManifestError, OldFormat

FORMAT_VERSION = 1
# Format 2 says how the indexes came about and how they are asked. Format 1 is read as one that does not say.
MANIFEST_FORMAT = 2
MAX_MANIFEST_BYTES = 64 * 1024 * 1024

Verdict = Literal["passed", "warned", "failed", "skipped"]
T = TypeVar("T")
Parser = Callable[[Any, str], T]

GENERATION = re.compile(r"g[0-9]{6,18}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_DIGEST = re.compile(r"[A-Za-z0-9._:-]{1,200}")
_MAX_INT = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class ManifestObject(ObjectRef):
    """An object that a generation needs, what it is for (`vectors`, `faiss`, `ids`, ...), and its rows if it has any."""

    role: str
    rows: int | None = None

    @classmethod
    def of(cls, ref: ObjectRef, *, role: str, rows: int | None = None) -> ManifestObject:
        """Give a stored object its role."""
        return cls(key=ref.key, size=ref.size, sha256=ref.sha256, role=role, rows=rows)


@dataclass(frozen=True, kw_only=True)
class TablePin:
    """The Lance table at one version: its address below the root, the tag that protects it, and its files.

    `rows_digest` is an order-free hash of the live rows, where the writer took one: file bytes differ between two
    equal tables, because the engine names files at random.
    """

    uri: str
    version: int
    tag: str
    rows_digest: str | None = None
    objects: tuple[ManifestObject, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """One generation. Times are aware and kept in UTC; `window.until` is the next watermark; `gates` maps names to verdicts."""

    generation: str
    parent: str | None
    created_at: datetime
    run_id: str
    source: SourcePin
    window: Window
    tower: str
    template_digest: str
    schema_digest: str
    config_digest: str
    table: TablePin | None = None
    parts: tuple[ManifestObject, ...] = ()
    segments: tuple[ManifestObject, ...] = ()
    tombstones: tuple[ManifestObject, ...] = ()
    attachments: tuple[ManifestObject, ...] = ()
    indexes: Mapping[str, IndexUse] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    gates: Mapping[str, Verdict] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_generation(self.generation)
        if self.parent is not None and generation_number(self.parent) >= generation_number(self.generation):
            raise ManifestError(f"{self.generation}: its parent {self.parent} is not older. Take the id from `next_generation_id`.")
        if self.created_at.tzinfo is None:
            raise ManifestError(f"{self.generation}: created_at {self.created_at} has no time zone. Pass an aware clock.")
        object.__setattr__(self, "created_at", self.created_at.astimezone(UTC))
        window = Window(since=_utc(self.window.since), until=self.window.until.astimezone(UTC), bounded=self.window.bounded)
        object.__setattr__(self, "window", window)
        # One order for what came from several workers, so that the same content is the same bytes.
        object.__setattr__(
            self, "source", replace(self.source, objects=tuple(sorted(self.source.objects, key=lambda o: (o.name, o.size, o.etag))))
        )
        seen: set[str] = set()
        for item in self.objects:
            if item.key in seen:
                raise ManifestError(f"{self.generation}: {item.key} is listed twice. List every object once, under one role.")
            seen.add(item.key)

    @property
    def objects(self) -> tuple[ManifestObject, ...]:
        """Every object that the generation needs."""
        table = self.table.objects if self.table else ()
        return (*self.parts, *self.segments, *self.tombstones, *table, *self.attachments)

    @property
    def failed_gates(self) -> tuple[str, ...]:
        """Names of the gates that forbid publishing."""
        return tuple(sorted(name for name, verdict in self.gates.items() if verdict == "failed"))

    def to_json(self) -> bytes:
        """Return the canonical bytes. ASCII escapes, so that no file name of a source can make them unwritable."""
        return canonical({"format_version": MANIFEST_FORMAT, **_plain(self)})

    @classmethod
    def from_json(cls, data: bytes, *, where: str = "manifest") -> Manifest:
        """Read what `to_json` wrote, or raise `ManifestError` naming what is wrong and where."""
        return parse(
            data, where=where, limit_bytes=MAX_MANIFEST_BYTES, parsers=_PARSERS, build=cls, latest=MANIFEST_FORMAT, added={"indexes": {}}
        )

    @property
    def content_digest(self) -> str:
        """Hash of what readers get: equal for two runs of the same work, whenever, under whatever names they ran."""
        listed = {name: sorted(_content(o) for o in getattr(self, name)) for name in ("parts", "segments", "tombstones")}
        table = [self.table.uri, self.table.rows_digest] if self.table else None
        names = ("tower", "template_digest", "schema_digest", "counts")
        return hashlib.sha256(canonical({"table": table, **listed, **{name: _plain(getattr(self, name)) for name in names}})).hexdigest()


def check_generation(generation: str) -> str:
    """Return a well-formed generation id, or raise: it becomes part of a path."""
    if not GENERATION.fullmatch(generation) or generation != f"g{int(generation[1:]):06d}":
        raise ManifestError(f"{generation[:40]!r} is no generation id. An id is `g` and at least six digits, such as g000042.")
    return generation


def generation_number(generation: str) -> int:
    """Return the number in a generation id; ids compare by it, not as text."""
    return int(check_generation(generation)[1:])


def next_generation_id(existing: Iterable[str]) -> str:
    """Return the id after the highest that exists, finished or not: an attempt never reuses another's folder."""
    return f"g{max(map(generation_number, existing), default=0) + 1:06d}"


def canonical(data: Any) -> bytes:
    """Return JSON with one spelling: sorted keys, no spaces, ASCII, one final newline."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n"


def parse(
    data: bytes,
    *,
    where: str,
    limit_bytes: int,
    parsers: Mapping[str, Parser[Any]],
    build: Callable[..., T],
    earliest: int = 1,
    latest: int = FORMAT_VERSION,
    added: Mapping[str, Any] = MappingProxyType({}),
) -> T:
    """Read one strict, versioned JSON document into a dataclass. Every failure is a `ManifestError` that begins with `where`.

    `added` are the keys that the `latest` format has and older ones do not, with what their absence means.
    """
    if len(data) > limit_bytes:
        raise ManifestError(f"{where}: {len(data)} bytes exceed the limit of {limit_bytes}. This is no file of catalog-embed.")
    try:
        tree = json.loads(data.decode("utf-8"), object_pairs_hook=_without_repeats, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{where}: not readable as JSON: {str(error)[:200]}. Restore it from a copy.") from error
    version = tree.pop("format_version", None) if isinstance(tree, dict) else None
    if type(version) is not int or version < 1:
        raise ManifestError(f"{where}: format_version is {str(version)[:40]!r}, not a positive number. This is no file of catalog-embed.")
    if version > latest:
        advice = f"written by a newer version of catalog-embed (format {version}, this one reads up to {latest})"
        raise ManifestError(f"{where}: {advice}: upgrade before reading or publishing.")
    if version < earliest:
        raise OldFormat(
            f"{where}: format {version} is of an older catalog-embed, and this one reads from {earliest}. The next run makes it anew."
        )
    if version < latest:
        tree = {**added, **tree}
    values = read_fields(tree, where, parsers)
    try:
        return build(**values)
    except (ManifestError, InputError) as error:
        raise ManifestError(f"{where}: {error}") from error


def read_fields(data: Any, where: str, parsers: Mapping[str, Parser[Any]]) -> dict[str, Any]:
    """Read an object that has exactly these keys."""
    if not isinstance(data, dict):
        raise ManifestError(f"{where}: expected an object, found {_shown(data)}.")
    missing, extra = sorted(parsers.keys() - data.keys()), sorted(data.keys() - parsers.keys())
    if missing or extra:
        parts = [f"{word} {', '.join(names)[:200]}" for word, names in (("missing", missing), ("unknown", extra)) if names]
        raise ManifestError(f"{where}: {' and '.join(parts)}. The file is damaged or was edited.")
    return {name: parser(data[name], f"{where}.{name}") for name, parser in parsers.items()}


def text(data: Any, where: str) -> str:
    """Read any string."""
    if not isinstance(data, str):
        raise ManifestError(f"{where}: expected a string, found {_shown(data)}.")
    return data


def flag(data: Any, where: str) -> bool:
    """Read true or false."""
    if not isinstance(data, bool):
        raise ManifestError(f"{where}: expected true or false, found {_shown(data)}.")
    return data


def count(data: Any, where: str) -> int:
    """Read a whole number from 0 to 2**63 - 1."""
    if type(data) is not int or not 0 <= data <= _MAX_INT:
        raise ManifestError(f"{where}: expected a whole number from 0, found {_shown(data)}.")
    return data


def number(data: Any, where: str) -> float:
    """Read a finite number."""
    if type(data) not in (int, float) or not math.isfinite(data):
        raise ManifestError(f"{where}: expected a number, found {_shown(data)}.")
    return float(data)


def moment(data: Any, where: str) -> datetime:
    """Read a time in the one spelling that is written: ISO 8601 in UTC."""
    try:
        found = datetime.fromisoformat(text(data, where))
    except ValueError:
        found = None
    if found is None or found.utcoffset() != timedelta(0) or found.astimezone(UTC).isoformat() != data:
        raise ManifestError(f"{where}: expected a UTC time such as 2026-11-04T02:10:00+00:00, found {_shown(data)}.")
    return found.astimezone(UTC)


def matching(pattern: re.Pattern[str], what: str) -> Parser[str]:
    """Make a parser of strings that match a whole pattern."""

    def parser(data: Any, where: str) -> str:
        if not pattern.fullmatch(text(data, where)):
            raise ManifestError(f"{where}: expected {what}, found {_shown(data)}.")
        return str(data)

    return parser


def optional(parser: Parser[T]) -> Parser[T | None]:
    """Make a parser that also takes null."""
    return lambda data, where: None if data is None else parser(data, where)


sha256_hex = matching(_SHA256, "a sha256 in 64 lower-case hexadecimal digits")
generation_id = matching(GENERATION, "a generation id such as g000042")
_digest = matching(_DIGEST, "a digest")


def _listed(parser: Parser[T]) -> Parser[tuple[T, ...]]:
    def listed(data: Any, where: str) -> tuple[T, ...]:
        if not isinstance(data, list):
            raise ManifestError(f"{where}: expected a list, found {_shown(data)}.")
        return tuple(parser(item, f"{where}[{number}]") for number, item in enumerate(data))

    return listed


def mapped(parser: Parser[T]) -> Parser[dict[str, T]]:
    """Make a parser of objects whose values are all of one kind, under any names."""

    def _mapped(data: Any, where: str) -> dict[str, T]:
        if not isinstance(data, dict):
            raise ManifestError(f"{where}: expected an object, found {_shown(data)}.")
        return {name: parser(item, f"{where}.{name[:80]}") for name, item in data.items()}

    return _mapped


def built(build: Callable[..., T], parsers: Mapping[str, Parser[Any]]) -> Parser[T]:
    """Make a parser of objects that have exactly these keys, and build something of each."""
    return lambda data, where: build(**read_fields(data, where, parsers))


def _verdict(data: Any, where: str) -> str:
    if data not in get_args(Verdict):
        raise ManifestError(f"{where}: expected one of {', '.join(get_args(Verdict))}, found {_shown(data)}.")
    return str(data)


def _window(data: Any, where: str) -> Window:
    values = read_fields(data, where, {"since": optional(moment), "until": moment, "bounded": flag})
    try:
        return Window(**values)
    except InputError as error:
        raise ManifestError(f"{where}: {error}") from error


_OBJECT = built(ManifestObject, {"key": text, "size": count, "sha256": sha256_hex, "role": text, "rows": optional(count)})
_OBJECTS = _listed(_OBJECT)
_PINNED = built(PinnedObject, {"name": text, "size": count, "etag": text})
_TUNED: Mapping[str, Parser[Any]] = {
    "search": mapped(count),
    "recall": optional(number),
    "target": optional(number),
    "trained_recall": optional(number),
}
_USE: Mapping[str, Parser[Any]] = {"action": text, "trigger": optional(text), "reason": text, **_TUNED}
_PARSERS: Mapping[str, Parser[Any]] = {
    "generation": generation_id,
    "parent": optional(generation_id),
    "created_at": moment,
    "run_id": text,
    "source": built(SourcePin, {"kind": text, "address": text, "objects": _listed(_PINNED)}),
    "window": _window,
    "tower": _digest,
    "template_digest": _digest,
    "schema_digest": _digest,
    "config_digest": _digest,
    "table": optional(
        built(TablePin, {"uri": text, "version": count, "tag": text, "rows_digest": optional(_digest), "objects": _OBJECTS}),
    ),
    "parts": _OBJECTS,
    "segments": _OBJECTS,
    "tombstones": _OBJECTS,
    "attachments": _OBJECTS,
    "indexes": mapped(built(IndexUse, _USE)),
    "counts": mapped(count),
    "gates": mapped(_verdict),
    "versions": mapped(text),
}


def _plain(value: Any) -> Any:
    """Return dataclasses, mappings, sequences and times as JSON types."""
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if hasattr(value, "__dataclass_fields__"):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    return value


def _content(item: ManifestObject) -> list[Any]:
    return [item.role, item.sha256, item.size, -1 if item.rows is None else item.rows]


def _utc(time: datetime | None) -> datetime | None:
    return time.astimezone(UTC) if time else None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"repeated key {name[:80]!r}")
        found[name] = value
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _shown(data: Any) -> str:
    return f"{type(data).__name__} {str(data)[:60]!r}"
