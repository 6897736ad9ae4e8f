"""How many products pass a filter: known before a search, because it decides how the search is made.

A few thousand rows, chosen by hash, are held in memory. A filter that passes enough of them is estimated from them; what
passes few of them passes few rows, and those the scalar indexes count exactly in milliseconds.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.schema import VECTOR, VID
from pipelines.stores.lance.opening import explained
from pipelines.where import Filter

T = TypeVar("T")

SAMPLED_ROWS = 8192
# 64 of 8,192: the estimate is within an eighth of the truth, two times of three. It decides between plans of like cost.
_ENOUGH = 64
# Shops ask with the same few filters; an answer is 8 bytes a product.
_ANSWERS, _ANSWER_BYTES = 48, 256 * 1024**2
_ESTIMATES = 512
_VID_SPAN = 2**63


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """How many of a table's rows pass a filter, and whether that was counted."""

    rows: int
    total: int
    counted: bool

    @property
    def share(self) -> float:
        """Return the share of the table that passes, above zero."""
        return max(self.rows, 1) / max(self.total, 1)


class Remembered(Generic[T]):
    """The answers that were asked for last, bounded in number and in bytes. Safe to share between threads."""

    def __init__(self, *, entries: int, max_bytes: int = 0, size: Callable[[T], int] = lambda _: 0) -> None:
        self._entries, self._max_bytes, self._size = entries, max_bytes, size
        self._held: OrderedDict[bytes, T] = OrderedDict()
        self._lock = threading.Lock()
        self._bytes = 0

    def get(self, key: bytes, make: Callable[[], T]) -> T:
        """Return what is known under a key, or make it; two threads may make the same thing at once."""
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
        made = make()
        if self._size(made) > self._max_bytes:
            return made
        with self._lock:
            if key not in self._held:
                self._held[key] = made
                self._bytes += self._size(made)
            while len(self._held) > self._entries or self._bytes > self._max_bytes:
                _, dropped = self._held.popitem(last=False)
                self._bytes -= self._size(dropped)
        return made


class Selectivity:
    """Counts and collects what passes filters, in one open version of a table."""

    def __init__(self, dataset: Any, uri: str) -> None:
        self._dataset, self._uri = dataset, uri
        with explained("count the rows of", uri):
            self.total = int(dataset.count_rows())
        self._sampling = threading.Lock()
        self._sample: pa.Table | None = None
        self._estimates: Remembered[Estimate] = Remembered(entries=_ESTIMATES)
        self._answers: Remembered[npt.NDArray[np.int64]] = Remembered(
            entries=_ANSWERS, max_bytes=_ANSWER_BYTES, size=lambda numbers: int(numbers.nbytes)
        )

    def sample(self) -> pa.Table:
        """Return the rows with the smallest numbers, some thousands or all, without their vectors."""
        with self._sampling:
            if self._sample is None:
                whole = self.total <= SAMPLED_ROWS
                smallest = None if whole else pc.field(VID) < _VID_SPAN // self.total * SAMPLED_ROWS
                names = [name for name in self._dataset.schema.names if name != VECTOR]
                with explained("sample the rows of", self._uri):
                    self._sample = self._dataset.scanner(columns=names, filter=smallest).to_table().sort_by(VID).combine_chunks()
            return self._sample

    def estimate(self, where: Filter) -> Estimate:
        """Return how many rows pass, without reading many."""
        return self._estimates.get(where.key, lambda: self._estimated(where))

    def matching(self, where: Filter) -> npt.NDArray[np.int64]:
        """Return the numbers of the rows that pass, ascending; the same array to all who ask, so nobody may write to it."""
        return self._answers.get(where.key, lambda: self._collected(where))

    def _estimated(self, where: Filter) -> Estimate:
        sample = self.sample()
        hits = sample.select(sorted(where.columns)).filter(where.expression).num_rows
        if sample.num_rows == self.total:
            return Estimate(rows=hits, total=self.total, counted=True)
        if hits >= _ENOUGH:
            return Estimate(rows=round(hits / sample.num_rows * self.total), total=self.total, counted=False)
        with explained("count what passes a filter in", self._uri):
            return Estimate(rows=int(self._dataset.count_rows(filter=where.expression)), total=self.total, counted=True)

    def _collected(self, where: Filter) -> npt.NDArray[np.int64]:
        with explained("filter", self._uri):
            found = self._dataset.scanner(columns=[VID], filter=where.expression).to_table()
        numbers: npt.NDArray[np.int64] = np.sort(found.column(VID).to_numpy())
        numbers.setflags(write=False)
        return numbers
