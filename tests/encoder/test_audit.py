from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoder.audit import DISAGREEMENTS, ENGAGEMENT, AuditOptions, disagreements, wilson_lower, write_csv, write_jsonl
from encoder.errors import EncoderError
from encoder.examples import JUDGMENTS

Row = tuple[str, str, int, int, int]


def engagement(rows: list[Row]) -> pa.Table:
    named = [dict(zip(ENGAGEMENT.names, ("us", *row), strict=True)) for row in rows]
    return pa.Table.from_pylist(named, schema=ENGAGEMENT)


def judgments(rows: list[tuple[str, str, int]]) -> pa.Table:
    columns = [(query, f"words of {query}", "us", product, grade) for query, product, grade in rows]
    return pa.Table.from_pylist([dict(zip(JUDGMENTS.names, row, strict=True)) for row in columns], schema=JUDGMENTS)


def found(rows: pa.Table) -> list[tuple[str, str, str]]:
    return [(row["query_id"], row["product_id"], row["kind"]) for row in rows.to_pylist()]


def usual(query: str, count: int = 10) -> list[Row]:
    """Products that nobody labelled, clicked once in ten views and bought once in a hundred."""
    return [(query, f"other{number}", 100, 10, 1) for number in range(count)]


def naive(rows: list[Row], grades: dict[tuple[str, str], int], options: AuditOptions) -> set[tuple[str, str, str]]:
    """The rules, a product at a time."""
    out = set()
    for query, product, views, clicks, purchases in rows:
        grade = grades.get((query, product))
        if grade is None or views < options.min_impressions:
            continue
        for touched, touches in ((clicks, [row[3] for row in rows]), (purchases, [row[4] for row in rows])):
            everyone = sum(touches) / max(sum(row[2] for row in rows), 1)
            others = [(row[2], touch) for row, touch in zip(rows, touches, strict=True) if row[0] == query and row[1] != product]
            rate = (sum(touch for _, touch in others) + options.prior * everyone) / (sum(seen for seen, _ in others) + options.prior)
            trials = views + options.prior
            own = (touched + options.prior * rate) / trials
            z = options.z
            middle, spread = own + z * z / (2 * trials), z * math.sqrt(own * (1 - own) / trials + z * z / (4 * trials * trials))
            if grade < 2 and touched >= options.min_touches and (middle - spread) / (1 + z * z / trials) > rate + 1e-12:
                out.add((query, product, "low_grade_engaged"))
            if grade >= 2 and clicks == purchases == 0 and views * rate >= options.expected:
                out.add((query, product, "high_grade_ignored"))
    return out


@st.composite
def shops(draw: st.DrawFn) -> tuple[list[Row], dict[tuple[str, str], int]]:
    rows, grades = [], {}
    for query in ("q1", "q2"):
        for product in "abcdef"[: draw(st.integers(0, 6))]:
            views = draw(st.integers(0, 300))
            clicks = draw(st.integers(0, min(views, 60))) * draw(st.integers(0, 1))
            rows.append((query, product, views, clicks, draw(st.integers(0, min(views, 5)))))
            if (grade := draw(st.integers(-2, 3))) >= 0:
                grades[query, product] = grade
    return rows, grades


@given(shops())
@settings(max_examples=60, deadline=None)
def test_audit_agrees_with_the_rules_taken_one_by_one(shop: tuple[list[Row], dict[tuple[str, str], int]]) -> None:
    rows, grades = shop
    options = AuditOptions(per_query=100)
    audit = disagreements(engagement(rows), judgments([(*key, grade) for key, grade in grades.items()]), options=options)
    assert audit.rows.schema == DISAGREEMENTS
    assert set(found(audit.rows)) == naive(rows, grades, options)
    assert len(found(audit.rows)) == len(set(found(audit.rows)))
    strengths = audit.rows["strength"].to_numpy()
    assert (np.diff(strengths) <= 0).all()
    assert (strengths >= 0).all()
    assert audit.counts["labelled"] + audit.counts["labels_without_engagement"] == len(grades)


def test_strong_contradictions_come_first_with_reasons_and_quiet_labels_do_not_come() -> None:
    rows: list[Row] = [*usual("q"), ("q", "loved", 100, 60, 1), ("q", "liked", 100, 25, 1), ("q", "ignored", 200, 0, 0)]
    rows += [("q", "fine", 100, 10, 1), ("q", "agreed", 100, 60, 1), ("q", "rare", 5, 5, 5), ("q", "few", 20, 0, 0)]
    grades = {"loved": 0, "liked": 1, "ignored": 3, "fine": 0, "agreed": 3, "rare": 0, "few": 3, "unseen": 3}
    audit = disagreements(engagement(rows), judgments([("q", product, grade) for product, grade in grades.items()]))
    assert found(audit.rows) == [
        ("q", "loved", "low_grade_engaged"),
        ("q", "ignored", "high_grade_ignored"),
        ("q", "liked", "low_grade_engaged"),
    ]
    loved, ignored, _ = audit.rows.to_pylist()
    assert loved["reason"].startswith("labelled I, but 60 clicks in 100 views, ")
    assert ignored["reason"].startswith("labelled E, shown 200 times without any clicks; ")
    assert (loved["grade"], loved["impressions"], loved["clicks"], loved["query"]) == (0, 100, 60, "words of q")
    assert (audit.counts["below_min_impressions"], audit.counts["labels_without_engagement"]) == (1, 1)
    assert audit.counts["engagement_without_label"] == 10


def test_product_is_compared_with_its_own_query() -> None:
    # 30 clicks in 100 views are many for query q and usual for query r.
    rows: list[Row] = [*usual("q"), ("q", "p", 100, 30, 0), *[("r", f"x{n}", 100, 30, 0) for n in range(10)], ("r", "p", 100, 30, 0)]
    assert found(disagreements(engagement(rows), judgments([("q", "p", 0), ("r", "p", 0)])).rows) == [("q", "p", "low_grade_engaged")]


def test_purchases_count_where_clicks_do_not() -> None:
    rows: list[Row] = [*usual("q"), ("q", "bought", 100, 10, 9)]
    audit = disagreements(engagement(rows), judgments([("q", "bought", 1)]))
    assert [(row["signal"], row["product_id"]) for row in audit.rows.to_pylist()] == [("purchases", "bought")]


def test_exposure_takes_the_place_of_impressions_where_it_is_given() -> None:
    rows: list[Row] = [*usual("q"), ("q", "last", 400, 0, 0)]
    table = engagement(rows)
    low = table.append_column("exposure", pa.array([100.0] * 10 + [8.0]))  # it stood where few looked
    labels = judgments([("q", "last", 3)])
    assert found(disagreements(table, labels).rows) == [("q", "last", "high_grade_ignored")]
    assert disagreements(low, labels).rows.num_rows == 0


def test_rows_of_several_days_are_added_up() -> None:
    rows: list[Row] = [*usual("q"), ("q", "p", 100, 50, 2)]
    days: list[Row] = [*usual("q"), ("q", "p", 60, 30, 2), ("q", "p", 40, 20, 0)]
    labels = judgments([("q", "p", 0)])
    assert disagreements(engagement(days), labels).rows.equals(disagreements(engagement(rows), labels).rows)


def test_limits_keep_the_strongest_and_count_the_rest() -> None:
    loved: list[Row] = [(query, f"p{number}", 100, 30 + 5 * number, 0) for query in ("q", "r") for number in range(4)]
    table, labels = engagement([*usual("q", 50), *usual("r", 50), *loved]), judgments([(row[0], row[1], 0) for row in loved])
    audit = disagreements(table, labels, options=AuditOptions(most=3, per_query=2))
    assert {product for _, product, _ in found(audit.rows)} == {"p3", "p2"}
    assert (audit.counts["low_grade_engaged"], audit.counts["left_out_per_query"], audit.counts["left_out_by_most"]) == (8, 4, 1)


@pytest.mark.parametrize("row", [("q", "p", 1, 2, 0), ("q", "p", 1, 0, 2), ("q", "p", 1, -1, 0), ("q", "p", -1, 0, 0)])
def test_impossible_counts_are_refused(row: Row) -> None:
    with pytest.raises(EncoderError, match="1 of 1 pairs have negative counts, or more clicks"):
        disagreements(engagement([row]), judgments([]))


def test_label_twice_or_out_of_range_is_refused() -> None:
    for labels, said in (([("q", "p", 1), ("q", "p", 2)], "twice"), ([("q", "p", 4)], "outside 0 to 3")):
        with pytest.raises(EncoderError, match=said):
            disagreements(engagement([]), judgments(labels))


def test_wilson_bound_is_that_of_the_textbook() -> None:
    # 8 of 10 at 95 %: 0.4902 to 0.9433.
    assert wilson_lower(np.array([0.8]), np.array([10.0]), z=1.96)[0] == pytest.approx(0.4902, abs=1e-4)


HOSTILE = [
    "=1+1",
    "+1",
    "-1",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "  =1",
    "＝1",
    '=HYPERLINK("http://x","y")',
    "a,b\n=1",
    'quo"te',
    "ordinary -1",
    "",
]


def test_spreadsheet_runs_no_cell_and_json_lines_are_as_they_were(tmp_path: Path) -> None:
    rows = [{"query_id": str(number), "query": text, "grade": 1, "strength": 1.5, "kind": "k"} for number, text in enumerate(HOSTILE)]
    table = pa.Table.from_pylist(rows, schema=DISAGREEMENTS)
    write_csv(table, tmp_path / "audit.csv")
    write_jsonl(table, tmp_path / "audit.jsonl")
    with (tmp_path / "audit.csv").open(encoding="utf-8-sig", newline="") as file:
        cells = [row["query"] for row in csv.DictReader(file)]
    assert [cell.removeprefix("'") for cell in cells] == HOSTILE
    assert [cell.startswith("'") for cell in cells] == [True] * 9 + [False] * 4
    lines = (tmp_path / "audit.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line)["query"] for line in lines[:-1]] == HOSTILE
    assert sorted(path.name for path in tmp_path.iterdir()) == ["audit.csv", "audit.jsonl"]
