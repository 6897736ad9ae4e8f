"""Batches of training examples: a pure function of the seed, the step and the rank.

Order and sampling come from hashed keys, not from a generator's state or from the order of the rows: a resumed run and
another machine see the same batches. Axes as in examples.py, and C candidates: all own documents of a batch's queries.
"""
# ruff: noqa: N803, N806 - arrays carry their shape in their names

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from encoder.errors import EncoderError
from encoder.examples import NOT_JUDGED, Batch, Examples, Ints, hashed, ranges, with_negatives

Positives = Literal["best", "relevant"]

_EXCHANGES = 10  # rounds; one is enough where clashes are rare


class Batches:
    """The batches of one rank, called by step. Each epoch takes the queries in another order, all ranks of a step together.

    In a step, over all ranks, no query occurs twice (`same_query`) and no two positives are of one variant group; where a
    query would clash, and no exchange with another step helps, another query takes its place. Queries that fill no whole
    batch wait for another epoch (`left_over`). Column 0 walks through a query's best documents from epoch to epoch, or through
    all `relevant` ones; then each other grade comes once before any comes twice, and half of a grade comes from the mined
    documents, if there are any.
    """

    def __init__(
        self,
        examples: Examples,
        *,
        queries_per_batch: int,
        documents_per_query: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        negatives: pa.Table | None = None,
        positives: Positives = "best",
    ) -> None:
        if queries_per_batch < 1 or documents_per_query < 1 or not 0 <= rank < world:
            asked = f"queries_per_batch={queries_per_batch}, documents_per_query={documents_per_query}, rank={rank}, world={world}"
            raise EncoderError(f"Batches cannot be made of {asked}. Give 1 or more of each, and a rank below world.")
        if queries_per_batch * world > len(examples):
            raise EncoderError(
                f"A step takes {queries_per_batch} x {world} queries, but there are {len(examples)} (without any product: "
                f"{examples.missing.queries}). Ask for fewer queries_per_batch, or judge more queries."
            )
        self.examples = examples if negatives is None else with_negatives(examples, negatives)
        judged = self.examples.judged
        relevant_Q = np.add.reduceat(judged.grade_J >= self.examples.grades.positive, judged.offsets_Q[:-1], dtype=np.int64)
        self._positives_Q: Ints = relevant_Q if positives == "relevant" else judged.positives_Q
        self._rows, self._width, self._rank, self._world = queries_per_batch, documents_per_query, rank, world
        self._seed = int(hashed("seed", [str(seed)])[0])
        self._planned: tuple[int, Ints] = (-1, np.empty(0, np.int64))

    @property
    def steps_per_epoch(self) -> int:
        """Return how many whole steps the queries fill."""
        return len(self.examples) // (self._rows * self._world)

    @property
    def left_over(self) -> int:
        """Return how many queries an epoch leaves out because they fill no whole step; other ones in each epoch."""
        return len(self.examples) % (self._rows * self._world)

    def __call__(self, step: int) -> Batch:
        """Return the batch of a step, counted from 0 through all epochs."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._planned[0] != epoch:
            self._planned = (epoch, self._plan(epoch))
        together = self._rows * self._world
        rows_K = self._filled(self._planned[1][position * together : (position + 1) * together], epoch, step)
        return self._batch(rows_K[self._rank * self._rows : (self._rank + 1) * self._rows], epoch, step)

    def _plan(self, epoch: int) -> Ints:
        """Return the queries in the order of an epoch, clashing ones exchanged with others."""
        together = self._rows * self._world
        order = np.argsort(_mixed(self.examples.id_key_Q, self._salt("epoch", epoch)), kind="stable")
        step_K = np.arange(order.size) // together
        groups = self._positive_groups(np.arange(order.size), epoch)
        for attempt in range(_EXCHANGES):
            clashes = np.flatnonzero(_repeated(self.examples.query_key_Q[order], step_K) | _repeated(groups[order], step_K))
            if not clashes.size:
                break
            drawn = np.argsort(_mixed(self.examples.id_key_Q, self._salt(f"repair {attempt}", epoch)), kind="stable")
            places = np.union1d(clashes, drawn[: 2 * clashes.size])
            shuffled = np.argsort(_mixed(self.examples.id_key_Q[order[places]], self._salt(f"exchange {attempt}", epoch)), kind="stable")
            order[places] = order[places[shuffled]]
        return order

    def _filled(self, rows_K: Ints, epoch: int, step: int) -> Ints:
        """Return the queries of a step with those that still clash replaced; refuse where nothing fits."""
        keys, groups = self.examples.query_key_Q[rows_K], self._positive_groups(rows_K, epoch)
        nowhere = np.zeros(rows_K.size, np.int64)
        clash_K = _repeated(keys, nowhere) | _repeated(groups, nowhere)
        if not clash_K.any():
            return rows_K
        filled, gaps = rows_K.copy(), np.flatnonzero(clash_K).tolist()
        taken = {*keys[~clash_K].tolist()}, {*groups[~clash_K].tolist()}
        everyone = np.argsort(_mixed(self.examples.id_key_Q, self._salt("fill", step)), kind="stable")
        candidates = zip(
            everyone.tolist(), self.examples.query_key_Q[everyone].tolist(), self._positive_groups(everyone, epoch).tolist(), strict=True
        )
        for row, key, group in candidates:
            if key not in taken[0] and group not in taken[1]:
                filled[gaps.pop()] = row
                taken[0].add(key)
                taken[1].add(group)
                if not gaps:
                    return filled
        raise EncoderError(
            f"Step {step} cannot have {rows_K.size} different queries with positives of different variant groups: {len(gaps)} are "
            f"lacking among {len(self.examples)} queries. Ask for fewer queries_per_batch."
        )

    def _positive_groups(self, rows_K: Ints, epoch: int) -> Ints:
        """Return the variant groups of the positives; a query without one has its own key, which equals no group's."""
        examples = self.examples
        first_K = self._first(rows_K, epoch)
        return np.where(first_K >= 0, examples.group_key_P[examples.judged.product_J[first_K]], examples.id_key_Q[rows_K])

    def _first(self, rows_K: Ints, epoch: int) -> Ints:
        """Return where the document of column 0 lies, or -1 for a query without a positive."""
        count_K = self._positives_Q[rows_K]
        turn_K = (self.examples.id_key_Q[rows_K] % (1 << 32) + epoch) % np.maximum(count_K, 1)
        return np.where(count_K > 0, self.examples.judged.offsets_Q[rows_K] + turn_K, -1)

    def _batch(self, rows_Q: Ints, epoch: int, step: int) -> Batch:
        """Sample the documents of some queries, and number them."""
        examples = self.examples
        query_C, at_C = self._sampled(rows_Q, epoch, step)
        product_C = examples.judged.product_J[at_C]
        products, first_C, column_C = np.unique(product_C, return_index=True, return_inverse=True)
        by_appearance = np.argsort(first_C, kind="stable")
        number = np.empty(products.size, np.int64)
        number[by_appearance] = np.arange(products.size)
        products_M = products[by_appearance]
        judged_C = examples.judged.grade_J[at_C] != NOT_JUDGED
        query_C, at_C, column_C = query_C[judged_C], at_C[judged_C], number[column_C][judged_C]
        place_C = _places(query_C)
        own_QN = np.full((rows_Q.size, self._width), -1, np.int64)
        grades_QN = np.full(own_QN.shape, -1, np.int8)
        own_QN[query_C, place_C], grades_QN[query_C, place_C] = column_C, examples.judged.grade_J[at_C]
        offsets, at_L = ranges(examples.labels.offsets_U, examples.labels.row_Q[rows_Q])
        row_L = np.repeat(np.arange(rows_Q.size), np.diff(offsets))
        labels_QL = np.zeros((rows_Q.size, int(np.diff(offsets).max(initial=0))), np.int64)
        label_grades_QL = np.full(labels_QL.shape, -1, np.int8)
        labels_QL[row_L, _places(row_L)], label_grades_QL[row_L, _places(row_L)] = (
            examples.labels.product_key_J[at_L],
            examples.labels.grade_J[at_L],
        )
        return Batch(
            queries=tuple(examples.queries.take(pa.array(rows_Q)).to_pylist()),
            documents=tuple(examples.texts.take(pa.array(products_M)).to_pylist()),
            own_QN=own_QN,
            grades_QN=grades_QN,
            query_key_Q=examples.query_key_Q[rows_Q],
            product_key_M=examples.product_key_P[products_M],
            group_key_M=examples.group_key_P[products_M],
            labels_QL=labels_QL,
            label_grades_QL=label_grades_QL,
        )

    def _sampled(self, rows_Q: Ints, epoch: int, step: int) -> tuple[Ints, Ints]:
        """Return the chosen documents as (row of the batch, place in the examples), in the order of their columns."""
        examples = self.examples
        offsets, at_C = ranges(examples.judged.offsets_Q, rows_Q)
        query_C = np.repeat(np.arange(rows_Q.size), np.diff(offsets))
        grade_C, mined_C = examples.judged.grade_J[at_C].astype(np.int64), examples.judged.mined_J[at_C]
        id_C = examples.id_key_Q[rows_Q][query_C]
        salt = self._salt("sample", step)
        first_C = at_C == self._first(rows_Q, epoch)[query_C]
        draw_C = np.where(first_C, np.uint64(0), _mixed(id_C ^ examples.product_key_P[examples.judged.product_J[at_C]], salt))
        class_C = _mixed(id_C + grade_C, salt)
        # Within a grade: the judged and the mined each in random order, then the two in turn, a coin deciding who begins.
        turn_C = 2 * _ranked(query_C, grade_C, draw_C, mined_C) + (mined_C ^ (class_C % np.uint64(2) == 1))
        round_C = _ranked(query_C, grade_C, np.where(first_C, -1, turn_C))
        best_C = grade_C == np.maximum.reduceat(grade_C, offsets[:-1])[query_C]
        order = np.lexsort((class_C, ~best_C, round_C, ~first_C, query_C))
        chosen = order[_places(query_C[order]) < self._width]
        return query_C[chosen], at_C[chosen]

    def _salt(self, purpose: str, number: int) -> int:
        return int(hashed(purpose, [f"{self._seed}:{number}"])[0])


def _mixed(keys_K: Ints, salt: int) -> npt.NDArray[np.uint64]:
    """Return a uniform number for each key: the finisher of splitmix64, the same in every version of NumPy."""
    mixed = keys_K.astype(np.uint64) + np.uint64(2 * salt + 1)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _repeated(keys_K: Ints, within_K: Ints) -> npt.NDArray[np.bool_]:
    """Return which rows have the key of an earlier row of the same step."""
    order = np.lexsort((keys_K, within_K))
    again = np.zeros(keys_K.size, bool)
    again[order[1:]] = (keys_K[order[1:]] == keys_K[order[:-1]]) & (within_K[order[1:]] == within_K[order[:-1]])
    return again


def _places(rows_K: Ints) -> Ints:
    """Return the place of each element in its run of equal neighbours."""
    starts = np.flatnonzero(np.diff(rows_K, prepend=-1))
    return np.arange(rows_K.size) - np.repeat(starts, np.diff(starts, append=rows_K.size))


def _ranked(query_C: Ints, grade_C: Ints, draw_C: npt.NDArray[np.uint64] | Ints, mined_C: npt.NDArray[np.bool_] | None = None) -> Ints:
    """Return the rank by draw within each query and grade, apart for mined documents if they are given."""
    kind_C = 2 * grade_C + (0 if mined_C is None else mined_C)
    order = np.lexsort((draw_C, kind_C, query_C))
    starts = np.flatnonzero((np.diff(query_C[order], prepend=-1) != 0) | (np.diff(kind_C[order], prepend=-9) != 0))
    ranks = np.empty(order.size, np.int64)
    ranks[order] = np.arange(order.size) - np.repeat(starts, np.diff(starts, append=order.size))
    return ranks
