from __future__ import annotations

import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from encoder.batches import Batches
from encoder.errors import EncoderError
from encoder.examples import JUDGMENTS, NEGATIVES, PRODUCTS, Batch, Examples, Grades, from_pairs, join, keys_of, same_query, with_negatives

Judged = tuple[str, str, str, int]


def products(ids: list[str], groups: dict[str, str] | None = None, locale: str = "us") -> pa.Table:
    rows = [
        {"locale": locale, "product_id": name, "text": f"text of {name}", "group": (groups or {}).get(name, ""), "vertical": ""}
        for name in ids
    ]
    return pa.Table.from_pylist(rows, schema=PRODUCTS)


def judgments(rows: list[Judged], locale: str = "us") -> pa.Table:
    named = [dict(zip(("query_id", "query", "product_id", "grade"), row, strict=True)) | {"locale": locale} for row in rows]
    return pa.Table.from_pylist(named, schema=JUDGMENTS)


def negatives(rows: list[tuple[str, str, int]]) -> pa.Table:
    named = [{"query_id": query, "locale": "us", "product_id": product, "grade": grade} for query, product, grade in rows]
    return pa.Table.from_pylist(named, schema=NEGATIVES)


def key(product: str) -> int:
    return int(keys_of("product", pa.array(["us"]), pa.array([product]))[0])


def own(batch: Batch, row: int) -> list[tuple[str, int]]:
    """Return the texts and grades of a query's own documents, column 0 first."""
    columns = [column for column in batch.own_QN[row] if column >= 0]
    return [(batch.documents[column], int(grade)) for column, grade in zip(columns, batch.grades_QN[row], strict=False)]


@st.composite
def catalogs(draw: st.DrawFn) -> tuple[pa.Table, pa.Table]:
    names = [f"p{number}" for number in range(draw(st.integers(6, 20)))]
    groups = {name: draw(st.sampled_from(["", "", "red", "blue"])) for name in names}
    rows: list[Judged] = []
    for query in range(draw(st.integers(6, 14))):
        judged = draw(st.lists(st.sampled_from(names), min_size=1, max_size=8, unique=True))
        rows += [(f"q{query}", f"query {query}", name, draw(st.integers(0, 3))) for name in judged]
    return judgments(rows), products(names[:-1], groups)


def batches(examples: Examples, **changed: Any) -> Batches:
    return Batches(examples, **({"queries_per_batch": 2, "documents_per_query": 3, "seed": 7} | changed))


def fields_of(batch: Batch) -> list[Any]:
    return [value.tolist() if isinstance(value, np.ndarray) else value for value in vars(batch).values()]


@settings(max_examples=40, deadline=None)
@given(catalogs(), st.integers(1, 3), st.integers(1, 5), st.integers(0, 9))
def test_a_batch_keeps_its_contract(catalog: tuple[pa.Table, pa.Table], rows: int, width: int, step: int) -> None:
    judged, shop = catalog
    examples = join(judged, shop)
    known = {(row["query"], f"text of {row['product_id']}"): row["grade"] for row in judged.to_pylist()}
    try:
        batch = batches(examples, queries_per_batch=rows, documents_per_query=width)(step)
    except EncoderError:
        reject()  # one variant group for two positives, or fewer queries than asked for
    assert batch.own_QN.shape == batch.grades_QN.shape == (rows, width)
    assert len(set(batch.documents)) == len(batch.documents) == len(set(batch.product_key_M.tolist()))
    assert len(set(batch.query_key_Q.tolist())) == rows
    first_groups = [
        int(batch.group_key_M[columns[0]]) for columns, grades in zip(batch.own_QN, batch.grades_QN, strict=True) if grades[0] >= 2
    ]
    assert len(set(first_groups)) == len(first_groups)
    for row, query in enumerate(batch.queries):
        documents = own(batch, row)
        mine = {text: grade for (name, text), grade in known.items() if name == query and text in set(examples.texts.to_pylist())}
        assert documents
        assert all(mine[text] == grade for text, grade in documents)
        assert documents[0][1] == max(mine.values()), "the best grade is there, and in column 0"
        assert len(documents) == min(width, len(mine))
        shown = len({grade for _, grade in documents})
        assert shown == min(width, len(set(mine.values()))), "each grade once before any twice"
        labels = {int(label): int(grade) for label, grade in zip(batch.labels_QL[row], batch.label_grades_QL[row], strict=True) if label}
        assert labels == {key(text.removeprefix("text of ")): grade for text, grade in mine.items()}
    assert ((batch.own_QN < 0) == (batch.grades_QN < 0)).all()
    assert ((batch.labels_QL == 0) == (batch.label_grades_QL < 0)).all()


def forty_queries() -> Examples:
    rows = [(f"q{query}", f"query {query}", f"p{(3 * query + step) % 60}", (query + step) % 4) for query in range(41) for step in range(7)]
    return join(judgments(rows), products([f"p{number}" for number in range(60)]))


@given(st.integers(0, 50), st.integers(0, 3))
@settings(max_examples=20, deadline=None)
def test_a_batch_depends_on_seed_step_and_rank_and_not_on_what_was_asked_before_or_on_the_order_of_rows(step: int, seed: int) -> None:
    rows = [
        (f"q{query}", f"query {query}", f"p{(3 * query + place) % 60}", (query + place) % 4) for query in range(41) for place in range(7)
    ]
    shop = products([f"p{number}" for number in range(60)])
    straight = batches(join(judgments(rows), shop), queries_per_batch=4, seed=seed)
    turned = batches(join(judgments(rows[::-1]), shop.take(list(range(59, -1, -1)))), queries_per_batch=4, seed=seed)
    straight(3)
    assert fields_of(straight(step)) == fields_of(turned(step))


def test_the_ranks_together_take_the_batch_of_one_process() -> None:
    examples = forty_queries()
    whole = batches(examples, queries_per_batch=8)(5)
    parts = [batches(examples, queries_per_batch=2, rank=rank, world=4)(5) for rank in range(4)]
    assert whole.queries == sum((part.queries for part in parts), ())
    assert [own(whole, row) for row in range(8)] == [own(part, row) for part in parts for row in range(2)]


def test_an_epoch_takes_each_query_once_and_the_next_in_another_order() -> None:
    examples = forty_queries()
    made = batches(examples, queries_per_batch=4)
    assert (made.steps_per_epoch, made.left_over) == (10, 1)
    epochs = [[query for step in range(10) for query in made(epoch * 10 + step).queries] for epoch in range(3)]
    assert all(max(Counter(epoch).values()) == 1 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert len({query for epoch in epochs for query in epoch}) == 41, "the one left over is another one"


def test_column_0_walks_through_all_best_documents() -> None:
    rows = [("q", "shoe", f"p{number}", 3) for number in range(5)] + [("q", "shoe", "bad", 0), ("q", "shoe", "soso", 2)]
    made = batches(join(judgments(rows), products([f"p{number}" for number in range(5)] + ["bad", "soso"])), queries_per_batch=1)
    shown = [own(made(epoch), 0) for epoch in range(5)]
    assert {documents[0][0] for documents in shown} == {f"text of p{number}" for number in range(5)}
    assert all({grade for _, grade in documents} == {3, 2, 0} for documents in shown)


def test_column_0_walks_through_all_relevant_documents_where_substitutes_count_as_positives() -> None:
    rows = [("q", "shoe", "e", 3), ("q", "shoe", "s1", 2), ("q", "shoe", "s2", 2), ("q", "shoe", "c", 1), ("q", "shoe", "i", 0)]
    examples = join(judgments(rows), products(["e", "s1", "s2", "c", "i"]))
    made = batches(examples, queries_per_batch=1, documents_per_query=1, positives="relevant")
    assert {own(made(epoch), 0)[0] for epoch in range(3)} == {("text of e", 3), ("text of s1", 2), ("text of s2", 2)}
    wide = batches(examples, queries_per_batch=1, documents_per_query=4, positives="relevant")
    for epoch in range(3):
        documents = own(wide(epoch), 0)
        assert documents[0][1] >= 2
        assert {grade for _, grade in documents} == {3, 2, 1, 0}, "every grade stays represented"


def test_variants_of_one_family_are_never_two_positives_of_a_step() -> None:
    rows = [(f"q{number}", f"query {number}", f"p{number}", 3) for number in range(40)]
    groups = {f"p{number}": f"family {number % 10}" for number in range(40)}
    examples = join(judgments(rows), products([f"p{number}" for number in range(40)], groups))
    made = batches(examples, queries_per_batch=4, world=2)
    for step in range(10):
        assert len(set(_together(examples, step).group_key_M.tolist())) == 8
    assert made.steps_per_epoch == 5
    with pytest.raises(EncoderError, match="2 are lacking among 40 queries"):
        batches(examples, queries_per_batch=12)(0)


def _together(examples: Examples, step: int) -> Batch:
    return batches(examples, queries_per_batch=8)(step)


def test_equal_queries_never_meet_and_know_each_others_labels() -> None:
    rows = [("a", "Red  Shoes!", "p1", 3), ("b", "red shoes", "p2", 3), ("c", "blue", "p3", 3), ("d", "green", "p4", 3)]
    made = batches(join(judgments(rows), products(["p1", "p2", "p3", "p4"])))
    for step in range(12):
        batch = made(step)
        assert len({same_query(query) for query in batch.queries}) == 2
        for row, query in enumerate(batch.queries):
            if same_query(query) == "red shoes":
                assert set(batch.labels_QL[row].tolist()) == {key("p1"), key("p2")}


def test_where_twins_disagree_the_label_is_the_higher_grade() -> None:
    rows = [("a", "Red shoes", "p1", 3), ("b", "red shoes", "p1", 0), ("b", "red shoes", "p2", 2)]
    made = batches(join(judgments(rows), products(["p1", "p2"])), queries_per_batch=1)
    for step in range(4):
        labels = dict(zip(made(step).labels_QL[0].tolist(), made(step).label_grades_QL[0].tolist(), strict=True))
        assert labels == {key("p1"): 3, key("p2"): 2}


def test_twins_that_no_exchange_can_part_give_their_place_to_another_query() -> None:
    rows = [(f"q{number}", "red shoe", f"p{number}", 3) for number in range(5)] + [("other", "blue shoe", "p5", 3)]
    made = batches(join(judgments(rows), products([f"p{number}" for number in range(6)])))
    for step in range(6):
        assert set(made(step).queries) == {"red shoe", "blue shoe"}
    with pytest.raises(EncoderError, match="1 are lacking among 6 queries"):
        batches(made.examples, queries_per_batch=3)(0)


def test_judgments_without_a_product_are_counted() -> None:
    rows = [("a", "red", "p1", 3), ("a", "red", "gone", 2), ("b", "blue", "gone", 3), ("b", "blue", "lost", 0)]
    examples = join(judgments(rows), products(["p1"]))
    assert (examples.missing.judgments, examples.missing.products, examples.missing.queries) == (3, 2, 1)
    assert examples.queries.to_pylist() == ["red"]


def test_a_product_of_another_locale_is_another_product() -> None:
    examples = join(
        judgments([("a", "red", "p1", 3), ("b", "blue", "p2", 3)]), pa.concat_tables([products(["p1"], locale="es"), products(["p2"])])
    )
    assert examples.queries.to_pylist() == ["blue"]
    assert examples.missing.judgments == 1


def test_mined_documents_take_half_of_their_grade_and_do_not_overrule_judgments() -> None:
    rows = [("q", "shoe", "best", 3), *(("q", "shoe", f"old{number}", 0) for number in range(40))]
    names = ["best", *(f"old{number}" for number in range(40)), *(f"new{number}" for number in range(40))]
    mined = negatives([*(("q", f"new{number}", 0) for number in range(40)), ("q", "best", 0), ("nobody", "old1", 0), ("q", "gone", 0)])
    examples = join(judgments(rows), products(names))
    made = batches(examples, queries_per_batch=1, documents_per_query=21, negatives=mined)
    for step in range(5):
        counts = Counter(text.removeprefix("text of ")[:3] for text, _ in own(made(step), 0))
        assert counts == {"bes": 1, "old": 10, "new": 10}
        assert own(made(step), 0)[0] == ("text of best", 3)
    added = with_negatives(examples, mined).missing
    assert (added.judgments, added.products) == (2, 1)


def test_a_mined_document_that_nobody_judged_is_a_column_and_no_label() -> None:
    rows = [("q", "shoe", "best", 3)]
    made = batches(join(judgments(rows), products(["best", "new"])), queries_per_batch=1, negatives=negatives([("q", "new", -1)]))
    batch = made(0)
    assert set(batch.documents) == {"text of best", "text of new"}
    assert own(batch, 0) == [("text of best", 3)]
    assert batch.labels_QL.tolist() == [[key("best")]]


def test_keys_are_positive_the_same_in_every_process_and_apart_by_kind() -> None:
    program = (
        "import pyarrow as pa; from encoder.examples import keys_of; print(keys_of('product', pa.array(['us']), pa.array(['B07']))[0])"
    )
    assert (
        int(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout)
        == key("B07")
        == 6001759428824395976
    )
    many = keys_of("product", pa.array(["us"] * 1000), pa.array([str(number) for number in range(1000)]))
    assert many.min() > 0
    assert len(set(many.tolist())) == 1000
    assert key("B07") != keys_of("group", pa.array(["us"]), pa.array(["B07"]))[0]


def test_pairs_become_judgments_of_the_best_grade() -> None:
    pairs = pa.table({"query": ["red shoe", "red shoe", "red shoe", "hat"], "locale": ["us"] * 4, "product_id": ["p1", "p1", "p2", "p3"]})
    table = from_pairs(pairs)
    assert table.schema == JUDGMENTS
    assert Counter(table["query"].to_pylist()) == {"red shoe": 2, "hat": 1}
    assert len(set(table["query_id"].to_pylist())) == 2
    assert set(table["grade"].to_pylist()) == {3}


def test_taking_queries_by_mask_keeps_those_with_a_positive() -> None:
    examples = join(judgments([("a", "red", "p1", 1), ("b", "blue", "p2", 2), ("b", "blue", "p1", 0)]), products(["p1", "p2"]))
    kept = examples.take(examples.has_positive_Q)
    assert kept.queries.to_pylist() == ["blue"]
    assert own(batches(kept, queries_per_batch=1)(0), 0) == [("text of p2", 2), ("text of p1", 0)]


@pytest.mark.parametrize(
    ("rows", "shop", "message"),
    [
        ([("a", "red", "p1", 4)], ["p1"], "outside 0..3"),
        ([("a", "red", "p1", 1), ("a", "blue", "p2", 1)], ["p1"], "another text than their query"),
        ([("a", "red", "p1", 1), ("a", "red", "p1", 2)], ["p1"], "judged twice"),
        ([("a", "red", "p1", 1)], ["p1", "p1"], "occur twice"),
    ],
)
def test_tables_that_contradict_themselves_are_refused(rows: list[Judged], shop: list[str], message: str) -> None:
    with pytest.raises(EncoderError, match=message):
        join(judgments(rows), products(shop))


def test_a_table_that_lacks_a_column_or_has_nulls_is_refused() -> None:
    with pytest.raises(EncoderError, match="products lack text"):
        join(judgments([("a", "red", "p1", 1)]), products(["p1"]).drop_columns(["text"]))
    with pytest.raises(EncoderError, match=r"have nulls: \{'query': 1\}"):
        join(pa.Table.from_pylist([{"query_id": "a", "locale": "us", "product_id": "p1", "grade": 1}], schema=JUDGMENTS), products(["p1"]))


def test_more_queries_a_step_than_there_are_is_refused() -> None:
    with pytest.raises(EncoderError, match="takes 21 x 2 queries, but there are 41"):
        batches(forty_queries(), queries_per_batch=21, world=2)


def test_grades_need_two_names_and_a_positive_above_the_lowest() -> None:
    assert Grades().best == 3
    for wrong in ({"names": ("E",)}, {"names": ("E", "E")}, {"positive": 0}, {"positive": 4}):
        with pytest.raises(EncoderError):
            Grades(**wrong)
