"""How good a ranking is: metrics query by query over the full catalog, undefined ones left null and counted.

Axes: Q queries, K ranks kept, G grades, N judged pairs, U different products among them, I ranks of an ideal list.
"""

# ruff: noqa: N802, N803, N806 - arrays carry their shape in their names

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from encoder.errors import EncoderError
from encoder.examples import JUDGMENTS, PRODUCTS, Grades, Ints, conform, keys_of
from encoder.ranking import Run, Scores

Floats: TypeAlias = npt.NDArray[np.float64]
Mask: TypeAlias = npt.NDArray[np.bool_]

STRATA = ("length", "locale", "vertical", "frequency")

_LENGTHS = ((1, "1"), (2, "2"), (4, "3-4"), (7, "5-7"))  # words; longer ones are "8+"
_THIRDS = ("head", "torso", "tail")


@dataclass(frozen=True, kw_only=True)
class Measures:
    """What is measured. `gains` are those of NDCG, lowest grade first; empty means 0 and then powers of ten up to 1."""

    recall_at: tuple[int, ...] = (10, 50, 100)
    ndcg_at: int = 10
    map_at: int = 8
    judged_at: int = 10
    gains: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if min(*self.recall_at, self.ndcg_at, self.map_at, self.judged_at) < 1:
            raise EncoderError(f"A cutoff is below 1 in {self}. Give ranks from 1.")
        if any(low > high for low, high in zip((0.0, *self.gains), self.gains, strict=False)) or not np.isfinite(self.gains).all():
            raise EncoderError(f"The gains are {self.gains}. Give finite numbers from 0 that never fall, the lowest grade first.")

    def gains_G(self, grades: Grades) -> Floats:
        """Return one gain for each grade: 0, .01, .1 and 1 for the four of ESCI."""
        gains = self.gains or (0.0, *(10.0 ** (grade - grades.best) for grade in range(1, grades.best + 1)))
        if len(gains) != len(grades.names):
            raise EncoderError(f"{len(gains)} gains were given for the grades {grades.names}. Give one each.")
        return np.array(gains)


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """A row a query: query_id, query, strata and every metric, null where undefined; and what only all pairs together tell."""

    per_query: pa.Table
    pooled: Mapping[str, float | None] = field(default_factory=dict)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Return the names of the metrics, in order."""
        return tuple(item.name for item in self.per_query.schema if pa.types.is_floating(item.type))

    @property
    def strata(self) -> tuple[str, ...]:
        """Return the names of the strata that this evaluation knows."""
        return tuple(name for name in STRATA if name in self.per_query.column_names)

    def values(self, metric: str) -> Floats:
        """Return one number for each query, NaN where undefined."""
        return np.asarray(self.per_query[metric].to_numpy(zero_copy_only=False), np.float64)

    def means(self) -> pa.Table:
        """Return the mean of each metric, the queries that count in it, and those in which it is undefined."""
        columns = [self.per_query[metric] for metric in self.metrics]
        return pa.table(
            {
                "metric": pa.array(self.metrics, pa.string()),
                "mean": pa.array([pc.mean(column).as_py() for column in columns], pa.float64()),
                "count": pa.array([len(column) - column.null_count for column in columns], pa.int64()),
                "undefined": pa.array([column.null_count for column in columns], pa.int64()),
            }
        )


def evaluate(run: Run, judgments: pa.Table, *, grades: Grades | None = None, measures: Measures | None = None) -> Evaluation:
    """Return every metric of every query of a run, over the judged queries that it ranks.

    Recall counts all judged products of the set, found or not. NDCG has the ideal of all judged products, log2 discounts
    and no gain for unjudged ones; `ndcg_judged` takes those out of the ranking first. MAP divides by the smaller of the
    cutoff and the number of relevant products, so that 1 can be reached. MRR is the first relevant product's, 0 if it was
    not ranked. Without an ideal, or a product of the set, a metric is undefined.
    """
    grades, measures = grades or Grades(), measures or Measures()
    judgments = conform(judgments, JUDGMENTS, "judgments")
    deepest = max(*measures.recall_at, measures.ndcg_at, measures.map_at, measures.judged_at)
    if run.keys_QK.shape[1] < deepest:
        raise EncoderError(f"The run holds {run.keys_QK.shape[1]} ranks, and {deepest} are measured. Search with k={deepest} or more.")
    query_N = _query_rows(run, judgments)
    grade_QK, counts_QG = _judged(run, judgments, query_N, grades)
    columns = _recalls(grade_QK, counts_QG, grades, measures.recall_at)
    columns |= _precisions(grade_QK, counts_QG, grades, measures)
    first_Q = np.full(len(run), -1)
    first_Q[query_N[::-1]] = np.arange(len(query_N))[::-1]
    said = judgments.select(["query_id", "query", "locale"]).take(pa.array(first_Q))
    arrays = {name: pa.array(values, from_pandas=True) for name, values in columns.items()}
    lengths = pa.array([_length(query) for query in said["query"].to_pylist()], pa.string())
    traits = {"query_id": said["query_id"], "query": said["query"], "length": lengths, "locale": said["locale"]}
    return Evaluation(per_query=pa.table({**traits, **arrays}))


def separation(evaluation: Evaluation, judgments: pa.Table, scores_N: Scores, grades: Grades | None = None) -> Evaluation:
    """Add how well scores of judged pairs part the grades: the AUC of each query, and the pooled one of all pairs; ties count half.

    The AUC of a query that lacks one of the two sides is undefined.
    """
    grades = grades or Grades()
    judgments = conform(judgments, JUDGMENTS, "judgments")
    if len(scores_N) != len(judgments) or not np.isfinite(scores_N).all():
        raise EncoderError(f"{len(scores_N)} scores for {len(judgments)} judged pairs. Give one finite score for each.")
    row_of = {query: row for row, query in enumerate(evaluation.per_query["query_id"].to_pylist())}
    query_N = np.array([row_of.get(query, -1) for query in judgments["query_id"].to_pylist()], np.int64)
    if (query_N < 0).any():
        raise EncoderError(f"{int((query_N < 0).sum())} judged pairs belong to queries that were not evaluated. Leave them out.")
    grade_N = judgments["grade"].to_numpy()
    named = {
        (f"auc_{grades.names[high]}|{grades.names[high - 1]}"): (grade_N == high, grade_N == high - 1) for high in range(grades.best, 0, -1)
    }
    sides = (_label(grades, grades.positive, grades.best), _label(grades, 0, grades.positive - 1))
    named[f"auc_{sides[0]}|{sides[1]}"] = (grade_N >= grades.positive, grade_N < grades.positive)
    table, pooled = evaluation.per_query, {}
    for name, (high_N, low_N) in named.items():
        auc_Q = _auc(np.asarray(scores_N, np.float32), high_N, low_N, query_N, len(row_of))
        together = float(_auc(np.asarray(scores_N, np.float32), high_N, low_N, np.zeros_like(query_N), 1)[0])
        table = table.append_column(name, pa.array(auc_Q, from_pandas=True))
        pooled[name] = None if np.isnan(together) else together
    return replace(evaluation, per_query=table, pooled={**evaluation.pooled, **pooled})


def with_vertical(evaluation: Evaluation, judgments: pa.Table, products: pa.Table) -> Evaluation:
    """Add the stratum `vertical`: the most frequent one of a query's best-judged products, the first by name among equals."""
    judgments, products = conform(judgments, JUDGMENTS, "judgments"), conform(products, PRODUCTS, "products")
    joined = judgments.join(products.select(["locale", "product_id", "vertical"]), ["locale", "product_id"], join_type="inner")
    joined = joined.filter(pc.not_equal(joined["vertical"], ""))
    counted = joined.group_by(["query_id", "grade", "vertical"]).aggregate([([], "count_all")])
    order = [("query_id", "ascending"), ("grade", "descending"), ("count_all", "descending"), ("vertical", "ascending")]
    ordered = counted.sort_by(order)
    first = dict(zip(ordered["query_id"].to_pylist()[::-1], ordered["vertical"].to_pylist()[::-1], strict=True))
    values = [first.get(query, "") for query in evaluation.per_query["query_id"].to_pylist()]
    return replace(evaluation, per_query=evaluation.per_query.append_column("vertical", pa.array(values, pa.string())))


def with_frequency(evaluation: Evaluation, frequencies: Mapping[str, float]) -> Evaluation:
    """Add the stratum `frequency` from the traffic of each query id: the thirds of all traffic are head, torso and tail."""
    ids = evaluation.per_query["query_id"].to_pylist()
    missing = [query for query in ids if query not in frequencies]
    if missing:
        raise EncoderError(f"{len(missing)} queries have no frequency, {missing[0]!r} for one. Give a number for each, 0 if never seen.")
    traffic = np.array([frequencies[query] for query in ids], np.float64)
    order = np.lexsort((np.array(ids, dtype=np.str_), -traffic))
    before = np.empty(len(ids))
    before[order] = np.cumsum(traffic[order]) - traffic[order]
    third = np.minimum(3 * before / max(float(traffic.sum()), np.finfo(np.float64).tiny), 2).astype(np.int64)
    names = pa.array([_THIRDS[number] for number in np.where(traffic > 0, third, 2)], pa.string())
    return replace(evaluation, per_query=evaluation.per_query.append_column("frequency", names))


def _query_rows(run: Run, judgments: pa.Table) -> Ints:
    """Return the row of the run for each judgment; both must name the same queries, and each query has one locale and text."""
    if not len(judgments):
        raise EncoderError("There are no judgments to evaluate with. Give some, for the products of this catalog.")
    rows = pc.index_in(judgments["query_id"], value_set=pa.array(run.query_ids, pa.string()))
    unranked = pc.unique(judgments["query_id"].filter(pc.is_null(rows)))
    unjudged = set(run.query_ids) - set(pc.unique(judgments["query_id"]).to_pylist())
    if len(unranked) or unjudged:
        example = unranked[0].as_py() if len(unranked) else min(unjudged)
        counts = f"{len(unranked)} judged queries are not in the run, and {len(unjudged)} of the run are not judged"
        raise EncoderError(f"{counts}: {example!r} for one. Rank the judged queries, all of them, and no others.")
    said = judgments.select(["query_id", "query", "locale"]).group_by(["query_id", "query", "locale"]).aggregate([])
    if len(said) > len(run):
        counts = said["query_id"].value_counts().to_pylist()
        example = next(item["values"] for item in counts if item["counts"] > 1)
        raise EncoderError(f"{len(said) - len(run)} query ids stand for two texts or locales, {example!r} for one. Make the ids different.")
    return np.asarray(rows.to_numpy(), np.int64)


def _judged(run: Run, judgments: pa.Table, query_N: Ints, grades: Grades) -> tuple[Ints, Ints]:
    """Return the grade of each ranked product, -1 if not judged, and how many products of each grade a query has."""
    grade_N = judgments["grade"].to_numpy().astype(np.int64)
    if len(grade_N) and not 0 <= grade_N.min() <= grade_N.max() <= grades.best:
        raise EncoderError(f"Grades from {grade_N.min()} to {grade_N.max()} were given for {grades.names}. Give 0 to {grades.best}.")
    keys_U, product_N = np.unique(keys_of("product", judgments["locale"], judgments["product_id"]), return_inverse=True)
    pair_N = query_N * len(keys_U) + product_N  # small numbers in place of 63-bit keys, so that a pair fits one integer
    order_N = np.argsort(pair_N)
    sorted_N = pair_N[order_N]
    if (sorted_N[1:] == sorted_N[:-1]).any():
        raise EncoderError(f"{int((sorted_N[1:] == sorted_N[:-1]).sum())} pairs are judged twice. Read them with `read_judgments`.")
    product_QK = np.minimum(np.searchsorted(keys_U, run.keys_QK), len(keys_U) - 1)
    pair_QK = np.arange(len(run))[:, None] * len(keys_U) + product_QK
    found_QK = np.minimum(np.searchsorted(sorted_N, pair_QK), len(sorted_N) - 1)
    known_QK = (keys_U[product_QK] == run.keys_QK) & (sorted_N[found_QK] == pair_QK)
    counts_QG = np.bincount(query_N * len(grades.names) + grade_N, minlength=len(run) * len(grades.names))
    return np.where(known_QK, grade_N[order_N][found_QK], -1), counts_QG.reshape(len(run), -1)


def _recalls(grade_QK: Ints, counts_QG: Ints, grades: Grades, cutoffs: Iterable[int]) -> dict[str, Floats]:
    """Return the recall of the best grade, and of all relevant ones."""
    columns = {}
    for level in sorted({grades.best, grades.positive}, reverse=True):
        wanted_Q = counts_QG[:, level:].sum(axis=1)
        for cutoff in cutoffs:
            hits_Q = (grade_QK[:, :cutoff] >= level).sum(axis=1)
            columns[f"recall_{_label(grades, level, grades.best)}@{cutoff}"] = _share(hits_Q, wanted_Q)
    return columns


def _precisions(grade_QK: Ints, counts_QG: Ints, grades: Grades, measures: Measures) -> dict[str, Floats]:
    """Return the metrics that depend on the order of the first ranks."""
    gains_G, cutoff = measures.gains_G(grades), measures.ndcg_at
    discounts_I = 1 / np.log2(np.arange(2, cutoff + 2))
    # The grade at rank i of the ideal list is the number of grades whose cumulated count, from the best down, reaches past i.
    below_QGI = counts_QG[:, ::-1].cumsum(axis=1)[:, :, None] <= np.arange(cutoff)
    padded_G = np.append(gains_G[::-1], 0.0)
    ideal_Q = padded_G[below_QGI.sum(axis=1)] @ discounts_I
    judged_first_QK = np.take_along_axis(grade_QK, np.argsort(grade_QK < 0, axis=1, kind="stable"), axis=1)
    dcg_Q, judged_dcg_Q = (np.append(gains_G, 0.0)[ranked[:, :cutoff]] @ discounts_I for ranked in (grade_QK, judged_first_QK))
    relevant_QK, relevant_Q = grade_QK >= grades.positive, counts_QG[:, grades.positive :].sum(axis=1)
    deep_QK = relevant_QK[:, : measures.map_at]
    precision_QK = deep_QK.cumsum(axis=1) / np.arange(1, deep_QK.shape[1] + 1)
    reciprocal_Q = relevant_QK.any(axis=1) / (relevant_QK.argmax(axis=1) + 1)
    has_best_Q = counts_QG[:, grades.best] > 0
    return {
        f"ndcg@{cutoff}": _share(dcg_Q, ideal_Q),
        f"ndcg_judged@{cutoff}": _share(judged_dcg_Q, ideal_Q),
        f"{grades.names[-1]}@1": np.where(has_best_Q, (grade_QK[:, 0] == grades.best).astype(np.float64), np.nan),
        f"map@{measures.map_at}": _share((precision_QK * deep_QK).sum(axis=1), np.minimum(relevant_Q, measures.map_at)),
        "mrr": np.where(relevant_Q > 0, reciprocal_Q, np.nan),
        f"judged@{measures.judged_at}": (grade_QK[:, : measures.judged_at] >= 0).mean(axis=1),
    }


def _auc(scores_N: Scores, high_N: Mask, low_N: Mask, group_N: Ints, num_groups: int) -> Floats:
    """Return for each group the share of its (high, low) pairs in which high has the larger score, ties half."""
    order_N = np.lexsort((scores_N, group_N))
    scores_N, high_N, low_N, group_N = scores_N[order_N], high_N[order_N], low_N[order_N], group_N[order_N]
    new_N = np.ones(len(scores_N), bool)
    new_N[1:] = (scores_N[1:] != scores_N[:-1]) | (group_N[1:] != group_N[:-1])
    tie_N = np.cumsum(new_N) - 1
    lows_N = np.bincount(tie_N, low_N, minlength=1)[tie_N]  # as low as this one, in its group
    lows_Q = np.bincount(group_N, low_N, minlength=num_groups)
    before_N = (np.cumsum(np.bincount(tie_N, low_N, minlength=1)))[tie_N] - lows_N - (np.cumsum(lows_Q) - lows_Q)[group_N]
    wins_Q = np.bincount(group_N, high_N * (before_N + lows_N / 2), minlength=num_groups)
    return _share(wins_Q, lows_Q * np.bincount(group_N, high_N, minlength=num_groups))


def _share(parts: npt.NDArray[Any], wholes: npt.NDArray[Any]) -> Floats:
    """Divide; what has no whole is undefined."""
    shares: Floats = np.divide(parts, wholes, out=np.full(len(parts), np.nan), where=wholes > 0)
    return shares


def _label(grades: Grades, lowest: int, highest: int) -> str:
    return "+".join(grades.names[highest : lowest - 1 if lowest else None : -1])


def _length(query: str) -> str:
    words = len(query.split())
    return next((name for most, name in _LENGTHS if words <= most), "8+")
