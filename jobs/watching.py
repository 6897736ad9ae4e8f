"""Runs as another terminal sees them: how far each one is, as it writes into the store itself, and a person's pause of one.

`runs/<run>/progress.json` is replaced every few seconds while a run works. Nothing depends on it: a run that cannot write it
goes on.
"""

from __future__ import annotations

import getpass
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pipelines.errors import CatalogEmbedError, InputError
from pipelines.layout import duration, printable
from pipelines.leases import BACKFILL, WRITING, live_leases
from pipelines.manifest import FORMAT_VERSION, canonical
from pipelines.storage import Store
from pipelines.telemetry import Event, Progress
from pipelines.turns import pause, paused, resume

# A put to a bucket takes some 50 ms; nobody looks more often.
WRITE_EVERY_S = 5.0
# Stages follow each other within milliseconds in a quiet night.
_STAGE_S = 1.0
_MAX_BYTES = 64 * 1024


class Beacon:
    """A listener that writes how far its run is into the store."""

    def __init__(self, root: str, options: Mapping[str, str], *, run_id: str, command: str) -> None:
        # A store of its own: the fail points of a test count what the run itself writes.
        self._store, self._key = Store.open(root, options=options), f"runs/{run_id}/progress.json"
        self._said: dict[str, Any] = {"command": command}
        self._written_s = -WRITE_EVERY_S

    def on_event(self, event: Event) -> None:
        """Note why the run waits."""
        if event.name in ("embed.waits", "lease.waits"):
            self._say(waits=str(event.fields["why"]), least_s=0.0)
        elif event.name == "capacity.waiting":
            self._say(waits=f"for a node with {event.fields['wanted']}; there is {event.fields['there']}", least_s=0.0)

    def on_progress(self, progress: Progress) -> None:
        """Note how far a stage is; where it moves, nobody waits."""
        done = {"stage": progress.stage, "unit": progress.unit, "rows": progress.rows, "total": progress.total}
        self._say(
            **done,
            rows_per_s=progress.rows_per_s,
            eta_s=progress.eta_s,
            waits="",
            least_s=_STAGE_S if progress.state == "began" else WRITE_EVERY_S,
        )

    def _say(self, *, least_s: float, **said: Any) -> None:
        self._said |= said
        if time.monotonic() - self._written_s >= least_s:
            self._written_s = time.monotonic()
            at = datetime.now(tz=UTC).isoformat(timespec="seconds")
            # A store that fails here fails the run where it matters; this is only for those who look.
            with suppress(CatalogEmbedError):
                self._store.put(self._key, canonical({"format_version": FORMAT_VERSION, "at": at, **self._said}))


@dataclass(frozen=True, kw_only=True)
class Working:
    """A run that holds a lease now, and what it said last. `kind` is `write` for one that may publish, `backfill` for one that embeds ahead."""

    run_id: str
    kind: str
    holder: str
    command: str = ""
    stage: str = ""
    unit: str = "row"
    rows: int = 0
    total: int | None = None
    rows_per_s: float | None = None
    eta_s: float | None = None
    waits: str = ""
    at: str = ""

    def shown(self) -> str:
        """Say it in one line."""
        amount = f"{self.rows:,}" + (f"/{self.total:,}" if self.total else "")
        share = f"  {min(self.rows / self.total, 1.0):.0%}" if self.total else ""
        rate = f"  {self.rows_per_s:,.0f} {self.unit}s/s" if self.rows_per_s else ""
        left = f"  ETA {duration(self.eta_s)}" if self.eta_s is not None else ""
        did = f"{self.stage}  {amount} {self.unit}s{share}{rate}{left}" if self.stage else "began"
        return printable(f"{self.run_id}  {self.command or self.kind}  {'WAITS: ' + self.waits if self.waits else did}")


def working(store: Store, now: datetime) -> tuple[Working, ...]:
    """Return who works now, each run once, oldest first."""
    found: dict[str, Working] = {}
    for name, lease in sorted(live_leases(store, now).items()):
        kind = "backfill" if name.startswith(BACKFILL) else "write" if name.startswith(WRITING) else ""
        if kind and not (lease.run_id in found and found[lease.run_id].kind == "backfill"):
            found[lease.run_id] = Working(run_id=lease.run_id, kind=kind, holder=lease.holder, **_said(store, lease.run_id))
    return tuple(found[run_id] for run_id in sorted(found))


def follow(store: Store, *, every_s: float) -> Iterator[Working]:
    """Yield what changed of the runs that work, until none does."""
    last: dict[str, Working] = {}
    while found := {item.run_id: item for item in working(store, datetime.now(tz=UTC))}:
        yield from (item for run_id, item in found.items() if last.get(run_id) != item)
        last = found
        time.sleep(every_s)


def pause_backfill(store: Store, run_id: str | None, *, reason: str) -> str:
    """Let the backfill that works now stop embedding until it is resumed; return its id."""
    one = _the_one(
        run_id,
        [item.run_id for item in working(store, datetime.now(tz=UTC)) if item.kind == "backfill"],
        "backfill works now",
        "backfills work now",
    )
    pause(store, one, by=_person(), reason=reason, at=datetime.now(tz=UTC))
    return one


def resume_backfill(store: Store, run_id: str | None) -> str:
    """Let a paused backfill go on; return its id."""
    waiting = [item.run_id for item in working(store, datetime.now(tz=UTC)) if paused(store, item.run_id) is not None]
    one = _the_one(run_id, waiting, "backfill is paused", "backfills are paused")
    resume(store, one)
    return one


def _the_one(given: str | None, found: list[str], one: str, many: str) -> str:
    if given is not None and given in found:
        return given
    if given is None and len(found) == 1:
        return found[0]
    shown = ", ".join(found) or "none"
    named = f"{given[:60]!r} is not among them" if given is not None else "name one" if found else "so there is nothing to do"
    raise InputError(
        f"{len(found)} {one if len(found) == 1 else many} ({shown}); {named}. Only backfills are paused; a run that publishes is ended with Ctrl-C, and started again."
    )


def _person() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user has no name
        return "somebody"


def _said(store: Store, run_id: str) -> Mapping[str, Any]:
    """Return what a run said of itself; nothing where it said nothing that can be read."""
    try:
        data = store.get(f"runs/{run_id}/progress.json")
        tree = json.loads(data[:_MAX_BYTES])
    except (CatalogEmbedError, ValueError):
        return {}
    return dict(_typed(tree)) if isinstance(tree, dict) else {}


def _typed(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name in ("command", "stage", "unit", "waits", "at"):
        if isinstance(tree.get(name), str):
            yield name, tree[name][:300]
    for name in ("rows", "total", "rows_per_s", "eta_s"):
        if isinstance(tree.get(name), int | float) and not isinstance(tree[name], bool):
            yield name, tree[name]
