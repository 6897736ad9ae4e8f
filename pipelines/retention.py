"""Garbage collection: what an alias, a pin, a reader, a running run or a young generation needs stays; the rest may go.

A plan removes nothing. To apply it removes the manifests of dropped generations first, looks again, and only then
removes objects: killed anywhere, it leaves every kept generation whole, and the next collection finishes the work.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import groupby
from typing import Any

from pipelines.disk import ObjectInfo
from pipelines.errors import AlreadyExists, CatalogEmbedError, InputError, ManifestError, NotFound, PlanError
from pipelines.layout import byte_size, counted, printable, run_of
from pipelines.leases import CLOCK_SKEW, LeaseEntry, live_leases
from pipelines.manifest import FORMAT_VERSION, GENERATION, Manifest, Parser, canonical, check_generation, generation_id, moment, parse, text
from pipelines.publish import Clock, LogEntry, history
from pipelines.reader_pins import read_pins
from pipelines.storage import Store

# Folders that may hold garbage. Aliases, leases and pins are never touched.
SWEPT = ("generations", "runs", "segments", "tables", "towers", "vectors")

_LOOK_EVERY = 1000  # deletions between two looks at what is needed
_MANIFEST = "manifest.json"
_REMOVED = "removed.json"
_QUARANTINE = "quarantine.parquet"
_MAX_PIN_BYTES = 64 * 1024


@dataclass(frozen=True, kw_only=True)
class RetentionOptions:
    """How much history to keep: the newest generations of every alias, and everything younger than `grace`.

    Towers are costly to train and may wait for their first run: unused ones go only where `towers` says so.
    """

    keep: int = 7
    grace: timedelta = timedelta(days=2)
    towers: bool = False

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise InputError(f"`keep` is the number of generations to keep, at least 1, not {self.keep}. Two leave one to roll back to.")
        if self.grace < timedelta(hours=1):
            raise InputError(f"`grace` must outlast a run that is writing, not {self.grace}. Two days is a good time.")


@dataclass(frozen=True, kw_only=True)
class Pin:
    """A generation that a person keeps, whatever its age."""

    generation: str
    reason: str
    by: str
    at: datetime


@dataclass(frozen=True, kw_only=True)
class TableSweep:
    """What may go from one Lance table: versions before `cutoff` that no kept tag holds, and tags of dropped generations.

    With `strays`, no run is writing, and tags of no kept generation at versions before `cutoff` may go as well.
    """

    kept: Mapping[str, int]
    dropped: tuple[str, ...]
    cutoff: datetime
    strays: bool


SweepTable = Callable[[str, TableSweep], int]
"""Clean the table under this key, and return how many versions went."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """A manifest as it was read, and when it was written."""

    manifest: Manifest
    sha256: str
    written_at: datetime


@dataclass(frozen=True, kw_only=True)
class Roots:
    """What the store needs at one moment: generations with reasons, runs that write, and how old garbage must be."""

    heads: Mapping[str, int]
    reasons: Mapping[str, tuple[str, ...]]
    busy: frozenset[str]
    cutoff: datetime


@dataclass(frozen=True, kw_only=True)
class GcPlan:
    """What to keep and why, and what to remove. `foreign` are names that this tool cannot have written; they stay."""

    options: RetentionOptions
    roots: Roots
    drop: tuple[str, ...]
    objects: tuple[tuple[str, int], ...]
    tables: Mapping[str, TableSweep]
    foreign: tuple[str, ...]
    found: Mapping[str, Found] = field(repr=False)

    @property
    def keep(self) -> Mapping[str, tuple[str, ...]]:
        """Reasons, by kept generation."""
        return self.roots.reasons

    @property
    def bytes(self) -> int:
        """Size of what would go, without old versions of tables that stay."""
        return sum(size for _, size in self.objects)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON types."""
        tables = {key: {"kept": dict(sweep.kept), "dropped": list(sweep.dropped)} for key, sweep in self.tables.items()}
        lists = {"drop": [*self.drop], "objects": [{"key": key, "size": size} for key, size in self.objects], "foreign": [*self.foreign]}
        return {"keep": {name: [*why] for name, why in self.keep.items()}, "bytes": self.bytes, "tables": tables, **lists}


@dataclass(frozen=True, kw_only=True)
class Removed:
    """What a collection took away."""

    generations: int
    objects: int
    bytes: int
    table_versions: int
    temporaries: int


def pin(store: Store, generation: str, *, reason: str, by: str, clock: Clock) -> Pin:
    """Keep a generation until it is unpinned."""
    pinned = Pin(generation=check_generation(generation), reason=reason, by=by, at=clock().astimezone(UTC))
    data = canonical({"format_version": FORMAT_VERSION, "generation": generation, "reason": reason, "by": by, "at": pinned.at.isoformat()})
    parse(data, where=f"pin of {generation}", limit_bytes=_MAX_PIN_BYTES, parsers=_PIN_PARSERS, build=Pin)
    store.put(_pin_key(generation), data)
    # Looked at after the pin stands: a collection that removed it meanwhile has either seen the pin, or is seen here.
    if store.head(_manifest_key(generation)) is None:
        store.delete(_pin_key(generation))
        raise NotFound(f"{generation} has no manifest: it was never finished, or was collected. See `catalog-embed generations`.")
    return pinned


def unpin(store: Store, generation: str) -> None:
    """Leave a generation to its age; one that is not pinned is no error."""
    store.delete(_pin_key(generation))


def pins(store: Store) -> Mapping[str, Pin]:
    """Return what is pinned, by generation."""
    found = {}
    for info in store.list("pins"):
        with contextlib.suppress(NotFound):  # unpinned since the listing
            one = parse(store.get(info.key), where=store.uri(info.key), limit_bytes=_MAX_PIN_BYTES, parsers=_PIN_PARSERS, build=Pin)
            found[one.generation] = one
    return found


def plan_gc(store: Store, *, now: datetime, options: RetentionOptions) -> GcPlan:
    """Say what may go. Raise `ManifestError` where a manifest cannot be read: what it needs is not known, so nothing goes."""
    look = _look(store, now)
    found = {generation: _read(store, generation, look.manifests[generation]) for generation in sorted(look.manifests)}
    roots = _roots(look, found, now=now, options=options)
    kept = [found[generation].manifest for generation in roots.reasons]
    objects, foreign = [], []
    for info in _garbage(store, kept, roots, options):
        try:
            store.uri(info.key)
        except InputError:
            foreign.append(info.key)
            continue
        objects.append((info.key, info.size))
    drop = sorted(found.keys() - roots.reasons.keys())
    return GcPlan(
        options=options,
        roots=roots,
        drop=tuple(drop),
        objects=tuple(objects),
        tables=_table_sweeps(kept, [found[generation].manifest for generation in drop], roots),
        foreign=tuple(foreign),
        found=found,
    )


def apply_gc(store: Store, plan: GcPlan, *, sweep_table: SweepTable, clock: Clock) -> Removed:
    """Remove what a plan says, or raise `PlanError` and remove nothing where the store needs more by now."""
    _check_unmoved(store, plan, now=clock())
    for generation in sorted({key.split("/")[1] for key, _ in plan.objects if key.startswith("generations/")}):
        # Says that the folder is empty on purpose, and keeps its number from being given twice.
        with contextlib.suppress(AlreadyExists):
            store.put_if_absent(f"generations/{generation}/{_REMOVED}", canonical({"at": clock().isoformat(), "generation": generation}))
    _drop_manifests(store, plan, clock)
    manifests = {_manifest_key(generation) for generation in plan.drop}
    rest = [key for key, _ in plan.objects if key not in manifests]
    for number, key in enumerate(rest, start=1):
        if number % _LOOK_EVERY == 0:
            _check_unmoved(store, plan, now=clock())
        store.delete(key)
    store.failpoint("gc.before_tables")
    versions = sum(sweep_table(key, sweep) for key, sweep in plan.tables.items())
    swept = store.sweep_temporaries(older_than_s=plan.options.grace.total_seconds())
    return Removed(generations=len(plan.drop), objects=len(plan.objects), bytes=plan.bytes, table_versions=versions, temporaries=swept)


def gc_text(plan: GcPlan) -> str:
    """Lay a plan out on a screen: what stays and why, what goes."""
    lines = [f"Collection  {counted(len(plan.keep), 'generation')} stay, {len(plan.drop)} go: {_sizes([size for _, size in plan.objects])}"]
    lines += [f"  keep    {generation}  {'; '.join(map(printable, reasons))}" for generation, reasons in plan.keep.items()]
    lines += [f"  remove  {generation}  {plan.found[generation].manifest.created_at:%Y-%m-%d %H:%M} UTC" for generation in plan.drop]
    for folder, group in groupby(sorted(plan.objects), key=lambda item: item[0].split("/")[0]):
        lines.append(f"  remove  {folder + '/':<12}  {_sizes([size for _, size in group])}")
    lines += [f"  clean   {key}  versions {', '.join(map(str, sorted(sweep.kept.values())))} stay" for key, sweep in plan.tables.items()]
    lines += [f"  stays   {printable(key)}, which catalog-embed did not write" for key in plan.foreign[:5]]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True, kw_only=True)
class _Look:
    """What was read of the store in one go. Manifests come last: every generation that is named was written before."""

    leases: Mapping[str, LeaseEntry]
    histories: Mapping[str, tuple[LogEntry, ...]]
    pins: Mapping[str, Pin]
    readers: frozenset[str]
    manifests: Mapping[str, ObjectInfo]
    removed: frozenset[str]


def _look(store: Store, now: datetime) -> _Look:
    leases, pinned, readers = live_leases(store, now), pins(store), read_pins(store, now)
    aliases = sorted({parts[1] for info in store.list("aliases") if len(parts := info.key.split("/")) > 2})  # noqa: PLR2004  folder, alias, entry
    histories = {alias: entries[::-1] for alias in aliases if (entries := history(store, alias))}
    manifests, removed = {}, set()
    for info in store.list("generations"):
        match info.key.split("/"):
            case [_, generation, name] if GENERATION.fullmatch(generation) and name == _MANIFEST:
                manifests[generation] = info
            case [_, generation, name] if name == _REMOVED:
                removed.add(generation)
    return _Look(leases=leases, histories=histories, pins=pinned, readers=readers, manifests=manifests, removed=frozenset(removed))


def _read(store: Store, generation: str, info: ObjectInfo) -> Found:
    data = store.get(info.key)
    manifest = Manifest.from_json(data, where=store.uri(info.key))
    if manifest.generation != generation:
        raise ManifestError(f"{store.uri(info.key)}: holds the manifest of {manifest.generation}. Restore the right one from a copy.")
    written_at = max(manifest.created_at, info.modified or manifest.created_at)
    return Found(manifest=manifest, sha256=hashlib.sha256(data).hexdigest(), written_at=written_at)


def _roots(look: _Look, found: Mapping[str, Found], *, now: datetime, options: RetentionOptions) -> Roots:
    """Return what is needed, with reasons, or raise `ManifestError` where something needed cannot be read."""
    began = min((entry.acquired_at - CLOCK_SKEW for entry in look.leases.values()), default=now)
    cutoff = min(now - options.grace, began)
    reasons: dict[str, list[str]] = defaultdict(list)
    for generation, reason, sha256 in (*_by_alias(look, found, options.keep, began), *_by_hand(look, found)):
        if generation not in found:
            raise ManifestError(f"{generation} is {reason}, but has no manifest. Nothing is collected until it is restored, or unpinned.")
        if sha256 not in (None, found[generation].sha256):
            raise ManifestError(f"{generation} is {reason}, but its manifest was changed. Nothing is collected until it is restored.")
        reasons[generation].append(reason)
    named = {entry.generation for entries in look.histories.values() for entry in entries}
    for generation, one in found.items():
        if one.written_at > cutoff:
            reasons[generation].append("young")
            parent = one.manifest.parent
            if generation not in named and parent is not None and parent in found:
                reasons[parent].append(f"parent of the candidate {generation}")
    return Roots(
        heads={alias: entries[0].seq for alias, entries in look.histories.items()},
        reasons={generation: tuple(why) for generation, why in sorted(reasons.items())},
        busy=frozenset(entry.run_id for entry in look.leases.values()),
        cutoff=cutoff,
    )


def _by_alias(look: _Look, found: Mapping[str, Found], keep: int, began: datetime) -> Iterator[tuple[str, str, str | None]]:
    """Yield the generations that aliases need: the live one, those before it, and those that a running run may build on."""
    for alias, entries in look.histories.items():
        newest: dict[str, LogEntry] = {}
        for entry in entries:
            # What was collected earlier no longer counts among those to keep; the live one always does.
            if entry is entries[0] or entry.generation in found or entry.generation not in look.removed:
                newest.setdefault(entry.generation, entry)
        # An entry was live until the next newer one was made.
        ended = zip(entries, (None, *entries), strict=False)
        bases = {entry.generation for entry, newer in ended if look.leases and (newer is None or newer.at >= began)}
        for number, (generation, entry) in enumerate(newest.items()):
            if number == 0:
                yield generation, f"{'held' if entry.hold else 'live'} on `{alias}`", entry.manifest_sha256
            elif number < keep:
                yield generation, f"one of the last {keep} of `{alias}`", entry.manifest_sha256
            elif generation in bases:
                yield generation, f"live on `{alias}` since a run began that is still writing", entry.manifest_sha256


def _by_hand(look: _Look, found: Mapping[str, Found]) -> Iterator[tuple[str, str, str | None]]:
    for generation, one in look.pins.items():
        yield generation, f"pinned by {one.by}", None
    for generation in sorted(look.readers):
        # A reader that came after the collection finds nothing, and keeps nothing.
        if generation in found or generation not in look.removed:
            yield generation, "open in a reader", None


def _garbage(store: Store, kept: list[Manifest], roots: Roots, options: RetentionOptions) -> Iterator[ObjectInfo]:
    """Yield every object that nothing kept lists and that is older than any run that may still write."""
    needed = {item.key for manifest in kept for item in manifest.objects}
    needed |= {f"vectors/{manifest.run_id}/{_QUARANTINE}" for manifest in kept}
    whole = {("runs", run_of(manifest.run_id)) for manifest in kept} | {("generations", manifest.generation) for manifest in kept}
    whole |= {(folder, run) for folder in ("runs", "vectors") for run in roots.busy}
    for folder in ("generations", "runs", "segments", "vectors"):
        for info in store.list(folder):
            _, name, *rest = info.key.split("/")
            if info.key not in needed and (folder, run_of(name)) not in whole and rest != [_REMOVED] and _old(info, roots):
                yield info
    # Tables and towers go whole or not at all: their files are known to their engines only.
    tables = {manifest.table.uri for manifest in kept if manifest.table}
    towers = {manifest.tower for manifest in kept}
    for folder in ("tables", "towers") if options.towers else ("tables",):
        for name, group in groupby(store.list(folder), key=lambda info: info.key.split("/")[1]):
            used = any(f"{uri}/".startswith(f"tables/{name}/") for uri in tables) if folder == "tables" else _names_one(name, towers)
            members = [*group]
            if not used and not roots.busy and all(_old(info, roots) for info in members):
                yield from members


def _table_sweeps(kept: list[Manifest], dropped: list[Manifest], roots: Roots) -> Mapping[str, TableSweep]:
    tags: dict[str, dict[str, int]] = defaultdict(dict)
    for manifest in kept:
        if manifest.table:
            tags[manifest.table.uri][manifest.table.tag] = manifest.table.version
    gone = {uri: {manifest.table.tag for manifest in dropped if manifest.table and manifest.table.uri == uri} for uri in tags}
    return {
        uri: TableSweep(kept=tags[uri], dropped=tuple(sorted(gone[uri] - tags[uri].keys())), cutoff=roots.cutoff, strays=not roots.busy)
        for uri in sorted(tags)
    }


def _drop_manifests(store: Store, plan: GcPlan, clock: Clock) -> None:
    """Remove the manifests, and put them back where an alias, a pin or a reader has come for one in the meantime."""
    saved = {key: store.get(key) for key in map(_manifest_key, plan.drop)}
    for key in saved:
        store.delete(key)
    store.failpoint("gc.after_manifests")
    try:
        _check_unmoved(store, plan, now=clock())
    except CatalogEmbedError:
        for key, data in saved.items():
            with contextlib.suppress(AlreadyExists):
                store.put_if_absent(key, data)
        raise


def _check_unmoved(store: Store, plan: GcPlan, *, now: datetime) -> None:
    """Raise unless the store needs nothing that the plan removes."""
    look = _look(store, now)
    problems = [f"{generation} was written" for generation in sorted(look.manifests.keys() - plan.found.keys())]
    if not problems:
        roots = _roots(look, plan.found, now=now, options=plan.options)
        problems += [f"alias `{alias}` moved" for alias in sorted({alias for alias, _ in roots.heads.items() ^ plan.roots.heads.items()})]
        problems += [f"{name} is {'; '.join(roots.reasons[name])}" for name in plan.drop if name in roots.reasons]
        problems += [f"run {run} began to write" for run in sorted(roots.busy - plan.roots.busy)]
    if problems:
        raise PlanError(f"since this was planned, {', '.join(problems)}. Nothing that is needed went: run `catalog-embed gc` again.")


def _sizes(sizes: list[int]) -> str:
    return f"{counted(len(sizes), 'object')}, {byte_size(sum(sizes))}"


def _old(info: ObjectInfo, roots: Roots) -> bool:
    return info.modified is not None and info.modified < roots.cutoff


def _names_one(name: str, towers: set[str]) -> bool:
    """Say whether a folder is that of a tower in use, whichever of the two names is the shortened one."""
    return any(tower.startswith(name) or name.startswith(tower) for tower in towers)


def _manifest_key(generation: str) -> str:
    return f"generations/{check_generation(generation)}/{_MANIFEST}"


def _pin_key(generation: str) -> str:
    return f"pins/{check_generation(generation)}.json"


_PIN_PARSERS: Mapping[str, Parser[Any]] = {"generation": generation_id, "reason": text, "by": text, "at": moment}
