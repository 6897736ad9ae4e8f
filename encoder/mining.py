"""Mining: what the published index answered, against what people and judges said, gives the cases that the tower gets wrong.

Tables in, tables out. A query is its (locale, query_id), a product its (locale, product_id). Judgments must be of products
that the index holds: one that it does not hold would look like a product that the tower failed to find.
Axes: C candidates, Q queries.
"""

# ruff: noqa: N806, N815 - arrays carry their shape in their names

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from encoder.errors import EncoderError, TowerError
from encoder.examples import JUDGMENTS, NEGATIVES, NOT_JUDGED, Grades, conform, keys_of
from encoder.judge import JUDGED

KEY = ("locale", "query_id", "product_id")
CANDIDATES = pa.schema(
    [
        *((name, pa.string()) for name in ("query_id", "query", "locale", "product_id")),
        ("rank", pa.int32()),
        ("score", pa.float64()),
        ("tower", pa.string()),
    ]
)
MINED = pa.schema(
    [
        *((name, pa.string()) for name in ("query_id", "query", "locale", "product_id", "kind")),
        ("rank", pa.int32()),  # null: it did not come back
        ("score", pa.float64()),
        ("grade", pa.int8()),  # -1: nobody judged it
        ("source", pa.string()),
        ("against", pa.string()),  # of an inversion: the best product that stands below
        ("against_rank", pa.int32()),
    ]
)
Ints: TypeAlias = npt.NDArray[np.int64]
Flags: TypeAlias = npt.NDArray[np.bool_]
KNOWN, PRESUMED = "known", "presumed"
HARD_NEGATIVE, HARD_POSITIVE, INVERSION = "hard_negative", "hard_positive", "inversion"


@dataclass(frozen=True, kw_only=True)
class MiningOptions:
    """Where a candidate counts as hard; at most `inversions_per_query` pairs of a query are kept, the widest gaps first.

    An unjudged candidate above `presume_below` times the score of the best product that came back is probably relevant.
    """

    near: int = 20
    far: int = 50
    presume_below: float = 0.95
    inversions_per_query: int = 100

    def __post_init__(self) -> None:
        if self.near < 1 or self.far < 1 or not 0 < self.presume_below <= 1 or self.inversions_per_query < 0:
            raise EncoderError(
                f"{self} cannot be. Ranks begin at 1, presume_below lies in (0, 1], and a number of pairs is no less than 0."
            )


USUAL = MiningOptions()


@dataclass(frozen=True, kw_only=True)
class Mined:
    """The mined rows, sorted by query, kind and rank, and how many of what there were: kept, and left out with the reason."""

    rows: pa.Table
    counts: Mapping[str, int]


def check_fingerprint(found: Iterable[str], tower: str) -> None:
    """Refuse what another tower found: its ranks and scores say nothing of this one's mistakes."""
    others = sorted(set(found) - {tower})
    if others:
        raise TowerError(
            f"The index was made by the tower {', '.join(other[:12] for other in others)}, and this one is {tower[:12]}: it makes other mistakes. "
            "Mine with the tower of the index, or publish this one first with `catalog-embed backfill --tower`."
        )


def unknown(candidates: pa.Table, judgments: pa.Table, *, deepest: int | None = None) -> pa.Table:
    """Return the candidates (to a rank) that nobody judged, in the order of query and rank: what to ask a judge about."""
    found, known = _checked(candidates), _labels(judgments, JUDGMENTS, "judgments")
    left = found.join(known.select(KEY), list(KEY), join_type="left anti")
    left = left if deepest is None else left.filter(pc.less_equal(left["rank"], deepest))
    return _sorted(left, "rank").select(["query_id", "query", "locale", "product_id", "rank"])


def classify(
    candidates: pa.Table,
    judgments: pa.Table,
    *,
    grades: Grades | None = None,
    judged: pa.Table | None = None,
    options: MiningOptions = USUAL,
) -> Mined:
    """Sort what the index answered into hard negatives, hard positives and inversions.

    A hard negative has the lowest grade and stands among the first, or above a product of the best grade that came back. A
    hard positive has the best grade and stands far down, or did not come back though its query was asked. An inversion is a
    pair: a relevant product above a best one. What people said comes before what a judge (`judged`) said. A candidate that
    nobody judged is presumed to be a negative if it scores clearly less than the best product, and is left out otherwise.
    """
    scale = grades or Grades()
    labels = _all_labels(judgments, judged, scale)
    table = _sorted(_checked(candidates).join(labels, list(KEY), join_type="left outer"), "rank")
    marks = _marks(table, scale, options)
    upper, lower, cut = _inversions(marks, options.inversions_per_query)
    table = table.set_column(table.column_names.index("grade"), "grade", pa.array(marks.grade_C.astype(np.int8)))
    source = pc.fill_null(table["source"], PRESUMED)  # of those that nobody judged, only the presumed ones stay
    table = table.set_column(table.column_names.index("source"), "source", source)
    absent = _absent(table, labels, scale)
    rows = pa.concat_tables(
        [
            _rows(table.filter(pa.array(marks.negative_C)), HARD_NEGATIVE),
            _rows(table.filter(pa.array(marks.far_C)), HARD_POSITIVE),
            _rows(absent, HARD_POSITIVE),
            _rows(table.take(pa.array(upper)), INVERSION, against=table.take(pa.array(lower))),
        ]
    )
    unjudged_C = marks.grade_C == NOT_JUDGED
    counts = {
        HARD_NEGATIVE: int(marks.negative_C.sum()),
        PRESUMED: int((marks.negative_C & unjudged_C).sum()),
        HARD_POSITIVE: int(marks.far_C.sum()) + absent.num_rows,
        "not_returned": absent.num_rows,
        INVERSION: int(upper.size),
        "inversions_left_out": cut,
        "unjudged_left_out": int((unjudged_C & ~marks.presumed_C).sum()),
        "queries": marks.last_best_Q.size,
        "queries_without_best": int((marks.last_best_Q == 0).sum()),
    }
    return Mined(rows=_sorted(rows, "kind", "rank", "product_id", "against_rank"), counts=counts)


def with_mined(original_negatives: pa.Table, mined: pa.Table, *, keep_original: float = 0.5) -> pa.Table:
    """Return all original negatives and as many mined ones as leave the originals this share; columns of NEGATIVES.

    Queries take turns: the hardest of each, then the second of each. A judged one comes before a presumed one.
    """
    if not 0 < keep_original <= 1:
        raise EncoderError(f"keep_original is {keep_original}. Give a share above 0, up to 1.")
    originals = conform(original_negatives, NEGATIVES, "original negatives")
    _refuse_twice(originals, "original negatives")
    fresh = mined.filter(pc.equal(mined["kind"], HARD_NEGATIVE))
    fresh = fresh.join(originals.select(KEY), list(KEY), join_type="left anti")
    fresh = fresh.append_column("presumed", pc.equal(fresh["grade"], NOT_JUDGED))
    fresh = _sorted(fresh, "presumed", "rank", "product_id")
    keys = keys_of("query id", fresh["locale"], fresh["query_id"])
    starts = np.flatnonzero(np.diff(keys, prepend=-1))
    turn = np.arange(keys.size) - np.repeat(starts, np.diff(starts, append=keys.size))
    fresh = fresh.append_column("turn", pa.array(turn))
    fresh = fresh.sort_by([(name, "ascending") for name in ("turn", "presumed", "rank", *KEY)])
    # The nudge keeps 3 * (1 - .7) / .7 and its like from losing a row to rounding; no share is left broken by it.
    room = int(originals.num_rows * (1 - keep_original) / keep_original + 1e-9)
    return pa.concat_tables([originals, conform(fresh.slice(0, room), NEGATIVES, "mined negatives")])


def _checked(candidates: pa.Table) -> pa.Table:
    """Return candidates that can be trusted: one row a product, ranks from 1, finite scores, one tower."""
    found = conform(candidates, CANDIDATES, "candidates")
    _refuse_twice(found, "candidates")
    if len(towers := pc.unique(found["tower"])) > 1:
        shown = ", ".join(sorted(value[:16] for value in towers.to_pylist()))
        raise TowerError(f"The candidates are of several towers: {shown}. Mine again with the tower of the index.")
    wrong = pc.or_(pc.less(found["rank"], 1), pc.invert(pc.is_finite(found["score"])))
    if bad := pc.sum(wrong).as_py():
        raise EncoderError(f"{bad} of {found.num_rows} candidates have a rank below 1 or a score that is no number. Search again.")
    return found


def _labels(table: pa.Table, schema: pa.Schema, what: str) -> pa.Table:
    """Return labels by key: grade, source, and the query's text."""
    named = pa.schema([field for field in schema if field.name in {*JUDGMENTS.names, "judge"}])
    labels = conform(table, named, what)
    _refuse_twice(labels, what)
    source = labels["judge"] if "judge" in named.names else pa.array([KNOWN] * labels.num_rows, pa.string())
    columns = {name: labels[name] for name in (*KEY, "query", "grade")}
    return pa.table({**columns, "source": source})


def _all_labels(judgments: pa.Table, judged: pa.Table | None, grades: Grades) -> pa.Table:
    """Put what a judge said behind what people said, and check the grades."""
    labels = _labels(judgments, JUDGMENTS, "judgments")
    if judged is not None:
        said = _labels(judged, JUDGED, "judged pairs")
        labels = pa.concat_tables([labels, said.join(labels.select(KEY), list(KEY), join_type="left anti").select(labels.column_names)])
    wrong = pc.or_(pc.less(labels["grade"], 0), pc.greater(labels["grade"], grades.best))
    if bad := pc.sum(wrong).as_py():
        raise EncoderError(f"{bad} of {labels.num_rows} labels have a grade outside 0 to {grades.best}. Give the grades that they are on.")
    return labels.rename_columns([*KEY, "label_query", "grade", "source"])


@dataclass(frozen=True, kw_only=True, eq=False)
class _Marks:
    """What each candidate is, and where the last best product of each query stands (0: none came back)."""

    query_C: Ints
    rank_C: Ints
    grade_C: Ints
    best_C: Flags
    relevant_C: Flags
    presumed_C: Flags
    negative_C: Flags
    far_C: Flags
    last_best_Q: Ints


def _marks(table: pa.Table, grades: Grades, options: MiningOptions) -> _Marks:
    """Apply the rules to candidates joined with their labels."""
    grade_C = pc.fill_null(table["grade"], NOT_JUDGED).to_numpy().astype(np.int64)
    rank_C, score_C = table["rank"].to_numpy().astype(np.int64), table["score"].to_numpy()
    queries, query_C = np.unique(keys_of("query id", table["locale"], table["query_id"]), return_inverse=True)
    best_C = grade_C == grades.best
    last_best_Q, best_score_Q = np.zeros(queries.size, np.int64), np.full(queries.size, -np.inf)
    np.maximum.at(last_best_Q, query_C[best_C], rank_C[best_C])
    np.maximum.at(best_score_Q, query_C[best_C], score_C[best_C])
    # Below zero .95 s would presume what scores above the best product, and 1.05 s does not. Without a best product (-inf)
    # nothing is presumed: it scored less than all that came back.
    limit_Q = best_score_Q * np.where(best_score_Q > 0, options.presume_below, 2 - options.presume_below)
    presumed_C = (grade_C == NOT_JUDGED) & (score_C <= limit_Q[query_C])
    hard_C = (rank_C <= options.near) | (rank_C < last_best_Q[query_C])
    return _Marks(
        query_C=query_C,
        rank_C=rank_C,
        grade_C=grade_C,
        best_C=best_C,
        relevant_C=(grade_C >= grades.positive) & ~best_C,
        presumed_C=presumed_C,
        negative_C=hard_C & ((grade_C == 0) | presumed_C),
        far_C=best_C & (rank_C > options.far),
        last_best_Q=last_best_Q,
    )


def _absent(table: pa.Table, labels: pa.Table, grades: Grades) -> pa.Table:
    """Return the best products that did not come back, of queries that were asked."""
    best = labels.filter(pc.equal(labels["grade"], grades.best)).join(table.select(KEY), list(KEY), join_type="left anti")
    asked = table.select(["locale", "query_id", "query"]).group_by(["locale", "query_id"]).aggregate([("query", "min")])
    asked = asked.rename_columns(["locale", "query_id", "query"])
    absent = best.join(asked, ["locale", "query_id"], join_type="inner")
    nothing = {"rank": pa.nulls(absent.num_rows, pa.int32()), "score": pa.nulls(absent.num_rows, pa.float64())}
    for name, column in nothing.items():
        absent = absent.append_column(name, column)
    return absent


def _inversions(marks: _Marks, most: int) -> tuple[Ints, Ints, int]:
    """Return the rows of relevant products above best ones, both of a pair, and how many pairs were left out."""
    query_C, rank_C = marks.query_C, marks.rank_C
    relevant, best = np.flatnonzero(marks.relevant_C), np.flatnonzero(marks.best_C)
    both = np.intersect1d(query_C[relevant], query_C[best])
    relevant = relevant[np.argsort(query_C[relevant], kind="stable")]
    best = best[np.argsort(query_C[best], kind="stable")]
    edges = [np.searchsorted(query_C[rows], both, side) for rows in (relevant, best) for side in ("left", "right")]
    uppers, lowers, cut = [np.empty(0, np.int64)], [np.empty(0, np.int64)], 0
    # Query by query: all pairs of all queries at once would be 10,000 times the queries where a judge saw everything.
    for begin, end, best_begin, best_end in zip(*edges, strict=True):
        upper, lower = relevant[begin:end], best[best_begin:best_end]
        at_upper, at_lower = np.nonzero(rank_C[upper][:, None] < rank_C[lower][None, :])
        upper, lower = upper[at_upper], lower[at_lower]
        widest = np.lexsort((rank_C[lower], rank_C[upper], rank_C[upper] - rank_C[lower]))
        uppers.append(upper[widest[:most]])
        lowers.append(lower[widest[:most]])
        cut += max(0, widest.size - most)
    return np.concatenate(uppers), np.concatenate(lowers), cut


def _rows(table: pa.Table, kind: str, *, against: pa.Table | None = None) -> pa.Table:
    """Return rows of MINED."""
    count = table.num_rows
    added = {
        "kind": pa.array([kind] * count, pa.string()),
        "against": pa.nulls(count, pa.string()) if against is None else against["product_id"],
        "against_rank": pa.nulls(count, pa.int32()) if against is None else against["rank"],
    }
    columns = {name: added[name] if name in added else table[name] for name in MINED.names}
    return pa.table(columns).cast(MINED)


def _sorted(table: pa.Table, *names: str) -> pa.Table:
    return table.sort_by([(name, "ascending") for name in ("locale", "query_id", *names)])


def _refuse_twice(table: pa.Table, what: str) -> None:
    if (twice := table.num_rows - table.group_by(list(KEY)).aggregate([]).num_rows) > 0:
        raise EncoderError(f"The {what} name {twice} pairs of a query and a product twice. Keep one row for each.")
