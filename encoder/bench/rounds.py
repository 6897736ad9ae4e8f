"""Rounds in which all take turns, so that a slow minute of the machine falls on everyone: wall and CPU time, and memory."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from encoder.bench.limits import synchronise

_STATM = Path("/proc/self/statm")
_SAMPLE_S = 0.02


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """Who runs, how many tokens and texts one run is, whether it runs in this process, and its own clock where it has one."""

    run: Callable[[], object]
    texts: int
    tokens: int
    here: bool = True
    own_clock: Callable[[], float] | None = None


@dataclass(frozen=True, kw_only=True)
class Lap:
    """One run: seconds on the clock and of the CPU, and how many bytes memory grew at most. None: cannot be known."""

    round: int
    wall_s: float
    cpu_s: float | None
    grown_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """The laps of each entrant that finished all rounds, and why others did not."""

    laps: dict[str, list[Lap]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def alternate(entrants: Mapping[str, Entrant], *, rounds: int, threads: int, device: torch.device, say: Callable[[str], None]) -> Rounds:
    """Run everyone once a round, each round begun by the next. Whoever fails is left out from there on."""
    result = Rounds(laps={name: [] for name in entrants})
    for number in range(rounds):
        for name in rotated(list(entrants), number):
            if name in result.failures:
                continue
            torch.set_num_threads(threads)
            try:
                lap = measure(entrants[name], number=number, device=device)
            except Exception as error:  # noqa: BLE001 - whatever a rival's library raises, the others go on
                result.failures[name] = reason(error)
                del result.laps[name]
                say(f"  round {number + 1}  {name}: failed, {result.failures[name]}")
                continue
            result.laps[name].append(lap)
            say(f"  round {number + 1}  {name}: {lap.wall_s:.2f} s, {entrants[name].tokens / lap.wall_s:,.0f} tokens/s")
    return result


def rotated(names: Sequence[str], by: int) -> list[str]:
    """Return the names with the first ones moved to the end."""
    turn = by % max(1, len(names))
    return [*names[turn:], *names[:turn]]


def measure(entrant: Entrant, *, number: int, device: torch.device) -> Lap:
    """Run once, and return what it took."""
    synchronise(device)
    with PeakMemory(device) as memory:
        cpu, wall = time.process_time(), time.perf_counter()
        entrant.run()
        synchronise(device)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    wall = entrant.own_clock() if entrant.own_clock else wall
    return Lap(round=number, wall_s=wall, cpu_s=cpu if entrant.here else None, grown_bytes=memory.grown if entrant.here else None)


def reason(error: BaseException) -> str:
    """Return an error as one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


class PeakMemory:
    """How far memory grows inside the block: of the device on CUDA, of this process elsewhere, read fifty times a second.

    What the allocator kept from earlier runs does not count as growth: on a CPU a small number is a lower bound.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._done = threading.Event()
        self._sampler: threading.Thread | None = None
        self._before = self._most = 0
        self.grown: int | None = None

    def __enter__(self) -> Self:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        elif _STATM.exists():
            self._before = self._most = _resident()
            self._sampler = threading.Thread(target=self._sample, daemon=True)
            self._sampler.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._device.type == "cuda":
            self.grown = torch.cuda.max_memory_allocated(self._device) - self._before
        elif self._sampler is not None:
            self._done.set()
            self._sampler.join()
            self.grown = max(self._most, _resident()) - self._before

    def _sample(self) -> None:
        while not self._done.wait(_SAMPLE_S):
            self._most = max(self._most, _resident())


def _resident() -> int:
    return int(_STATM.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGESIZE")
