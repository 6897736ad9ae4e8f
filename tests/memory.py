"""Memory of a process, from its own counters: `ru_maxrss` also remembers the parent that forked it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def peak_mb() -> int:
    """Return this process's peak resident memory in MiB, shared memory included (Linux)."""
    return _status_kb("VmHWM") // 1024


@contextmanager
def watched() -> Iterator[list[int]]:
    """Watch the process's own (anonymous) memory, in MiB; the list holds the peak when the block has ended."""
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], _status_kb("RssAnon") // 1024)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def _status_kb(name: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split(f"{name}:")[1].split()[0])
