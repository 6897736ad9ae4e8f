"""The publish log: generations written whole, and aliases that move from one to another in a single put-if-absent.

The live generation of an alias is named by its highest log entry. Publish and rollback both create the next entry, so of
two racing runs one loses, history stays linear, and there is no pointer that could be torn or overwritten.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from pipelines.contracts import ObjectRef
from pipelines.errors import AlreadyExists, CorruptObject, InputError, ManifestError, NotFound, StoreError
from pipelines.manifest import (
    FORMAT_VERSION,
    GENERATION,
    Manifest,
    ManifestObject,
    Parser,
    canonical,
    check_generation,
    count,
    flag,
    generation_id,
    matching,
    moment,
    next_generation_id,
    parse,
    sha256_hex,
    text,
)
from pipelines.storage import Store

Action = Literal["publish", "rollback"]
Verify = Literal["size", "full"]
Clock = Callable[[], datetime]

MAX_ENTRY_BYTES = 64 * 1024
# How far the clocks of two machines may differ when a run looks for its own earlier entry.
_CLOCK_MARGIN = timedelta(days=1)

_ALIAS = re.compile(r"[a-z][a-z0-9_-]{0,62}")
_ENTRY_NAME = re.compile(r"([0-9]{8,18})\.json")


@dataclass(frozen=True, kw_only=True)
class LogEntry:
    """One move of an alias. `hold` freezes the alias for publishing; `run_id` and `nonce` tell whose attempt this was."""

    seq: int
    parent_seq: int
    generation: str
    manifest_sha256: str
    action: Action
    run_id: str
    nonce: str
    reason: str
    hold: bool
    at: datetime

    def to_json(self) -> bytes:
        """Return the canonical bytes."""
        return canonical({"format_version": FORMAT_VERSION, **asdict(self), "at": self.at.isoformat()})

    @classmethod
    def from_json(cls, data: bytes, *, where: str = "log entry") -> LogEntry:
        """Read what `to_json` wrote, or raise `ManifestError` naming what is wrong."""
        entry = parse(data, where=where, limit_bytes=MAX_ENTRY_BYTES, parsers=_PARSERS, build=cls)
        if entry.parent_seq != entry.seq - 1:
            raise ManifestError(f"{where}: entry {entry.seq} follows {entry.parent_seq}. The file is damaged or was edited.")
        return entry


_PARSERS: Mapping[str, Parser[Any]] = {
    "seq": count,
    "parent_seq": count,
    "generation": generation_id,
    "manifest_sha256": sha256_hex,
    "action": matching(re.compile("publish|rollback"), "publish or rollback"),
    "run_id": text,
    "nonce": text,
    "reason": text,
    "hold": flag,
    "at": moment,
}


def history(store: Store, alias: str) -> tuple[LogEntry, ...]:
    """Return every entry, oldest first; a gap or an unreadable entry is an error."""
    return tuple(_newest_first(store, alias, current(store, alias)))[::-1]


def current(store: Store, alias: str) -> LogEntry | None:
    """Return the entry that names the live generation, or None before the first publish."""
    folder = _folder(alias)
    names = (info.key.removeprefix(f"{folder}/") for info in store.list(folder))
    highest = max((int(match[1]) for name in names if (match := _ENTRY_NAME.fullmatch(name))), default=0)
    return _read_entry(store, alias, highest) if highest else None


def open_manifest(store: Store, entry: LogEntry) -> Manifest:
    """Return the manifest that an entry names, after checking that it is the very one that was published."""
    return _read_manifest(store, entry.generation, expected_sha256=entry.manifest_sha256)[0]


def read_manifest(store: Store, generation: str) -> Manifest:
    """Return the manifest of a generation that was written whole, published or not."""
    return _read_manifest(store, generation)[0]


def next_generation(store: Store) -> str:
    """Return an id that no attempt has used. Two runs may get the same one; `write_generation` lets one of them keep it."""
    folders = {info.key.split("/")[1] for info in store.list("generations")}
    return next_generation_id(name for name in folders if GENERATION.fullmatch(name))


def write_generation(store: Store, manifest: Manifest, attachments: Mapping[str, bytes]) -> Manifest:
    """Write a generation's folder, manifest last, and return the manifest with its attachments listed.

    Finding its own bytes already there is success, so a re-run finishes what a dead attempt began. Finding others is
    `AlreadyExists`: another attempt owns the id, take the next one.
    """
    folder = f"generations/{check_generation(manifest.generation)}"
    if "manifest.json" in attachments:
        raise InputError(f"{manifest.generation}: `manifest.json` is the manifest's own name. Rename the attachment.")
    listed = [ManifestObject.of(_ref(f"{folder}/{name}", content), role="attachment") for name, content in sorted(attachments.items())]
    whole = replace(manifest, attachments=(*manifest.attachments, *listed))
    data = whole.to_json()
    Manifest.from_json(data, where=manifest.generation)  # what cannot be read back must not be written
    if (finished := _finished(store, whole)) is not None:
        return finished
    for name, content in sorted(attachments.items()):
        _put_same(store, f"{folder}/{name}", content)
    store.failpoint("generation.before_manifest")
    _put_same(store, f"{folder}/manifest.json", data)
    store.failpoint("generation.after_manifest")
    return whole


def publish(
    store: Store,
    *,
    alias: str,
    generation: str,
    expected_seq: int,
    run_id: str,
    clock: Clock,
    reason: str = "",
    verify: Verify = "size",
    release_hold: bool = False,
) -> LogEntry:
    """Make a written generation live by creating entry `expected_seq` + 1, and return that entry.

    `expected_seq` is the entry the run started from (0: none); if the alias has moved since, `AlreadyExists`. A re-run
    with the same `run_id` returns the entry of its first attempt, even one whose answer was lost.
    """
    manifest, sha256 = _read_manifest(store, generation)
    head = current(store, alias)
    own = _own_entry(store, alias, head, run_id=run_id, action="publish", since=manifest.created_at - _CLOCK_MARGIN)
    if own is not None and own.generation == generation:
        return _durable(store, alias, own)
    if head is not None and head.hold and not release_hold:
        held = f"alias `{alias}` is held on {head.generation} since entry {head.seq} ({head.reason or 'no reason given'})"
        raise InputError(f"{held}. {generation} stays unpublished; publish it with the hold released when the cause is gone.")
    if manifest.failed_gates:
        raise ManifestError(f"{generation}: gates failed ({', '.join(manifest.failed_gates)}). Not published; see its report.")
    _check_objects(store, manifest, verify=verify)
    entry = _entry(manifest, sha256, seq=expected_seq + 1, action="publish", run_id=run_id, reason=reason, at=_now(clock))
    return _append(store, alias, entry, head=head)


def rollback(
    store: Store,
    *,
    alias: str,
    run_id: str,
    reason: str,
    clock: Clock,
    to: str | None = None,
    hold: bool = False,
    verify: Verify = "size",
    check: Callable[[Manifest], object] | None = None,
) -> LogEntry:
    """Make an older generation live again (`to`, or the one before the current one), and return the new entry.

    Only a generation that this alias has named before, and whose objects are intact, qualifies; `check` raises for one that
    the readers of this store could not open. A held alias stays held.
    """
    head = current(store, alias)
    if head is None:
        raise NotFound(f"alias `{alias}` has no entries, so there is nothing to roll back to. Publish first.")
    at = _now(clock)
    own = _own_entry(store, alias, head, run_id=run_id, action="rollback", since=at - _CLOCK_MARGIN)
    if own is not None and to in (None, own.generation):
        return _durable(store, alias, own)
    target = _target(store, alias, head, to=to)
    manifest = open_manifest(store, target)
    _check_objects(store, manifest, verify=verify)
    if check is not None:
        check(manifest)
    entry = _entry(manifest, target.manifest_sha256, seq=head.seq + 1, action="rollback", run_id=run_id, reason=reason, at=at)
    return _append(store, alias, replace(entry, hold=hold or head.hold), head=head)


def _target(store: Store, alias: str, head: LogEntry, *, to: str | None) -> LogEntry:
    """Return the entry that last named the generation to go back to."""
    entries = _newest_first(store, alias, head)
    if to is not None:
        check_generation(to)
        found = next((entry for entry in entries if entry.generation == to), None)
        if found is None:
            raise NotFound(f"alias `{alias}` never named {to}. `catalog-embed generations` lists those it did.")
        return found
    # Not simply the entry before: after a rollback that is the generation just left, and two rollbacks would cancel out.
    for entry in entries:
        if entry.generation == head.generation and entry.action == "publish":
            break
    older = next((entry for entry in entries if entry.generation != head.generation), None)
    if older is None:
        raise NotFound(f"alias `{alias}`: no generation was live before {head.generation}. Name one with `--to`.")
    return older


def _append(store: Store, alias: str, entry: LogEntry, *, head: LogEntry | None) -> LogEntry:
    """Create the entry, and find out whose it is when the answer is a conflict or no answer at all."""
    highest = head.seq if head else 0
    if highest >= entry.seq:
        raise _lost(alias, entry, _read_entry(store, alias, entry.seq))
    if highest < entry.parent_seq:
        raise StoreError(f"alias `{alias}` ends at entry {highest}, but the run started from {entry.parent_seq}. Run `doctor`.")
    data = entry.to_json()
    LogEntry.from_json(data, where=f"alias `{alias}`, new entry {entry.seq}")  # what cannot be read back must not be written
    store.failpoint(f"{entry.action}.before_alias")
    try:
        store.put_if_absent(_entry_key(alias, entry.seq), data)
    except StoreError as error:
        try:
            found = _read_entry(store, alias, entry.seq)
        except NotFound:
            raise error from None
        if (found.run_id, found.nonce) != (entry.run_id, entry.nonce):
            raise _lost(alias, entry, found) from error
        _durable(store, alias, found)
    store.failpoint(f"{entry.action}.after_alias")
    return entry


def _lost(alias: str, entry: LogEntry, winner: LogEntry) -> AlreadyExists:
    won = f"entry {winner.seq} was created by run {winner.run_id} for {winner.generation} at {winner.at.isoformat()}"
    lost = f"The {entry.action} of {entry.generation} started from entry {entry.parent_seq} and did not happen"
    return AlreadyExists(f"alias `{alias}`: {won}. {lost}: plan again from the new entry.")


def _own_entry(store: Store, alias: str, head: LogEntry | None, *, run_id: str, action: Action, since: datetime) -> LogEntry | None:
    """Return the newest entry that this run created earlier. No entry older than `since` can be its own, so few are read."""
    for entry in _newest_first(store, alias, head):
        if entry.at < since:
            return None
        if (entry.run_id, entry.action) == (run_id, action):
            return entry
    return None


def _check_objects(store: Store, manifest: Manifest, *, verify: Verify) -> None:
    """Raise unless every object is there as recorded; report all that are missing or cut, not the first."""
    sizes = store.sizes(item.key for item in manifest.objects)
    problems = [
        f"{item.key} is missing" if item.key not in sizes else f"{item.key} has {sizes[item.key]} bytes instead of {item.size}"
        for item in manifest.objects
        if sizes.get(item.key) != item.size
    ]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")  # noqa: PLR2004 - five fit a terminal
        raise CorruptObject(f"{manifest.generation} is damaged: {shown}. Build it again, or choose another generation.")
    if verify == "full":
        for item in manifest.objects:
            store.verify(item)
    store.sync([*(item.key for item in manifest.objects), _manifest_key(manifest.generation)])


def _entry(manifest: Manifest, sha256: str, *, seq: int, action: Action, run_id: str, reason: str, at: datetime) -> LogEntry:
    return LogEntry(
        seq=seq,
        parent_seq=seq - 1,
        generation=manifest.generation,
        manifest_sha256=sha256,
        action=action,
        run_id=run_id,
        nonce=secrets.token_hex(16),
        reason=reason,
        hold=False,
        at=at,
    )


def _now(clock: Clock) -> datetime:
    at = clock()
    if at.tzinfo is None:
        raise InputError(f"the clock gave {at} without a time zone. Pass one that does, such as `lambda: datetime.now(UTC)`.")
    return at.astimezone(UTC)


def _read_manifest(store: Store, generation: str, *, expected_sha256: str | None = None) -> tuple[Manifest, str]:
    key = _manifest_key(generation)
    try:
        data = store.get(key)
    except NotFound as error:
        raise NotFound(
            f"{generation} has no manifest ({store.uri(key)}): it was never finished, or was removed. Choose another one."
        ) from error
    sha256 = hashlib.sha256(data).hexdigest()
    if expected_sha256 not in (None, sha256):
        advice = "It was changed after it was published: run `catalog-embed rollback`, or restore it from a copy."
        raise CorruptObject(f"{store.uri(key)}: expected sha256 {expected_sha256}, found {sha256}. {advice}")
    manifest = Manifest.from_json(data, where=store.uri(key))
    if manifest.generation != generation:
        raise ManifestError(f"{store.uri(key)}: holds the manifest of {manifest.generation}. Restore the right one from a copy.")
    return manifest, sha256


def _finished(store: Store, manifest: Manifest) -> Manifest | None:
    """Return the manifest that an earlier attempt of the same run completed, if its content is the same."""
    key = _manifest_key(manifest.generation)
    if store.head(key) is None:
        return None
    found, _ = _read_manifest(store, manifest.generation)
    if (found.run_id, found.content_digest) == (manifest.run_id, manifest.content_digest):
        return found
    raise AlreadyExists(f"{manifest.generation} was already written by run {found.run_id}. Take the next generation id.")


def _put_same(store: Store, key: str, data: bytes) -> None:
    """Write an object once; one with the same bytes is as good as ours."""
    try:
        store.put_if_absent(key, data)
    except StoreError as error:
        try:
            store.read_verified(_ref(key, data))
        except NotFound:
            raise error from None
        except CorruptObject:
            raise AlreadyExists(f"{store.uri(key)} holds another attempt's bytes. Take the next generation id.") from error


def _newest_first(store: Store, alias: str, head: LogEntry | None) -> Iterator[LogEntry]:
    """Yield `head` and the entries before it, one read each, so that a caller pays for what it looks at."""
    if head is not None:
        yield head
        for seq in range(head.parent_seq, 0, -1):
            yield _read_entry(store, alias, seq)


def _read_entry(store: Store, alias: str, seq: int) -> LogEntry:
    key = _entry_key(alias, seq)
    try:
        data = store.get(key)
    except NotFound as error:
        raise NotFound(
            f"alias `{alias}`: entry {seq} is missing ({store.uri(key)}). Restore it from a copy; entries are never removed."
        ) from error
    entry = LogEntry.from_json(data, where=store.uri(key))
    if entry.seq != seq:
        raise ManifestError(f"{store.uri(key)}: holds entry {entry.seq}. Restore the right one from a copy.")
    return entry


def _durable(store: Store, alias: str, entry: LogEntry) -> LogEntry:
    """Return an entry found rather than written; the attempt that wrote it may have died before its fsync."""
    store.sync([_entry_key(alias, entry.seq)])
    return entry


def _folder(alias: str) -> str:
    if not _ALIAS.fullmatch(alias):
        raise InputError(f"{alias[:80]!r} is no alias name. Use lower-case letters, digits, _ and -, beginning with a letter, at most 63.")
    return f"aliases/{alias}"


def _entry_key(alias: str, seq: int) -> str:
    return f"{_folder(alias)}/{seq:08d}.json"


def _manifest_key(generation: str) -> str:
    return f"generations/{check_generation(generation)}/manifest.json"


def _ref(key: str, data: bytes) -> ObjectRef:
    return ObjectRef(key=key, size=len(data), sha256=hashlib.sha256(data).hexdigest())
