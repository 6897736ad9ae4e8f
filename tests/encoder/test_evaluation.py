from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoder.errors import EncoderError
from encoder.evaluation import Evaluation, Measures, evaluate, separation, with_frequency, with_vertical
from encoder.examples import JUDGMENTS, PRODUCTS, Grades
from encoder.ranking import Catalog, Run, pair_scores, rank

SHORT = Measures(recall_at=(1, 3), ndcg_at=3, map_at=3, judged_at=3)


def products(count: int, *, verticals: Sequence[str] = ("",)) -> pa.Table:
    rows = [("us", f"p{row:03d}", f"text {row}", "", verticals[row % len(verticals)]) for row in range(count)]
    return pa.Table.from_pylist([dict(zip(PRODUCTS.names, row, strict=True)) for row in rows], schema=PRODUCTS)


def judged(rows: Sequence[tuple[str, int, int]]) -> pa.Table:
    """Make judgments of (query id, product row, grade)."""
    return pa.Table.from_pylist(
        [{"query_id": q, "query": f"query {q}", "locale": "us", "product_id": f"p{p:03d}", "grade": g} for q, p, g in rows],
        schema=JUDGMENTS,
    )


def run_of(rankings: Mapping[str, Sequence[int]], table: pa.Table, *, depth: int) -> Run:
    """Make a run of rankings given as product rows."""
    rows = np.full((len(rankings), depth), -1)
    for number, ranking in enumerate(rankings.values()):
        rows[number, : len(ranking)] = list(ranking)[:depth]
    scores = np.tile(-np.arange(depth, dtype=np.float32), (len(rankings), 1))
    return Catalog.of(table).run(rankings, rows, scores)


def naive(ranking: Sequence[int], grades: Mapping[int, int], *, cutoff: int) -> dict[str, float | None]:
    """Compute the metrics of one query from their definitions, with the grades of ESCI."""
    gains = {3: 1.0, 2: 0.1, 1: 0.01, 0: 0.0}
    found: dict[str, float | None] = {}
    for name, level in (("E", 3), ("E+S", 2)):
        wanted = {product for product, grade in grades.items() if grade >= level}
        for at in (1, 3):
            found[f"recall_{name}@{at}"] = len(wanted & set(ranking[:at])) / len(wanted) if wanted else None

    def dcg(values: Sequence[float]) -> float:
        return sum(value / math.log2(place + 2) for place, value in enumerate(values[:cutoff]))

    ideal = dcg(sorted((gains[grade] for grade in grades.values()), reverse=True))
    condensed = [product for product in ranking if product in grades]
    for name, order in (("ndcg", ranking), ("ndcg_judged", condensed)):
        found[f"{name}@{cutoff}"] = dcg([gains[grades.get(product, 0)] for product in order]) / ideal if ideal else None
    found["E@1"] = float(bool(ranking) and grades.get(ranking[0]) == 3) if 3 in grades.values() else None
    relevant = {product for product, grade in grades.items() if grade >= 2}
    places = [place for place, product in enumerate(ranking, start=1) if product in relevant]
    precisions = [hit / place for hit, place in enumerate(places, start=1) if place <= cutoff]
    found[f"map@{cutoff}"] = sum(precisions) / min(len(relevant), cutoff) if relevant else None
    found["mrr"] = (1 / places[0] if places else 0.0) if relevant else None
    found[f"judged@{cutoff}"] = sum(product in grades for product in ranking[:cutoff]) / cutoff
    return found


rankings_and_grades = st.lists(
    st.tuples(st.lists(st.integers(0, 11), unique=True, max_size=8), st.dictionaries(st.integers(0, 11), st.integers(0, 3), min_size=1)),
    min_size=1,
    max_size=5,
)


@settings(max_examples=60, deadline=None)
@given(rankings_and_grades)
def test_every_metric_is_that_of_the_plain_loop(drawn: list[tuple[list[int], dict[int, int]]]) -> None:
    run = run_of({f"q{number}": ranking for number, (ranking, _) in enumerate(drawn)}, products(12), depth=8)
    table = judged([(f"q{number}", product, grade) for number, (_, grades) in enumerate(drawn) for product, grade in grades.items()])
    evaluation = evaluate(run, table, measures=SHORT)
    for row, (ranking, grades) in zip(evaluation.per_query.to_pylist(), drawn, strict=True):
        wanted = naive(ranking, grades, cutoff=3)
        assert set(evaluation.metrics) == set(wanted)
        for name, value in wanted.items():
            assert row[name] == (None if value is None else pytest.approx(value, abs=1e-12)), name


def test_ir_measures_agrees_on_random_runs() -> None:
    ir_measures = pytest.importorskip("ir_measures")
    draws = np.random.default_rng(5)
    rankings = {f"q{number}": draws.permutation(300)[:100].tolist() for number in range(60)}
    rows = [(query, int(product), int(draws.integers(0, 4))) for query in rankings for product in draws.permutation(300)[:40]]
    evaluation = evaluate(run_of(rankings, products(300), depth=100), judged(rows))
    gains = {0: 0, 1: 1, 2: 10, 3: 100}
    measures = {
        "recall_E@10": ir_measures.R(rel=3) @ 10,
        "recall_E@100": ir_measures.R(rel=3) @ 100,
        "recall_E+S@50": ir_measures.R(rel=2) @ 50,
        "ndcg@10": ir_measures.nDCG(gains=gains) @ 10,
        "ndcg_judged@10": ir_measures.nDCG(gains=gains, judged_only=True) @ 10,
        "E@1": ir_measures.P(rel=3) @ 1,
        "map@8": ir_measures.AP(rel=2) @ 8,
        "mrr": ir_measures.RR(rel=2),
        "judged@10": ir_measures.Judged @ 10,
    }
    qrels = [ir_measures.Qrel(query, str(product), grade) for query, product, grade in rows]
    scored = [
        ir_measures.ScoredDoc(q, str(product), -float(place)) for q, ranking in rankings.items() for place, product in enumerate(ranking)
    ]
    theirs = {(str(found.measure), found.query_id): found.value for found in ir_measures.iter_calc(list(measures.values()), qrels, scored)}
    for name, measure in measures.items():
        for row in evaluation.per_query.to_pylist():
            value = theirs[str(measure), row["query_id"]]
            if name == "map@8":  # trec_eval divides by all relevant products, even where the cutoff holds fewer
                relevant = sum(1 for query, _, grade in rows if query == row["query_id"] and grade >= 2)
                value *= relevant / min(relevant, 8)
            assert row[name] == pytest.approx(value, abs=1e-6), name


def test_a_golden_query_keeps_its_numbers() -> None:
    run = run_of({"q": [4, 0, 1, 2, 3]}, products(6), depth=5)  # unjudged, E, S, C, I; the other E is not found
    evaluation = evaluate(
        run,
        judged([("q", 0, 3), ("q", 1, 2), ("q", 2, 1), ("q", 3, 0), ("q", 5, 3)]),
        measures=Measures(recall_at=(5,), ndcg_at=5, map_at=5, judged_at=5),
    )
    row = evaluation.per_query.to_pylist()[0]
    ideal = 1 + 1 / math.log2(3) + 0.1 / 2 + 0.01 / math.log2(5)
    assert row["ndcg@5"] == pytest.approx((1 / math.log2(3) + 0.1 / 2 + 0.01 / math.log2(5)) / ideal)
    assert row["ndcg_judged@5"] == pytest.approx((1 + 0.1 / math.log2(3) + 0.01 / 2) / ideal)
    assert row["map@5"] == pytest.approx((1 / 2 + 2 / 3) / 3)
    assert (row["recall_E@5"], row["recall_E+S@5"]) == (0.5, pytest.approx(2 / 3))
    assert (row["E@1"], row["mrr"], row["judged@5"], row["length"]) == (0.0, 0.5, 0.8, "2")


def test_queries_without_the_best_grade_are_left_out_of_its_metrics_and_counted() -> None:
    run = run_of({"a": [0], "b": [1], "c": [2]}, products(3), depth=3)
    means = evaluate(run, judged([("a", 0, 3), ("b", 1, 2), ("c", 2, 0)]), measures=SHORT).means().to_pylist()
    by_name = {row["metric"]: (row["mean"], row["count"], row["undefined"]) for row in means}
    assert by_name["E@1"] == (1.0, 1, 2)
    assert by_name["recall_E+S@3"] == (1.0, 2, 1)
    assert by_name["judged@3"] == (pytest.approx(1 / 3), 3, 0)


def test_two_equal_sets_are_measured_once_and_other_scales_carry_their_names() -> None:
    run = run_of({"q": [0, 1]}, products(3), depth=3)
    evaluation = evaluate(run, judged([("q", 0, 1), ("q", 1, 0)]), grades=Grades(("no", "yes"), 1), measures=SHORT)
    assert [name for name in evaluation.metrics if name.startswith("recall")] == ["recall_yes@1", "recall_yes@3"]


def test_the_same_id_in_another_locale_is_another_product() -> None:
    table = pa.concat_tables([products(2), products(2).set_column(0, PRODUCTS.field("locale"), pa.array(["jp", "jp"]))])
    catalog = Catalog.of(table)
    run = catalog.run(["q"], np.array([[2, 0, -1]]), np.array([[2.0, 1.0, 0.0]], np.float32))
    row = evaluate(run, judged([("q", 0, 3)]), measures=SHORT).per_query.to_pylist()[0]
    assert (row["E@1"], row["recall_E@3"]) == (0.0, 1.0)
    assert catalog.rows("jp").tolist() == [2, 3]


# --- ranking ---


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_ties_are_broken_by_id_and_fewer_products_are_padded(count: int, k: int, seed: int) -> None:
    draws = np.random.default_rng(seed)
    vectors, queries = (draws.integers(-1, 2, (rows, 3)).astype(np.float32) for rows in (count, 4))
    ids = [f"p{number}" for number in draws.permutation(count)]
    rows, scores = rank(queries, vectors, ids, k)
    for query, found, found_scores in zip(queries, rows.tolist(), scores.tolist(), strict=True):
        order = sorted(range(count), key=lambda row: (-float(vectors[row] @ query), ids[row]))[:k]
        assert found == order + [-1] * (k - len(order))
        assert found_scores[: len(order)] == [float(vectors[row] @ query) for row in order]


def test_blocks_change_nothing_and_copies_of_a_vector_tie(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = np.random.default_rng(0)
    vectors = np.tile(draws.normal(size=(100, 48)).astype(np.float32), (9, 1))  # each vector nine times
    queries, ids = draws.normal(size=(70, 48)).astype(np.float32), [f"{number:04d}" for number in draws.permutation(900)]
    whole = rank(queries, vectors, ids, 50)
    monkeypatch.setattr("encoder.ranking._PRODUCT_BLOCK", 37)
    monkeypatch.setattr("encoder.ranking._QUERY_BLOCK", 11)
    parts = rank(queries, vectors, ids, 50)
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(one, other)
    assert all(len(set((row % 100).tolist())) == 6 for row in whole[0])  # 50 ranks of nine copies each
    query_n = np.repeat(np.arange(70), 50)
    np.testing.assert_array_equal(pair_scores(queries, vectors, query_n, whole[0].ravel()), whole[1].ravel())


@pytest.mark.parametrize("damage", ["order", "twice", "gap", "query"])
def test_a_run_out_of_order_is_refused(damage: str) -> None:
    good: dict[str, Any] = {
        "query_ids": ("a", "b"),
        "keys_QK": np.array([[5, 6, 0], [7, 8, 9]]),
        "places_QK": np.array([[0, 1, -1], [2, 3, 4]]),
        "scores_QK": np.array([[1, 1, -np.inf], [3, 2, 1]], np.float32),
    }
    Run(**good)
    bad: dict[str, dict[str, Any]] = {
        "order": {"places_QK": np.array([[1, 0, -1], [2, 3, 4]])},
        "twice": {"keys_QK": np.array([[5, 6, 0], [7, 8, 7]])},
        "gap": {"keys_QK": np.array([[5, 0, 6], [7, 8, 9]])},
        "query": {"query_ids": ("a", "a")},
    }
    with pytest.raises(EncoderError):
        Run(**{**good, **bad[damage]})


def test_what_cannot_be_measured_is_refused_with_the_reason() -> None:
    run = run_of({"a": [0]}, products(3), depth=3)
    with pytest.raises(EncoderError, match="k=100 or more"):
        evaluate(run, judged([("a", 0, 3)]))
    with pytest.raises(EncoderError, match="1 judged queries are not in the run"):
        evaluate(run, judged([("a", 0, 3), ("b", 0, 3)]), measures=SHORT)
    with pytest.raises(EncoderError, match="1 pairs are judged twice"):
        evaluate(run, judged([("a", 0, 3), ("a", 0, 2)]), measures=SHORT)
    with pytest.raises(EncoderError, match="Grades from 3 to 4"):
        evaluate(run, judged([("a", 0, 3), ("a", 1, 4)]), measures=SHORT)
    with pytest.raises(EncoderError, match="no judgments"):
        evaluate(run, judged([]), measures=SHORT)
    with pytest.raises(EncoderError, match="never fall"):
        Measures(gains=(0, 1, 0.1, 1))


# --- separation and strata ---


def auc(high: Sequence[float], low: Sequence[float]) -> float | None:
    wins = [1.0 if one > other else 0.5 if one == other else 0.0 for one in high for other in low]
    return sum(wins) / len(wins) if wins else None


pairs = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(-3, 3)), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(pairs)
def test_separation_is_that_of_all_pairs_one_by_one(drawn: list[tuple[int, int, int]]) -> None:
    table = judged([(f"q{query}", product, grade) for product, (query, grade, _) in enumerate(drawn)])
    queries = sorted({f"q{query}" for query, _, _ in drawn})
    evaluation = evaluate(run_of({query: [] for query in queries}, products(40), depth=3), table, measures=SHORT)
    added = separation(evaluation, table, np.array([score for _, _, score in drawn], np.float32))
    sides = {"auc_E|S": ({3}, {2}), "auc_S|C": ({2}, {1}), "auc_C|I": ({1}, {0}), "auc_E+S|C+I": ({3, 2}, {1, 0})}
    assert set(added.pooled) == set(sides)
    for name, (high, low) in sides.items():

        def part(grades: set[int], query: str | None) -> list[float]:
            return [score for q, grade, score in drawn if grade in grades and query in {None, f"q{q}"}]

        assert added.pooled[name] == pytest.approx(auc(part(high, None), part(low, None)))
        for row in added.per_query.to_pylist():
            wanted = auc(part(high, row["query_id"]), part(low, row["query_id"]))
            assert row[name] == (None if wanted is None else pytest.approx(wanted))


def small(queries: Sequence[str]) -> Evaluation:
    run = run_of({query: [0] for query in queries}, products(4), depth=3)
    return evaluate(run, judged([(query, 0, 3) for query in queries]), measures=SHORT)


def test_vertical_is_that_of_most_of_the_best_judged_products() -> None:
    table = products(6, verticals=("shoes", "bags"))
    rows = [("a", 0, 3), ("a", 1, 2), ("a", 3, 2), ("b", 0, 2), ("b", 1, 2), ("b", 3, 2), ("c", 5, 0)]
    run = run_of({query: [0] for query in "abcd"}, table, depth=3)
    evaluation = with_vertical(evaluate(run, judged([*rows, ("d", 99, 3)]), measures=SHORT), judged([*rows, ("d", 99, 3)]), table)
    assert evaluation.per_query["vertical"].to_pylist() == ["shoes", "bags", "bags", ""]
    assert evaluation.strata == ("length", "locale", "vertical")


def test_frequency_parts_the_traffic_in_thirds() -> None:
    traffic = {"a": 40.0, "b": 30.0, "c": 20.0, "d": 10.0, "e": 0.0}
    found = with_frequency(small(list(traffic)), traffic).per_query["frequency"].to_pylist()
    assert found == ["head", "torso", "tail", "tail", "tail"]
    with pytest.raises(EncoderError, match="1 queries have no frequency, 'z'"):
        with_frequency(small(["a", "z"]), traffic)


def test_undefined_values_are_nan_as_arrays() -> None:
    run = run_of({"a": [0], "b": [0]}, products(2), depth=3)
    values = evaluate(run, judged([("a", 0, 3), ("b", 0, 1)]), measures=SHORT).values("E@1")
    np.testing.assert_array_equal(values, [1.0, np.nan])
