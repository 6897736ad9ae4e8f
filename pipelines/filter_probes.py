"""Recall under filters: what a reader finds among the products that pass, against comparing all of them.

Filters come in four bands of how many products pass, each with three filters: of the catalog's own columns where these
have one, else a range of the product numbers, which are hashes. Filters and queries are chosen by hash, not by chance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from itertools import chain, islice

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.gates import FilteredRecall, GateLimits
from pipelines.index.probe import Scores, exact_scores, exact_top, recall_at
from pipelines.index.search import SegmentSearcher
from pipelines.layout import short
from pipelines.schema import VID
from pipelines.stores.lance import TableSearcher
from pipelines.where import Expression, Filter, col

TOP = 10
ENGINES = ("faiss", "lance")

# Twice as many as are asked for: among fewer, an engine can hardly miss one.
_LEAST_ROWS = 2 * TOP
_FILTERS = 3
# Where ranges of product numbers begin; which products they hold is chance, so a small one may hold too few.
_PLACES = tuple(place / 12 for place in range(9))
# A band below the floor is asked again, until it is so by more than chance, or all rounds are used.
_QUERIES, _ROUNDS = 6, 4
_SEARCHERS = 4
_ATTEMPTS = 3
_LISTED = 50
_ROOM = 0.8
# A column with more values among the sampled rows names single products.
_DISTINCT = 2048
_VID_SPAN = 2**63 - 1
_SHOWN = 160


@dataclass(frozen=True, kw_only=True)
class Band:
    """How large a share of the products its filters pass: above `low`, at most `high`."""

    name: str
    low: float
    high: float

    def aim(self, total: int) -> float | None:
        """Return the share in the middle of the band, or None where the table has too few products for one."""
        low = max(self.low, _LEAST_ROWS / max(1, total))
        return math.sqrt(max(low, self.high / 5) * self.high) if low < _ROOM * self.high else None

    def holds(self, rows: int, total: int) -> bool:
        """Say whether a filter that passes so many products belongs here."""
        return rows >= _LEAST_ROWS and self.low < rows / total <= self.high


# A filter that passes more than half is no filter, and costs as much to check as the whole table.
BANDS = (
    Band(name="over 10 %", low=0.1, high=0.5),
    Band(name="1 to 10 %", low=0.01, high=0.1),
    Band(name="0.1 to 1 %", low=0.001, high=0.01),
    Band(name="under 0.1 %", low=0.0, high=0.001),
)


def recall_filtered(
    segments: SegmentSearcher, table: TableSearcher, vectors: Scores, skipped: dict[str, str], *, floor: float = GateLimits.recall_filtered
) -> dict[str, dict[str, tuple[FilteredRecall, ...]]]:
    """Measure both engines for query vectors of length one; where there is no band, `skipped` says why, by gate.

    `floor` is what the gate asks for: a band that may be below it by chance alone is asked more questions.
    """
    bands = [(band, filters) for band in BANDS if (filters := filters_of(table, band))]
    if not bands or not len(vectors):
        reason = f"a table of {table.num_rows} products has no filter that passes {_LEAST_ROWS} of them and is one"
        skipped |= {f"recall_filtered_{name}": reason for name in ENGINES}
        return {}
    found: dict[str, list[FilteredRecall]] = {name: [] for name in ENGINES}
    with ThreadPoolExecutor(max_workers=_SEARCHERS) as pool:
        engines = _Engines(segments=segments, table=table, pool=pool, floor=floor)
        for band, filters in bands:
            for name, measured in engines.measured(band, filters, vectors).items():
                found[name].append(measured)
    return {"recall_filtered": {name: tuple(measured) for name, measured in found.items()}}


def filters_of(table: TableSearcher, band: Band) -> list[Filter]:
    """Return the band's filters: by values of two columns and a range where columns allow it, filled up with product numbers."""
    aim = band.aim(table.num_rows)
    if aim is None:
        return []
    sample, columns, chosen = table.sample(), table.columns, list[Filter]()
    names = sorted(table.kept, key=lambda name: _order(f"{band.name} {name}"))
    for made, most in ((_by_values, _FILTERS - 1), (_by_range, 1)):
        found = (_fitting(table, band, [item.filter(columns) for item in made(name, sample.column(name), aim, band)]) for name in names)
        chosen += islice((item for item in found if item), most)
    spare = (col(VID).between(start := int(_VID_SPAN * place), start + int(_VID_SPAN * aim)).filter(columns) for place in _PLACES)
    held = (item for item in spare if band.holds(table.estimate(item).rows, table.num_rows))
    return list(islice(chain(chosen, held), _FILTERS))


def _fitting(table: TableSearcher, band: Band, tried: Sequence[Filter]) -> Filter | None:
    """Return one filter of a column that passes as many products as the band asks for."""
    return next((item for item in tried[:_ATTEMPTS] if band.holds(table.estimate(item).rows, table.num_rows)), None)


def _by_values(name: str, column: pa.ChunkedArray, aim: float, band: Band) -> Iterator[Expression]:
    """Make filters of one value, most frequent first, and of several rarer ones together.

    A frequent value is the hardest: too many rows to compare them all, and often far from the query, as one category is
    from the others.
    """
    if not (pa.types.is_string(column.type) or pa.types.is_boolean(column.type) or pa.types.is_integer(column.type)):
        return
    found = column.drop_null().value_counts()
    if len(found) > _DISTINCT:
        return
    known = [(item["counts"] / len(column), item["values"]) for item in found.to_pylist()]
    known.sort(key=lambda item: (-item[0], _order(item[1])))
    yield from islice((col(name) == value for share, value in known if band.low < share <= band.high), _ATTEMPTS - 1)
    together: list[object] = []
    total = 0.0
    for share, value in sorted(known, key=lambda item: _order(item[1])):
        if share < aim / 2 and total < aim and len(together) < _LISTED:
            together.append(value)
            total += share
    if len(together) > 1:
        yield col(name).is_in(together)


def _by_range(name: str, column: pa.ChunkedArray, aim: float, band: Band) -> Iterator[Expression]:
    """Make a filter of a range of numbers or times that begins somewhere in the middle of them."""
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_timestamp(column.type)):
        return
    values = column.drop_null()
    if pa.types.is_floating(values.type):
        values = values.filter(pc.is_finite(values))
    width = max(1, round(aim * len(column)))
    if width >= len(values):
        return
    ordered = values.take(pc.sort_indices(values))
    start = int.from_bytes(_order(f"{name} {band.name}")[:4]) % (len(ordered) - width)
    yield col(name).between(ordered[start].as_py(), ordered[start + width - 1].as_py())


@dataclass(frozen=True, kw_only=True)
class _Exam:
    """Queries under one filter, and what comparing everything that passes finds for them."""

    where: Filter
    queries: Scores
    vids: npt.NDArray[np.int64]
    scores: Scores


@dataclass(frozen=True, kw_only=True)
class _Engines:
    """Both indexes of one generation, and what asks them."""

    segments: SegmentSearcher
    table: TableSearcher
    pool: ThreadPoolExecutor
    floor: float

    def measured(self, band: Band, filters: Sequence[Filter], vectors: Scores) -> dict[str, FilteredRecall]:
        """Ask in rounds, each filter with queries of its own, until it is no chance on which side of the floor the recall is."""
        count = min(_QUERIES, len(vectors))
        turns = np.arange(_ROUNDS * len(filters) * count).reshape(_ROUNDS, len(filters), count) % len(vectors)
        exams = [self.exam(where, vectors[turns[:, place].ravel()]) for place, where in enumerate(filters)]
        shares: dict[str, list[npt.NDArray[np.float64]]] = {name: [np.empty(0) for _ in filters] for name in ENGINES}
        for turn in range(_ROUNDS):
            asked = slice(turn * count, (turn + 1) * count)
            for place, exam in enumerate(exams):
                for name, found in self.recalls(exam, asked).items():
                    shares[name][place] = np.append(shares[name][place], found)
            if not any(self._doubtful(np.concatenate(parts)) for parts in shares.values()):
                break
        return {name: self._summed(band, filters, parts) for name, parts in shares.items()}

    def exam(self, where: Filter, queries: Scores) -> _Exam:
        """Return queries with their exact answers under a filter: one reading of what passes, for all rounds."""
        vids, scores = exact_top(partial(self.table.vectors, where), queries, TOP)
        return _Exam(where=where, queries=queries, vids=vids, scores=scores)

    def recalls(self, exam: _Exam, asked: slice) -> dict[str, npt.NDArray[np.float64]]:
        """Search as a reader does, and return the share of the exact answers that each query found, by engine."""
        queries, allowed = exam.queries[asked], self.table.matching(exam.where)
        found = {"faiss": self.segments.search(queries, TOP, allowed=allowed).vids, "lance": np.full((len(queries), TOP), -1, np.int64)}
        answers = self.pool.map(lambda query: self.table.nearest(query, TOP, where=exam.where).column(VID).to_numpy(), queries)
        for row, answer in enumerate(answers):
            found["lance"][row, : len(answer)] = answer
        numbers = np.hstack([*found.values()])
        one_by_one = col(VID).is_in(np.unique(numbers)).filter(self.table.columns)
        scores = exact_scores(partial(self.table.vectors, one_by_one), queries, numbers)
        scores[~np.isin(numbers, allowed)] = -np.inf
        return {
            name: recall_at(vids, own, exam.vids[asked], exam.scores[asked], TOP)
            for (name, vids), own in zip(found.items(), np.split(scores, len(found), axis=1), strict=True)
        }

    def _doubtful(self, shares: npt.NDArray[np.float64]) -> bool:
        mean = float(shares.mean())
        return mean < self.floor <= mean + 2 * _error(shares)

    def _summed(self, band: Band, filters: Sequence[Filter], parts: Sequence[npt.NDArray[np.float64]]) -> FilteredRecall:
        everything = np.concatenate(parts)
        worst = filters[int(np.argmin([part.mean() for part in parts]))]
        return FilteredRecall(
            band=band.name,
            recall=float(everything.mean()),
            error=_error(everything),
            queries=len(everything),
            example=short(worst.text, _SHOWN),
            rows=self.table.estimate(worst).rows,
        )


def _error(shares: npt.NDArray[np.float64]) -> float:
    """Return the standard error of the mean."""
    return float(shares.std() / math.sqrt(len(shares)))


def _order(value: object) -> bytes:
    """Return what puts values into an order that nothing but their own bytes decides."""
    return blake2b(repr(value).encode(), digest_size=8).digest()
