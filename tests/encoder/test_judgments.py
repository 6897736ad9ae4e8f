from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoder.errors import EncoderError
from encoder.examples import JUDGMENTS, Grades
from encoder.judgments import THREE_LEVELS, Reading, left_out, read_judgments

OURS = [
    {"query_id": "7", "query": "red shoe", "locale": "us", "product_id": "007", "grade": 3},
    {"query_id": "7", "query": "red shoe", "locale": "us", "product_id": "8", "grade": 0},
    {"query_id": "q2", "query": 'a "quoted", text', "locale": "es", "product_id": "007", "grade": 1},
]
ESCI = [
    {"example_id": 0, "query": "fan", "query_id": 1, "product_id": "B1", "product_locale": "us", "esci_label": "E", "small_version": 1, "split": "train"},
    {"example_id": 1, "query": "fan", "query_id": 1, "product_id": "B2", "product_locale": "us", "esci_label": "S", "small_version": 1, "split": "train"},
    {"example_id": 2, "query": "silla", "query_id": 2, "product_id": "B1", "product_locale": "es", "esci_label": "C", "small_version": 0, "split": "test"},
    {"example_id": 3, "query": "silla", "query_id": 2, "product_id": "B2", "product_locale": "es", "esci_label": "I", "small_version": 1, "split": "test"},
]  # fmt: skip


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zl", "Zp")), min_size=1, max_size=12).filter(
    lambda text: bool(text.strip())
)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.dictionaries(st.tuples(TEXTS, TEXTS), st.integers(0, 3), min_size=1, max_size=8),
    suffix=st.sampled_from([".csv", ".tsv", ".csv.gz", ".parquet"]),
)
def test_whatever_is_written_is_read_back_in_every_format(
    tmp_path_factory: pytest.TempPathFactory, rows: dict[tuple[str, str], int], suffix: str
) -> None:
    table = pa.Table.from_pylist(
        [
            {"query_id": query, "query": query, "locale": "us", "product_id": product, "grade": grade}
            for (query, product), grade in rows.items()
        ],
        schema=JUDGMENTS,
    )
    path = tmp_path_factory.mktemp("judged") / f"judgments{suffix}"
    if suffix == ".parquet":
        pq.write_table(table, path)
    else:
        options = pa_csv.WriteOptions(delimiter="\t" if suffix == ".tsv" else ",")
        with pa.output_stream(path, compression="gzip" if suffix.endswith(".gz") else None) as file:
            pa_csv.write_csv(table, file, options)
    assert read_judgments(path).equals(table)


def test_an_id_that_looks_like_a_number_stays_as_it_was_written(tmp_path: Path) -> None:
    pa_csv.write_csv(pa.Table.from_pylist(OURS), tmp_path / "judgments.csv")
    table = read_judgments(tmp_path / "judgments.csv")
    assert table.schema == JUDGMENTS
    assert table.to_pylist() == OURS
    assert left_out(table) == {"filtered": 0, "repeated": 0, "conflicting": 0}


def test_esci_is_read_by_its_columns_and_filtered_by_its_split(tmp_path: Path) -> None:
    path = parquet(tmp_path / "examples.parquet", ESCI)
    table = read_judgments(path)
    assert table["grade"].to_pylist() == [3, 2, 1, 0]
    assert list(zip(table["locale"].to_pylist(), table["product_id"].to_pylist(), strict=True)) == [
        ("us", "B1"),
        ("us", "B2"),
        ("es", "B1"),
        ("es", "B2"),
    ]
    assert read_judgments(path, grades=THREE_LEVELS)["grade"].to_pylist() == [2, 1, 1, 0]
    small_test = read_judgments(path, reading=Reading(where={"split": "test", "small_version": "1"}))
    assert small_test.to_pylist() == [{"query_id": "2", "query": "silla", "locale": "es", "product_id": "B2", "grade": 0}]
    assert left_out(small_test)["filtered"] == 3
    with pytest.raises(EncoderError, match="no judgment with"):
        read_judgments(path, reading=Reading(where={"split": "dev"}))


def test_wands_is_read_from_its_two_tab_separated_files_on_either_scale(tmp_path: Path) -> None:
    labels, queries = tmp_path / "label.csv.gz", tmp_path / "query.csv"
    with gzip.open(labels, "wt") as file:
        file.write("id\tquery_id\tproduct_id\tlabel\n0\t0\t25434\tExact\n1\t0\t12088\tIrrelevant\n2\t1\t42931\tPartial\n")
    queries.write_text("query_id\tquery\tquery_class\n0\tsalon chair\tMassage Chairs\n1\t6'6\" rug, oval\tRugs\n")
    table = read_judgments(labels, queries=queries, locale="us")
    assert table["grade"].to_pylist() == [3, 0, 2]
    assert table["query"].to_pylist() == ["salon chair", "salon chair", "6'6\" rug, oval"]
    assert read_judgments(labels, queries=queries, grades=THREE_LEVELS)["grade"].to_pylist() == [2, 0, 1]
    partial = Reading(labels={"Partial": "C"})
    assert read_judgments(labels, queries=queries, reading=partial)["grade"].to_pylist() == [3, 0, 1]


def test_numbers_of_another_scale_are_mapped_and_not_guessed(tmp_path: Path) -> None:
    path = parquet(tmp_path / "judgments.parquet", [row | {"grade": grade} for row, grade in zip(OURS, (5.0, 1.0, 1.0), strict=True)])
    with pytest.raises(EncoderError, match="grade is '5' in 1 rows"):
        read_judgments(path)
    mapped = read_judgments(path, grades=Grades(("no", "yes"), positive=1), reading=Reading(labels={"5": "yes", "1": "no"}))
    assert mapped["grade"].to_pylist() == [1, 0, 0]


@pytest.mark.parametrize(("conflicts", "grade"), [("highest", 3), ("lowest", 1)])
def test_a_conflict_is_refused_or_settled_and_counted(tmp_path: Path, conflicts: Any, grade: int) -> None:
    path = parquet(tmp_path / "judgments.parquet", [*OURS, OURS[0] | {"grade": 1}, OURS[1]])
    with pytest.raises(EncoderError, match=r"1 products have different grades for one query \(7 / 007\)"):
        read_judgments(path)
    table = read_judgments(path, reading=Reading(conflicts=conflicts))
    assert table.to_pylist() == [OURS[0] | {"grade": grade}, *OURS[1:]]
    assert left_out(table) == {"filtered": 0, "repeated": 2, "conflicting": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_id": None}, r"query_id is empty in 1 rows \(2\)"),
        ({"product_id": ""}, r"product_id is empty in 1 rows \(2\)"),
        ({"query": "  "}, r"query is empty in 1 rows \(2\)"),
        ({"grade": None}, r"grade is empty in 1 rows \(2\)"),
        ({"grade": 4}, r"grade is '4' in 1 rows \(2\)\. Known are .*exact.*0, 1, 2, 3"),
        ({"grade": -1}, r"grade is '-1' in 1 rows \(2\)"),
        ({"query": "blue shoe"}, "1 query ids have different texts, such as 7"),
    ],
)
def test_a_bad_row_is_refused_by_its_number(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = parquet(tmp_path / "judgments.parquet", [OURS[0], OURS[1] | change, OURS[2]])
    with pytest.raises(EncoderError, match=message):
        read_judgments(path)


def test_what_is_no_file_of_judgments_is_refused_with_what_is_known(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match=r"no grade\. Known are query_id, query, locale"):
        read_judgments(parquet(tmp_path / "a.parquet", [{"query_id": "1", "query": "a", "product_id": "2", "stars": 3}]))
    with pytest.raises(EncoderError, match="lacks product_id; it has query_id, grade"):
        read_judgments(parquet(tmp_path / "b.parquet", [{"query_id": "1", "grade": 3}]))
    with pytest.raises(EncoderError, match=r"lacks 1 queries of .*, such as q2"):
        read_judgments(parquet(tmp_path / "c.parquet", OURS), queries=parquet(tmp_path / "d.parquet", [{"query_id": "7", "query": "x"}]))
    with pytest.raises(EncoderError, match="1 query ids occur twice"):
        read_judgments(tmp_path / "c.parquet", queries=parquet(tmp_path / "e.parquet", [{"query_id": "7", "query": "x"}] * 2))
    (tmp_path / "broken.csv").write_text("query_id,query,product_id,grade\n1,a,2\n")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    for name, message in (("broken.csv", "cannot be read"), ("broken.parquet", "cannot be read"), ("none.csv", "is no file")):
        with pytest.raises(EncoderError, match=message):
            read_judgments(tmp_path / name)
    with pytest.raises(EncoderError, match="conflicts is 'mean'"):
        Reading(conflicts="mean")  # type: ignore[arg-type]


@pytest.mark.skipif("CATALOG_EMBED_DATA" not in os.environ, reason="CATALOG_EMBED_DATA names no folder of judged data")
@pytest.mark.parametrize(
    ("name", "rows", "queries"),
    [("chorus_icecat", 1578, 54), ("abt_buy", 9502, 1068), ("pricerunner", 27085, 10188), ("esci_us_judgments_only", 6678, 150)],
)
def test_published_judgments_are_read_whole(name: str, rows: int, queries: int) -> None:
    folder = Path(os.environ["CATALOG_EMBED_DATA"]) / name
    table = read_judgments(folder / "judgments.parquet", queries=folder / "queries.parquet", locale="us")
    assert (len(table), len(set(table["query_id"].to_pylist()))) == (rows, queries)
    assert left_out(table) == {"filtered": 0, "repeated": 0, "conflicting": 0}
