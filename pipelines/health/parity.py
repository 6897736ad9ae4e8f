"""Do the two indexes agree, and which of them is right: recall of each against exact search, and where they differ."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipelines.health.questions import Answers, Found, Questions
from pipelines.truth import TOP

_TENTHS = 10


@dataclass(frozen=True, kw_only=True)
class Mean:
    """The mean over queries, its standard error, and how many queries there were."""

    mean: float
    error: float
    queries: int

    @classmethod
    def of(cls, values: npt.NDArray[np.float64]) -> Mean:
        """Take the mean of at least one value."""
        return cls(mean=float(values.mean()), error=float(values.std() / math.sqrt(len(values))), queries=len(values))


@dataclass(frozen=True, kw_only=True)
class OneSided:
    """A product that only one index found for a query, at which place, and whether exact search finds it too."""

    id: str
    engine: str
    rank: int
    right: bool


@dataclass(frozen=True, kw_only=True)
class Disagreement:
    """A query on which the indexes differ: the share that they agree on, how right each is, and what only one of them found."""

    query: str
    overlap: float
    recall: Mapping[str, float]
    products: tuple[OneSided, ...]


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far the answers of both indexes are the same: on average, query by query in tenths, and the queries that differ most."""

    overlap: Mean
    tenths: tuple[int, ...]
    differing: int
    worst: tuple[Disagreement, ...]


def recall_of(answers: Answers, rows: slice) -> Mapping[str, Mean]:
    """Return the recall@10 of each index on some of the queries, against exact search."""
    numbers = np.arange(len(answers.exam.queries))[rows]
    asked = np.intersect1d(numbers, answers.asked)
    found = {"faiss": answers.faiss.recall[numbers], "lance": answers.lance.recall[asked]}
    return {name: Mean.of(recalls) for name, recalls in found.items() if len(recalls)}


def parity_of(questions: Questions, answers: Answers, *, top: int) -> Parity:
    """Compare the answers of both indexes to the queries that both were asked. Answers of one score stand for each other."""
    rows = answers.asked[answers.asked < len(questions.names)]
    overlaps = np.array([_overlap(answers, int(row)) for row in rows])
    order = np.argsort(overlaps, kind="stable")
    return Parity(
        overlap=Mean.of(overlaps),
        tenths=tuple(np.bincount(np.round(overlaps * _TENTHS).astype(np.int64), minlength=_TENTHS + 1).tolist()),
        differing=int((overlaps < 1).sum()),
        worst=tuple(
            Disagreement(
                query=questions.names[rows[at]],
                overlap=float(overlaps[at]),
                recall={"faiss": float(answers.faiss.recall[rows[at]]), "lance": float(answers.lance.recall[rows[at]])},
                products=_one_sided(answers, int(rows[at])),
            )
            for at in order[:top].tolist()
            if overlaps[at] < 1
        ),
    )


def _overlap(answers: Answers, row: int) -> float:
    """Return the share of the longer answer that both give; what ties for the last place stands for what else does."""
    one, other = _numbers(answers.faiss, row), _numbers(answers.lance, row)
    longer = max(len(one), len(other))
    both = len(one & other) + min(len(_tied(answers.faiss, row) - other), len(_tied(answers.lance, row) - one))
    return both / longer if longer else 1.0


def _one_sided(answers: Answers, row: int) -> tuple[OneSided, ...]:
    found = []
    for engine, mine, theirs in (("faiss", answers.faiss, answers.lance), ("lance", answers.lance, answers.faiss)):
        others = _numbers(theirs, row)
        for rank, (vid, right) in enumerate(zip(mine.vids[row].tolist(), mine.right[row].tolist(), strict=True), start=1):
            if vid >= 0 and vid not in others:
                found.append(OneSided(id=answers.ids[vid], engine=engine, rank=rank, right=right))
    return tuple(found[: 2 * TOP])


def _numbers(found: Found, row: int) -> set[int]:
    return {vid for vid in found.vids[row].tolist() if vid >= 0}


def _tied(found: Found, row: int) -> set[int]:
    return set(found.vids[row][found.tied[row]].tolist())
