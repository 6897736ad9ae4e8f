"""The exact answers that searches are compared with: one pass over the vectors of a pinned table, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.index.build import mixed
from pipelines.index.probe import Scores, exact_top
from pipelines.index.segments import Vids
from pipelines.index.tuning import Exam, border
from pipelines.schema import VECTOR, VID
from pipelines.stores import lance

TOP = 10
_BATCH_ROWS = 1 << 14
# Of 300 tunings on 128 questions 88 % held what they promised to 10,000 others, on 256 93 %. A nightly look needs fewer.
_EXAM_FACTOR, _PROBE_SHARE = 2, 0.5
# So many products show where the groups lie between which shoppers ask.
_CONTEXT = 4096


@dataclass(frozen=True, kw_only=True)
class Truth:
    """One version of a table, as the judge of searches."""

    uri: str
    version: int
    options: Mapping[str, str] = field(repr=False)
    samples: int

    @cached_property
    def exam(self) -> Exam:
        """What an index is tuned on: many questions, because parameters stay for months."""
        return self.exam_for(self._questions)

    @cached_property
    def probe(self) -> Exam:
        """What an index is looked at with every night: fewer of the same questions, for both indexes the same."""
        return self.exam_for(self._questions[: max(int(self.samples * _PROBE_SHARE), 1)])

    @cached_property
    def _questions(self) -> Scores:
        """Products that training is the last to see, moved to where shoppers ask from."""
        asked = self.samples * _EXAM_FACTOR
        vectors = self._sampled(asked + _CONTEXT)
        held, context = vectors[:asked], vectors[asked:]
        return border(held, context if len(context) >= _CONTEXT else None)

    def _sampled(self, size: int) -> Scores:
        """Return vectors of the products with the largest hashed numbers, the largest first: training takes the smallest."""
        chosen = np.empty(0, np.int64)
        for batch in lance.read_rows(self.uri, version=self.version, columns=[VID], options=self.options):
            numbers = np.concatenate([chosen, batch.column(VID).to_numpy()])
            chosen = numbers[np.argsort(~mixed(numbers))[:size]]
        numbers, vectors = self.vectors_of(chosen)
        return vectors[np.searchsorted(numbers, chosen)]

    def exam_for(self, queries: Scores) -> Exam:
        """Return queries with their exact answers."""
        vids, scores = exact_top(self._stream, queries, TOP)
        return Exam(queries=queries, vids=vids, scores=scores, score_of=lambda found: self.scores(queries, found, vids, scores))

    def scores(self, queries: Scores, found: Vids, vids: Vids, known: Scores) -> Scores:
        """Return the exact score of each found product (queries x answers) for its query; -inf for a gap, and for what is not in the table.

        Most of what a search finds is among the exact answers, whose scores are known; the vectors of the others are read.
        """
        scores = np.full(found.shape, -np.inf, np.float32)
        unknown = np.zeros(found.shape, np.bool_)
        for row in range(len(found)):
            order = np.argsort(vids[row])
            at = np.minimum(np.searchsorted(vids[row][order], found[row]), vids.shape[1] - 1)
            hit = (vids[row][order][at] == found[row]) & (found[row] >= 0)
            scores[row, hit] = known[row][order][at][hit]
            unknown[row] = ~hit & (found[row] >= 0)
        if unknown.any():
            numbers, vectors = self.vectors_of(np.unique(found[unknown]))
            there = unknown & np.isin(found, numbers)
            rows, _ = np.nonzero(there)
            scores[there] = np.einsum("nd,nd->n", queries[rows], vectors[np.searchsorted(numbers, found[there])])
        return scores

    def vectors_of(self, vids: Vids) -> tuple[Vids, Scores]:
        """Return the numbers among these that are live, ascending, and their vectors."""
        rows = lance.take(self.uri, version=self.version, by=VID, values=pa.array(vids), columns=[VID, VECTOR], options=self.options)
        rows = rows.sort_by(VID)
        return rows.column(VID).to_numpy(), matrix(rows.column(VECTOR))

    def _stream(self) -> Iterator[tuple[Vids, Scores]]:
        columns = [VID, VECTOR]
        for batch in lance.read_rows(self.uri, version=self.version, columns=columns, options=self.options, batch_rows=_BATCH_ROWS):
            yield batch.column(VID).to_numpy(), matrix(batch.column(VECTOR))


def matrix(column: pa.ChunkedArray) -> npt.NDArray[np.float32]:
    """Return a column of vectors as rows of float32."""
    dims = column.type.list_size
    parts = [chunk.flatten().to_numpy(zero_copy_only=False).astype(np.float32).reshape(-1, dims) for chunk in column.chunks]
    return np.concatenate([np.empty((0, dims), np.float32), *parts])
