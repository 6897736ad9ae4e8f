from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoder.errors import EncoderError, TowerError
from encoder.examples import JUDGMENTS, NEGATIVES, Grades
from encoder.judge import JUDGED
from encoder.mining import CANDIDATES, MINED, MiningOptions, check_fingerprint, classify, unknown, with_mined

SMALL = MiningOptions(near=2, far=4)
Key = tuple[str, str, str]


def candidates(rows: Iterable[tuple[str, str, int, float]], *, tower: str = "T", locale: str = "us") -> pa.Table:
    columns = [(query, f"words of {query}", locale, product, rank, score, tower) for query, product, rank, score in rows]
    return pa.Table.from_pylist([dict(zip(CANDIDATES.names, row, strict=True)) for row in columns], schema=CANDIDATES)


def judgments(rows: Iterable[tuple[str, str, int]], *, locale: str = "us") -> pa.Table:
    columns = [(query, f"words of {query}", locale, product, grade) for query, product, grade in rows]
    return pa.Table.from_pylist([dict(zip(JUDGMENTS.names, row, strict=True)) for row in columns], schema=JUDGMENTS)


def judged(rows: Iterable[tuple[str, str, int]], *, judge: str = "judge-1") -> pa.Table:
    named = [{**row, "judge": judge, "reason": "", "confidence": 0.5} for row in judgments(rows).to_pylist()]
    return pa.Table.from_pylist(named, schema=JUDGED)


def facts(rows: pa.Table) -> list[tuple[Any, ...]]:
    names = ("query_id", "product_id", "kind", "rank", "grade", "source", "against", "against_rank")
    return [tuple(row[name] for name in names) for row in rows.to_pylist()]


def naive(asked: pa.Table, known: pa.Table, said: pa.Table, grades: Grades, options: MiningOptions) -> set[tuple[Any, ...]]:
    """The rules, a query and a product at a time."""
    labels = {(row["query_id"], row["product_id"]): (row["grade"], row["judge"]) for row in said.to_pylist()}
    labels |= {(row["query_id"], row["product_id"]): (row["grade"], "known") for row in known.to_pylist()}
    found: set[tuple[Any, ...]] = set()
    for query in {row["query_id"] for row in asked.to_pylist()}:
        rows = [row for row in asked.to_pylist() if row["query_id"] == query]
        graded = [(row, *labels.get((query, row["product_id"]), (-1, "presumed"))) for row in rows]
        best = [row for row, grade, _ in graded if grade == grades.best]
        top = max((row["score"] for row in best), default=None)
        for row, grade, source in graded:
            hard = row["rank"] <= options.near or any(row["rank"] < other["rank"] for other in best)
            presumed = grade == -1 and top is not None and row["score"] <= (0.95 * top if top > 0 else 1.05 * top)
            if hard and (grade == 0 or presumed):
                found.add((query, row["product_id"], "hard_negative", row["rank"], grade, source, None, None))
            if grade == grades.best and row["rank"] > options.far:
                found.add((query, row["product_id"], "hard_positive", row["rank"], grade, source, None, None))
            if grades.positive <= grade < grades.best:
                for other in best:
                    if row["rank"] < other["rank"]:
                        pair = (other["product_id"], other["rank"])
                        found.add((query, row["product_id"], "inversion", row["rank"], grade, source, *pair))
        came = {row["product_id"] for row in rows}
        for (asker, product), (grade, source) in labels.items():
            if asker == query and product not in came and grade == grades.best:
                found.add((query, product, "hard_positive", None, grade, source, None, None))
    return found


@st.composite
def worlds(draw: st.DrawFn) -> tuple[pa.Table, pa.Table, pa.Table]:
    products = [f"p{number}" for number in range(8)]
    asked, known, said = [], [], []
    for query in ("q1", "q2", "q3")[: draw(st.integers(1, 3))]:
        order = draw(st.permutations(products))[: draw(st.integers(0, 8))]
        scores = sorted((draw(st.sampled_from([-0.5, -0.1, 0.0, 0.2, 0.8, 0.82, 0.9])) for _ in order), reverse=True)
        asked += [(query, product, rank, score) for rank, (product, score) in enumerate(zip(order, scores, strict=True), 1)]
        known += [(query, product, grade) for product in products if (grade := draw(st.integers(-4, 3))) >= 0]
        said += [(query, product, grade) for product in products if (grade := draw(st.integers(-4, 3))) >= 0]
    return candidates(asked), judgments(known), judged(said)


@given(worlds())
@settings(max_examples=60, deadline=None)
def test_classify_agrees_with_the_rules_taken_one_by_one(world: tuple[pa.Table, pa.Table, pa.Table]) -> None:
    asked, known, said = world
    mined = classify(asked, known, judged=said, options=SMALL)
    assert mined.rows.schema == MINED
    assert len(facts(mined.rows)) == len(set(facts(mined.rows)))
    assert set(facts(mined.rows)) == naive(asked, known, said, Grades(), SMALL)
    kinds = mined.rows["kind"].to_pylist()
    assert {kind: mined.counts[kind] for kind in ("hard_negative", "hard_positive", "inversion")} == {
        kind: kinds.count(kind) for kind in ("hard_negative", "hard_positive", "inversion")
    }


@given(worlds(), st.randoms())
@settings(max_examples=15, deadline=None)
def test_order_of_the_input_does_not_matter(world: tuple[pa.Table, pa.Table, pa.Table], draws: Any) -> None:
    asked, known, said = world

    def shuffled(table: pa.Table) -> pa.Table:
        rows = list(range(table.num_rows))
        draws.shuffle(rows)
        return table.take(pa.array(rows, pa.int64()))

    assert classify(shuffled(asked), shuffled(known), judged=shuffled(said)).rows.equals(classify(asked, known, judged=said).rows)


@given(worlds(), st.sampled_from([0.3, 0.5, 0.7, 1.0]), st.integers(0, 6))
@settings(max_examples=30, deadline=None)
def test_mixing_keeps_every_original_and_their_share(world: tuple[pa.Table, pa.Table, pa.Table], share: float, count: int) -> None:
    asked, known, said = world
    rows = [{"query_id": "q1", "locale": "us", "product_id": f"p{number}", "grade": 0} for number in range(count)]
    originals = pa.Table.from_pylist(rows, schema=NEGATIVES)
    mined = classify(asked, known, judged=said).rows
    mixed = with_mined(originals, mined, keep_original=share)
    assert mixed.slice(0, count).equals(originals)
    assert count >= share * mixed.num_rows - 1e-6
    negatives = {(row["query_id"], row["product_id"]) for row in mined.to_pylist() if row["kind"] == "hard_negative"}
    fresh = len(negatives - {("q1", row["product_id"]) for row in rows})
    assert mixed.num_rows == count + min(fresh, int(count * (1 - share) / share + 1e-9))
    assert len({(row["query_id"], row["product_id"]) for row in mixed.to_pylist()}) == mixed.num_rows


def test_each_query_gets_its_hardest_before_any_gets_a_second_and_judged_come_first() -> None:
    asked = candidates(
        [("q1", "e", 4, 0.8), ("q1", "a", 1, 0.7), ("q1", "b", 2, 0.6), ("q1", "c", 3, 0.5), ("q2", "f", 1, 0.9), ("q2", "g", 2, 0.1)]
    )
    mined = classify(asked, judgments([("q1", "e", 3), ("q1", "c", 0), ("q2", "f", 3)])).rows
    originals = pa.Table.from_pylist(
        [{"query_id": "q9", "locale": "us", "product_id": f"{n}", "grade": 0} for n in range(3)], schema=NEGATIVES
    )
    mixed = with_mined(originals, mined).slice(3).to_pylist()
    assert [(row["query_id"], row["product_id"], row["grade"]) for row in mixed] == [("q1", "c", 0), ("q2", "g", -1), ("q1", "a", -1)]


def test_what_the_three_kinds_are() -> None:
    ranks = {"i21": 21, "i20": 20, "i60": 60, "s10": 10, "e30": 30, "e51": 51, "e50": 50, "c1": 1}
    asked = candidates([("q", product, rank, 1 - rank / 100) for product, rank in ranks.items()])
    grades = {"i": 0, "c": 1, "s": 2, "e": 3}
    known = judgments([("q", product, grades[product[0]]) for product in ranks] + [("q", "elost", 3), ("never asked", "e", 3)])
    mined = classify(asked, known)
    assert facts(mined.rows) == [
        ("q", "i20", "hard_negative", 20, 0, "known", None, None),
        ("q", "i21", "hard_negative", 21, 0, "known", None, None),  # above the E at 30
        ("q", "e51", "hard_positive", 51, 3, "known", None, None),
        ("q", "elost", "hard_positive", None, 3, "known", None, None),
        ("q", "s10", "inversion", 10, 2, "known", "e30", 30),
        ("q", "s10", "inversion", 10, 2, "known", "e50", 50),
        ("q", "s10", "inversion", 10, 2, "known", "e51", 51),
    ]
    assert (mined.counts["not_returned"], mined.counts["queries"]) == (1, 1)


def test_widest_inversions_are_kept_and_the_others_counted() -> None:
    asked = candidates([("q", "s1", 1, 0.9), ("q", "s2", 2, 0.8), ("q", "e3", 3, 0.7), ("q", "e4", 4, 0.6)])
    known = judgments([("q", "s1", 2), ("q", "s2", 2), ("q", "e3", 3), ("q", "e4", 3)])
    mined = classify(asked, known, options=MiningOptions(inversions_per_query=2))
    assert [(row["product_id"], row["against"]) for row in mined.rows.to_pylist()] == [("s1", "e3"), ("s1", "e4")]
    assert mined.counts["inversions_left_out"] == 2


def test_unjudged_neighbour_of_the_best_product_is_left_out_and_counted() -> None:
    asked = candidates([("q", "e", 1, 0.8), ("q", "near", 2, 0.77), ("q", "just", 3, 0.76), ("r", "x", 1, 0.1)])
    mined = classify(asked, judgments([("q", "e", 3)]))
    assert facts(mined.rows) == [("q", "just", "hard_negative", 3, -1, "presumed", None, None)]
    # Query r has no best product to compare with: nothing of it is presumed.
    assert (mined.counts["unjudged_left_out"], mined.counts["presumed"], mined.counts["queries_without_best"]) == (2, 1, 1)


def test_people_come_before_a_judge_and_a_judge_is_named() -> None:
    asked = candidates([("q", "a", 1, 0.9), ("q", "b", 2, 0.8)])
    mined = classify(asked, judgments([("q", "a", 2)]), judged=judged([("q", "a", 0), ("q", "b", 0)]))
    assert facts(mined.rows) == [("q", "b", "hard_negative", 2, 0, "judge-1", None, None)]


def test_unknown_lists_what_nobody_judged_up_to_a_rank_and_by_locale() -> None:
    asked = candidates([("q", "b", 2, 0.8), ("q", "a", 1, 0.9), ("q", "c", 3, 0.7)])
    assert unknown(asked, judgments([("q", "a", 0)]), deepest=2)["product_id"].to_pylist() == ["b"]
    assert unknown(asked, judgments([("q", "a", 0)], locale="de"))["product_id"].to_pylist() == ["a", "b", "c"]


def test_candidates_of_another_tower_or_of_two_are_refused() -> None:
    mine, other = candidates([("q", "a", 1, 0.9)], tower="mine"), candidates([("r", "a", 1, 0.9)], tower="other")
    check_fingerprint(["mine", "mine"], "mine")
    check_fingerprint([], "mine")
    for found, tower in ((["mine"], "other"), (["mine", "other"], "mine")):
        with pytest.raises(TowerError, match="Mine with the tower of the index"):
            check_fingerprint(found, tower)
    with pytest.raises(TowerError, match="several towers: mine, other"):
        classify(pa.concat_tables([mine, other]), judgments([]))


@pytest.mark.parametrize(
    ("asked", "known", "said"),
    [
        (candidates([("q", "a", 1, 0.9), ("q", "a", 2, 0.8)]), judgments([]), "candidates name 1 pairs"),
        (candidates([("q", "a", 0, 0.9)]), judgments([]), "rank below 1"),
        (candidates([("q", "a", 1, float("nan"))]), judgments([]), "no number"),
        (candidates([("q", "a", 1, 0.9)]), judgments([("q", "a", 1), ("q", "a", 2)]), "judgments name 1 pairs"),
        (candidates([("q", "a", 1, 0.9)]), judgments([("q", "a", 4)]), "outside 0 to 3"),
        (candidates([("q", "a", 1, 0.9)]).drop(["score"]), judgments([]), "lack score"),
    ],
)
def test_tables_that_cannot_be_are_refused(asked: pa.Table, known: pa.Table, said: str) -> None:
    with pytest.raises(EncoderError, match=said):
        classify(asked, known)


def test_nothing_found_and_nothing_judged_is_nothing_mined() -> None:
    mined = classify(candidates([]), judgments([]))
    assert (mined.rows.num_rows, mined.rows.schema, set(mined.counts.values())) == (0, MINED, {0})
