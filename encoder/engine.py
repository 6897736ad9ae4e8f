"""Packs through a tower: in lanes side by side on a CPU, two in flight on CUDA, with a budget that shrinks to what fits.

A lane is a thread that runs whole packs with its share of the CPU threads: each works in its own cache, and none waits for
the others between two layers. On CUDA the host makes the next pack, and copies out the last, while one is computed.
"""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from encoder.packing import Window
from encoder.tokens import Tokens
from encoder.tower import Tower

Floats = npt.NDArray[np.float32]

# More are in flight than are computed, so that the device never waits for the host.
_IN_FLIGHT = 2


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How packs are run: tokens in a pack, packs side by side, CPU threads in all."""

    token_budget: int
    lanes: int = 1
    threads: int = 1

    def __post_init__(self) -> None:
        for name, value in (("token_budget", self.token_budget), ("threads", self.threads), ("lanes", self.lanes)):
            if value < 1:
                raise ValueError(f"{name} is {value}. Give 1 or more.")


class Engine:
    """A tower at work, at the pace that it is set to. Not for several threads at once."""

    def __init__(self, tower: Tower, *, pad_id: int, pace: Pace) -> None:
        self._tower = tower
        self._pad_id = pad_id
        self.pace = pace
        self.in_flight = _IN_FLIGHT if tower.device.type == "cuda" else 0
        self.halvings = 0

    def run(self, tokens: Tokens) -> Floats:
        """Return a unit vector for each text, in order."""
        vectors = np.empty((len(tokens), self._tower.card.dims), np.float32)
        window = Window(tokens, pad_id=self._pad_id)
        shift = _Shift(self, window, vectors)
        lanes = min(self.pace.lanes, window.tokens // self.pace.token_budget + 1) if self._tower.device.type == "cpu" else 1
        if lanes > 1:
            self._in_lanes(shift, lanes)
        else:
            shift.work(self._tower, pad_id=self._pad_id)
        return vectors

    def halve(self, size: int) -> None:
        """Halve the budget until a pack of this size is above it."""
        while self.pace.token_budget > 1 and self.pace.token_budget >= size:
            self.pace = replace(self.pace, token_budget=self.pace.token_budget // 2)
            self.halvings += 1

    def _in_lanes(self, shift: _Shift, lanes: int) -> None:
        """Let every lane take packs until none is left, or until the caller is interrupted."""
        threads = torch.get_num_threads()
        share = max(1, self.pace.threads // lanes)
        try:
            with ThreadPoolExecutor(lanes, thread_name_prefix="lane", initializer=torch.set_num_threads, initargs=(share,)) as pool:
                running = [pool.submit(shift.work, self._tower, pad_id=self._pad_id) for _ in range(lanes)]
                try:
                    for lane in running:
                        lane.result()
                except BaseException:
                    shift.stop()
                    raise
        finally:
            torch.set_num_threads(threads)  # what a lane sets is also what threads to come begin with


class _Shift:
    """The packs of one window: handed out, run, and their vectors put where their texts stand."""

    def __init__(self, engine: Engine, window: Window, vectors: Floats) -> None:
        self._engine = engine
        self._window = window
        self._vectors = vectors
        self._left = deque([(0, len(window))])
        self._tried: set[int] = set()
        self._lock = threading.Lock()

    def work(self, tower: Tower, *, pad_id: int) -> None:
        """Run packs until none is left. An error in one lane ends the others."""
        flights: deque[_Flight] = deque()
        try:
            with torch.inference_mode():
                while (place := self._take(padding=tower.way == "padded")) is not None:
                    if (flight := self._launch(tower, place, pad_id)) is not None:
                        flights.append(flight)
                    while len(flights) > self._engine.in_flight:
                        self._land(flights.popleft())
                while flights:
                    self._land(flights.popleft())
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Hand out no more packs."""
        with self._lock:
            self._left.clear()

    def _take(self, *, padding: bool) -> tuple[int, int] | None:
        """Return the next texts to run, by their places in the window."""
        with self._lock:
            while self._left:
                start, stop = self._left.popleft()
                if start == stop:
                    continue
                end = min(stop, self._window.cut(start, budget=self._engine.pace.token_budget, padding=padding))
                self._left.appendleft((end, stop))
                return start, end
            return None

    def _launch(self, tower: Tower, place: tuple[int, int], pad_id: int) -> _Flight | None:
        """Run a pack; where it does not fit in memory, put its texts back. One text must fit."""
        pack = self._window.pack(*place)
        try:
            vectors = tower(pack, pad_id=pad_id)
            return _Flight(rows=pack.rows, **_homeward(vectors))
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error) or (len(pack.rows) == 1 and place[0] in self._tried):
                raise
        # Here the exception is gone, and with it the tensors of the pack that its traceback holds.
        if tower.device.type == "cuda":
            torch.cuda.empty_cache()
        self._put_back(place, size=pack.size(padding=tower.way == "padded"))
        return None

    def _put_back(self, place: tuple[int, int], *, size: int) -> None:
        """Try a pack once more, for others may have held the memory; then under a smaller budget. The last one is split alone."""
        start, end = place
        with self._lock:
            if start not in self._tried:
                self._tried.add(start)
                self._left.appendleft(place)
            elif start == 0 or end < len(self._window):
                self._engine.halve(size)
                self._left.appendleft(place)
            else:  # a short pack says nothing about full ones
                middle = (start + end) // 2
                self._left.extendleft([(middle, end), (start, middle)])

    def _land(self, flight: _Flight) -> None:
        """Wait for the vectors of a pack, and put them where their texts stand."""
        if flight.arrived is not None:
            flight.arrived.synchronize()
        self._vectors[flight.rows] = flight.vectors.numpy()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Flight:
    """A pack that was sent, and where its vectors arrive."""

    rows: npt.NDArray[np.intp]
    vectors: torch.Tensor
    arrived: torch.cuda.Event | None


def _homeward(vectors: torch.Tensor) -> dict[str, Any]:
    """Send vectors to the host; from CUDA without waiting for them."""
    home = torch.empty(vectors.shape, dtype=vectors.dtype, pin_memory=vectors.is_cuda)
    home.copy_(vectors, non_blocking=vectors.is_cuda)
    if not vectors.is_cuda:
        return {"vectors": home, "arrived": None}
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(vectors.device))  # that of the vectors' device, which need not be the current one
    return {"vectors": home, "arrived": arrived}


def _is_out_of_memory(error: BaseException) -> bool:
    """Say whether memory ran out; beside its own error torch and the libraries below it tell so by words alone."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(words in str(error) for words in ("allocate memory", "out of memory", "ALLOC_FAILED"))
