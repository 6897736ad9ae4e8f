"""Whose turn it is: a backfill embeds while nobody with more right to the machines works, and while no person paused it.

A nightly run holds the lease of its table; a backfill, while it embeds, only one of its own. What it asks before every
part is the store, so the rule holds between terminals, clusters and schedulers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pipelines.errors import NotFound
from pipelines.leases import WRITING, live_leases
from pipelines.manifest import FORMAT_VERSION, canonical, moment, parse, text
from pipelines.storage import Store

LOOK_EVERY_S, TELL_EVERY_S = 2.0, 30.0

_MAX_BYTES = 64 * 1024
_PARSERS = {"by": text, "reason": text, "at": moment}


@dataclass(frozen=True, kw_only=True)
class Turn:
    """The turn of one run. Picklable: readers ask it before every part."""

    store: Store
    run_id: str

    def hindered(self) -> str | None:
        """Say who goes first, or None where this run may go on."""
        if (why := paused(self.store, self.run_id)) is not None:
            return why
        for name, lease in sorted(live_leases(self.store, datetime.now(tz=UTC)).items()):
            if name.startswith(WRITING) and lease.run_id != self.run_id:
                return f"run {lease.run_id} ({lease.holder}) is writing and goes first"
        return None

    def wait(self, tell: Callable[[str], object]) -> None:
        """Come back when this run may go on; say every half minute why it does not."""
        told = -TELL_EVERY_S
        while (why := self.hindered()) is not None:
            if time.monotonic() - told >= TELL_EVERY_S:
                told = time.monotonic()
                tell(why)
            time.sleep(LOOK_EVERY_S)


def pause(store: Store, run_id: str, *, by: str, reason: str, at: datetime) -> None:
    """Ask a run to stop embedding until it is resumed; what it has begun it finishes."""
    store.put(_key(run_id), canonical({"format_version": FORMAT_VERSION, "by": by, "reason": reason, "at": at.isoformat()}))


def resume(store: Store, run_id: str) -> bool:
    """Let a paused run go on; say whether it was paused."""
    was = paused(store, run_id) is not None
    store.delete(_key(run_id))
    return was


def paused(store: Store, run_id: str) -> str | None:
    """Say who paused a run and why, None where nobody did."""
    try:
        data = store.get(_key(run_id))
    except NotFound:
        return None
    said = parse(data, where=store.uri(_key(run_id)), limit_bytes=_MAX_BYTES, parsers=_PARSERS, build=dict[str, Any])
    reason = f": {said['reason']}" if said["reason"] else ""
    return f"paused by {said['by']} at {said['at']:%Y-%m-%d %H:%M} UTC{reason}. `catalog-embed resume {run_id}` lets it go on"


def _key(run_id: str) -> str:
    return f"runs/{run_id}/pause.json"
