"""Leases: who writes, until when, with which fencing number; and which generations readers have open.

`leases/<name>/00000012.json` is created with put-if-absent, so of any number of racers one gets the number. The highest
entry rules, and only its owner ever rewrites it: whoever wakes up late finds a higher number and is told so.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

from pipelines.errors import AlreadyExists, CatalogEmbedError, InputError, LeaseHeld, ManifestError, NotFound, StoreError
from pipelines.manifest import FORMAT_VERSION, Parser, canonical, count, flag, moment, parse, text
from pipelines.storage import Store

Clock = Callable[[], datetime]

# How far the clocks of two machines may differ: nobody takes over before the end of a lease and this much more.
CLOCK_SKEW = timedelta(minutes=5)
MAX_LEASE_BYTES = 64 * 1024

# Leases under these names are of a space that is being written, and of a backfill that embeds ahead of it.
WRITING, BACKFILL = "tower-", "backfill-"

_KEPT_ENTRIES = 8
_TRY_EVERY_S, _TELL_EVERY_S = 2.0, 30.0
READERS = "readers"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_ENTRY_NAME = re.compile(r"([0-9]{8,18})\.json")


@dataclass(frozen=True, kw_only=True)
class LeaseEntry:
    """One holder of a lease. `machine` and `started` tell a live process from another one that got its number."""

    seq: int
    run_id: str
    nonce: str
    host: str
    machine: str
    pid: int
    started: int
    acquired_at: datetime
    until: datetime
    released: bool

    @property
    def holder(self) -> str:
        """Name the process that holds the lease."""
        return f"{self.host}:{self.pid}"

    def live(self, now: datetime, *, skew: timedelta = CLOCK_SKEW) -> bool:
        """Say whether the lease may still be held, whatever the clock of its holder shows."""
        return not self.released and now < self.until + skew

    def to_json(self) -> bytes:
        """Return the canonical bytes."""
        times = {"acquired_at": self.acquired_at.isoformat(), "until": self.until.isoformat()}
        return canonical({"format_version": FORMAT_VERSION, **asdict(self), **times})

    @classmethod
    def from_json(cls, data: bytes, *, where: str) -> LeaseEntry:
        """Read what `to_json` wrote, or raise `ManifestError` naming what is wrong."""
        return parse(data, where=where, limit_bytes=MAX_LEASE_BYTES, parsers=_PARSERS, build=cls)


_PARSERS: Mapping[str, Parser[Any]] = {
    "seq": count,
    "run_id": text,
    "nonce": text,
    "host": text,
    "machine": text,
    "pid": count,
    "started": count,
    "acquired_at": moment,
    "until": moment,
    "released": flag,
}


class Lease:
    """A lease that this process holds. `check` before anything that others will see; safe to share between threads."""

    def __init__(self, store: Store, name: str, entry: LeaseEntry, *, ttl: timedelta, clock: Clock) -> None:
        self._store, self._name, self._entry = store, name, entry
        self._ttl, self._clock = ttl, clock
        self._lock = threading.Lock()
        self._unrenewed: StoreError | None = None

    def __repr__(self) -> str:
        return f"Lease({self._name!r}, seq={self._entry.seq}, run_id={self._entry.run_id!r})"

    @property
    def name(self) -> str:
        """What is leased."""
        return self._name

    @property
    def entry(self) -> LeaseEntry:
        """The entry as last written; its `seq` is the fencing number."""
        return self._entry

    def renew(self) -> None:
        """Extend the lease by its time from now, or raise `LeaseHeld` where another run took over."""
        with self._lock:
            self._fenced()
            self._rewrite(until=aware(self._clock) + self._ttl)

    def check(self) -> None:
        """Raise `LeaseHeld` unless this run still holds the lease. A renewal that failed is tried again first."""
        with self._lock:
            self._fenced()
            now = aware(self._clock)
            if now >= self._entry.until:
                cause = f" The last renewal failed: {self._unrenewed}" if self._unrenewed else ""
                raise LeaseHeld(
                    f"lease `{self._name}` of run {self._entry.run_id} ended at {_shown(self._entry.until)}, and it is {_shown(now)}: "
                    f"this process was paused or cut off, and may not publish.{cause} Run again to resume."
                )
            if self._unrenewed:
                self._rewrite(until=now + self._ttl)

    def release(self) -> None:
        """Let the next run begin at once. A lease that was lost is left as it is."""
        with self._lock:
            if self._entry.released:
                return
            # Our own key: where another run has taken over, this changes a lower number that nobody asks for.
            self._rewrite(released=True)

    def beat(self, stop: threading.Event) -> None:
        """Renew three times in a lease's time until told to stop. What fails is for `check` to say."""
        while not stop.wait(self._ttl.total_seconds() / 3):
            try:
                self.renew()
            except StoreError as error:
                self._unrenewed = error
            except CatalogEmbedError:
                return  # lost for good: every `check` finds the higher number itself

    def _fenced(self) -> None:
        """Raise unless the highest entry is ours."""
        if self._entry.released:
            raise LeaseHeld(f"lease `{self._name}` was released by run {self._entry.run_id}. Acquire it again.")
        highest = _highest(self._store, self._name)
        if highest == self._entry.seq:
            return
        found = _read(self._store, self._name, highest) if highest > self._entry.seq else None
        winner = f"run {found.run_id} ({found.holder}) took over with number {found.seq}" if found else "its entry was removed"
        raise LeaseHeld(
            f"lease `{self._name}`: run {self._entry.run_id} held number {self._entry.seq}, but {winner}. "
            "This run may not publish: run again to plan from what is published now."
        )

    def _rewrite(self, **changes: Any) -> None:
        entry = replace(self._entry, **changes)
        self._store.put(_key(self._name, entry.seq), entry.to_json())
        self._entry, self._unrenewed = entry, None


def acquire(store: Store, name: str, *, run_id: str, ttl: timedelta, clock: Clock, skew: timedelta = CLOCK_SKEW) -> Lease:
    """Take the lease for `ttl`, or raise `LeaseHeld` naming who has it and what to do.

    Free is what was released, what ended longer than `skew` ago, and what a dead process of this very machine held.
    """
    if ttl <= timedelta(0):
        raise InputError(f"a lease lasts longer than nothing, not {ttl}. Fifteen minutes is a good time.")
    highest = _highest(store, name)
    if highest:
        head = _read(store, name, highest)
        if head is not None and head.live(aware(clock), skew=skew) and not _dead_here(head):
            raise _held(name, head, skew)
    entry = _entry(run_id, seq=highest + 1, at=aware(clock), ttl=ttl)
    _create(store, name, entry, skew)
    lease = Lease(store, name, entry, ttl=ttl, clock=clock)
    try:
        store.failpoint("lease.after_create")
        # Where this process slept between looking and creating, older entries may be pruned and the number stale.
        lease.check()
    except StoreError:
        with contextlib.suppress(StoreError):  # nobody will hold what could not be checked
            lease.release()
        raise
    _prune(store, name, below=entry.seq - _KEPT_ENTRIES)
    return lease


@contextlib.contextmanager
def held(
    store: Store,
    name: str,
    *,
    run_id: str,
    ttl: timedelta,
    clock: Clock,
    skew: timedelta = CLOCK_SKEW,
    wait: timedelta = timedelta(0),
    tell: Callable[[str], object] = str,
) -> Iterator[Lease]:
    """Hold the lease for a block of code: acquired, renewed by a thread, released. `wait` is the patience with another holder."""
    lease = _patiently(partial(acquire, store, name, run_id=run_id, ttl=ttl, clock=clock, skew=skew), wait, tell)
    stop = threading.Event()
    thread = threading.Thread(target=lease.beat, args=(stop,), name=f"lease-{name}", daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        stop.set()
        thread.join()
        # What cannot be released ends by itself, and must not hide how the block ended.
        with contextlib.suppress(StoreError):
            lease.release()


def _patiently(take: Callable[[], Lease], wait: timedelta, tell: Callable[[str], object]) -> Lease:
    """Take a lease; while another run has it try again, say so every half minute, and give up after `wait`."""
    began, told = time.monotonic(), -_TELL_EVERY_S
    while True:
        try:
            return take()
        except LeaseHeld as error:
            waited = time.monotonic() - began
            if waited >= wait.total_seconds():
                raise
            if waited - told >= _TELL_EVERY_S:
                told = waited
                tell(str(error))
            time.sleep(min(_TRY_EVERY_S, wait.total_seconds() - waited))


def break_lease(store: Store, name: str, *, run_id: str, clock: Clock) -> LeaseEntry | None:
    """Take the lease from whoever has it and leave it free. Return the entry that was overruled, None where it was free.

    The holder notices at its next `check`. Nothing it wrote is lost, and it cannot publish.
    """
    highest = _highest(store, name)
    head = _read(store, name, highest, damaged_ok=True) if highest else None
    if not highest or (head is not None and head.released):
        return None
    entry = _entry(run_id, seq=highest + 1, at=aware(clock), ttl=timedelta(0))
    _create(store, name, replace(entry, released=True), timedelta(0))
    return head or entry


def live_leases(store: Store, now: datetime, *, skew: timedelta = CLOCK_SKEW) -> Mapping[str, LeaseEntry]:
    """Return who may be writing now, by name of the lease."""
    names = {info.key.split("/")[1] for info in store.list("leases")} - {READERS}
    heads = {name: _read(store, name, highest) for name in sorted(names) if _NAME.fullmatch(name) and (highest := _highest(store, name))}
    return {name: head for name, head in heads.items() if head is not None and head.live(now, skew=skew) and not _dead_here(head)}


def _create(store: Store, name: str, entry: LeaseEntry, skew: timedelta) -> None:
    """Create an entry, and find out whose it is when the answer is a conflict or no answer at all."""
    try:
        store.put_if_absent(_key(name, entry.seq), entry.to_json())
    except StoreError as error:
        found = _read(store, name, entry.seq)
        if found is None and not isinstance(error, AlreadyExists):
            raise
        if found is None or found.nonce != entry.nonce:
            raise _held(name, found or entry, skew) from error


def _held(name: str, head: LeaseEntry, skew: timedelta) -> LeaseHeld:
    ends = head.until + skew
    command = "backfill" if name.startswith(BACKFILL) else "run"
    return LeaseHeld(
        f"lease `{name}` is held by run {head.run_id} ({head.holder}) since {_shown(head.acquired_at)}. Wait for that run to finish; "
        f"if it is dead, the lease expires at {_shown(ends)}, or end it now with `catalog-embed {command} --break-lease`."
    )


def _entry(run_id: str, *, seq: int, at: datetime, ttl: timedelta) -> LeaseEntry:
    return LeaseEntry(
        seq=seq,
        run_id=run_id,
        nonce=secrets.token_hex(16),
        host=socket.gethostname(),
        machine=_machine(),
        pid=os.getpid(),
        started=_started(os.getpid()) or 0,
        acquired_at=at,
        until=at + ttl,
        released=False,
    )


def _prune(store: Store, name: str, *, below: int) -> None:
    """Remove entries that nobody can mistake for the highest. A writer without delete rights leaves them."""
    folder = _folder(name)
    with contextlib.suppress(StoreError):
        for info in store.list(folder):
            match = _ENTRY_NAME.fullmatch(info.key.removeprefix(f"{folder}/"))
            if match and int(match[1]) <= below:
                store.delete(info.key)


def _highest(store: Store, name: str) -> int:
    folder = _folder(name)
    names = (info.key.removeprefix(f"{folder}/") for info in store.list(folder))
    return max((int(match[1]) for name in names if (match := _ENTRY_NAME.fullmatch(name))), default=0)


def _read(store: Store, name: str, seq: int, *, damaged_ok: bool = False) -> LeaseEntry | None:
    """Return an entry, or None when it has been pruned (or, where that is fine, when it is damaged)."""
    key = _key(name, seq)
    try:
        return LeaseEntry.from_json(store.get(key), where=store.uri(key))
    except NotFound:
        return None
    except ManifestError as error:
        if damaged_ok:
            return None
        raise ManifestError(f"{error} If no run is writing, overrule the entry with `catalog-embed run --break-lease`.") from error


def _dead_here(head: LeaseEntry) -> bool:
    """Say whether the holder was a process of this machine that runs no more. Of other machines nothing is known."""
    if not head.machine or head.machine != _machine() or not head.started:
        return False
    return _started(head.pid) not in (0, head.started)


def _machine() -> str:
    """Return a name of this boot and this process namespace, where process numbers mean the same; empty where unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        namespace = Path("/proc/self/ns/pid").readlink()
    except OSError:
        return ""
    return hashlib.sha256(f"{socket.gethostname()}\n{boot}\n{namespace}".encode()).hexdigest()[:32]


def _started(pid: int) -> int | None:
    """Return when a process started, in ticks since boot; None when it is gone or only waits to be reaped, 0 when that is hidden."""
    try:
        # The name, in parentheses, may hold spaces and parentheses of its own.
        state, *fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except (OSError, OverflowError):
            return 0
        return 0
    return None if state in ("Z", "X") else int(fields[18])


def aware(clock: Clock) -> datetime:
    """Return the time that a clock shows, in UTC."""
    at = clock()
    if at.tzinfo is None:
        raise InputError(f"the clock gave {at} without a time zone. Pass one that does, such as `lambda: datetime.now(UTC)`.")
    return at.astimezone(UTC)


def _shown(at: datetime) -> str:
    return at.isoformat(timespec="seconds")


def _folder(name: str) -> str:
    if not _NAME.fullmatch(name) or name == READERS:
        raise InputError(f"{name[:80]!r} is no name of a lease. Use lower-case letters, digits and . _ -, at most 63, and not `{READERS}`.")
    return f"leases/{name}"


def _key(name: str, seq: int) -> str:
    return f"{_folder(name)}/{seq:08d}.json"
