"""CSV and JSON Lines: every line of a feed becomes a row or a visible broken row, whatever bytes it is made of."""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.contracts import ColumnMap, Source, Window
from pipelines.errors import InputError
from pipelines.normalize import NormalizeOptions, normalize
from pipelines.schema import ID, MALFORMED, ProductSchema
from pipelines.sources import SourceSpec, lines, open_source
from pipelines.sources.delimited import Dialect
from pipelines.sources.files import FileSource
from pipelines.sources.jsonl import JsonlFormat
from pipelines.sources.projection import Projection

LATER = datetime(2100, 1, 1, tzinfo=UTC)
ALL = Window(since=None, until=LATER)


def feed(tmp_path: Path, kind: str, data: bytes, fields: tuple[str, ...] = ("t",), columns: ColumnMap | None = None, **more: Any) -> Source:
    path = tmp_path / f"feed.{kind}"
    path.write_bytes(data)
    return open_source(SourceSpec(type=kind, path=str(path), **more), columns=columns or ColumnMap(), fields=fields)


def rows(source: Source, window: Window = ALL) -> list[dict[str, Any]]:
    return [row for shard in source.read(window) for batch in shard.open() for row in batch.to_pylist()]


def good(read: list[dict[str, Any]]) -> list[Any]:
    return [row[ID] for row in read if row.get(MALFORMED) is None]


def broken(read: list[dict[str, Any]]) -> list[bytes]:
    assert all(row[ID] is None for row in read if row.get(MALFORMED) is not None)
    return [row[MALFORMED] for row in read if row.get(MALFORMED) is not None]


# CSV


def test_broken_records_surface_and_their_neighbours_survive(tmp_path: Path) -> None:
    read = rows(feed(tmp_path, "csv", b"id,t,x\n1,a,\n2,b\n3,c,d,e\n4,f,\n5,\xff,g,h\n6,\xe4,\n\n7,last,"))
    assert good(read) == ["1", "4", "6", "7"]
    assert broken(read) == [b"2,b", b"3,c,d,e", b"5,\xff,g,h"]


def test_a_stray_quote_hides_no_line(tmp_path: Path) -> None:
    read = rows(feed(tmp_path, "csv", b'id,t\n1,"stray\n2,b\n3,"c"\n4,d\n5,5" pipe\n6,f\n'))
    assert good(read) == ["4", "5", "6"]
    assert broken(read) == [b'1,"stray', b"2,b", b'3,"c"']


def test_a_nul_byte_is_data(tmp_path: Path) -> None:
    assert rows(feed(tmp_path, "csv", b'id,t\n1,a\0b\n2,"c\0"\n')) == [{"id": "1", "t": "a\0b"}, {"id": "2", "t": "c\0"}]


def test_an_unclosed_quote_costs_its_line_and_not_the_rest_of_the_file(tmp_path: Path) -> None:
    read = rows(feed(tmp_path, "csv", b'id,t\n1,a\n2,"never closed\n3,c\n4,d'))
    assert good(read) == ["1", "3", "4"]
    assert broken(read) == [b'2,"never closed']


def test_an_endless_line_is_given_up_and_reading_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "READ_BYTES", 64)
    monkeypatch.setattr(lines, "LONGEST_BYTES", 500)
    read = rows(feed(tmp_path, "csv", b"id,t\n1,a\n2," + b"x" * 5000 + b'\n3,c\n4,"' + b"y" * 50 + b"\n" + b"5,e\n" * 500))
    assert good(read) == ["1", "3"] + ["5"] * 500
    assert broken(read) == [b"2," + b"x" * 198, b'4,"' + b"y" * 50]


def test_bytes_that_are_not_utf8_stay_bytes_and_null_is_not_empty_text(tmp_path: Path) -> None:
    assert rows(feed(tmp_path, "csv", b'id,t\n1,caf\xe9\n2,""\n3,\n4,ok\n')) == [
        {"id": "1", "t": b"caf\xe9"},
        {"id": "2", "t": b""},
        {"id": "3", "t": None},
        {"id": "4", "t": b"ok"},
    ]
    assert rows(feed(tmp_path, "csv", b'id,t\n1,NULL\n2,""\n3,\n')) == [
        {"id": "1", "t": "NULL"},
        {"id": "2", "t": ""},
        {"id": "3", "t": None},
    ]


def test_headers_may_have_a_mark_quotes_and_another_delimiter(tmp_path: Path) -> None:
    data = b'\xef\xbb\xbf"id";"my ""t"";\r\nhere";x\r\n1;a;b\r\n'
    read = rows(feed(tmp_path, "csv", data, columns=ColumnMap(columns={"t": 'my "t";\r\nhere'}), delimiter=";"))
    assert read == [{"id": "1", "t": "a"}]


def test_repeated_headers_matter_only_where_mapped(tmp_path: Path) -> None:
    data = b"id,t,x,x\n1,a,b,c\n"
    assert rows(feed(tmp_path, "csv", data)) == [{"id": "1", "t": "a"}]
    with pytest.raises(InputError, match="more than one column `x`"):
        rows(feed(tmp_path, "csv", data, ("x",)))


def test_utf16_is_refused_with_advice(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"UTF-16\. Export it as UTF-8"):
        rows(feed(tmp_path, "csv", "id,t\n1,a\n".encode("utf-16")))


@pytest.mark.parametrize("data", [b"", b"\n\n", b"id,t\n", b"id,t"])
def test_a_csv_without_rows_gives_none(tmp_path: Path, data: bytes) -> None:
    assert rows(feed(tmp_path, "csv", data)) == []


CELLS = st.text(st.sampled_from('ab ",\n\r;é水'), max_size=8)


@settings(deadline=None, max_examples=150)
@given(
    cells=st.lists(st.tuples(CELLS, CELLS), max_size=20),
    read_bytes=st.integers(1, 40),
    quoting=st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]),
)
def test_csv_gives_what_the_standard_reader_gives_wherever_its_bytes_are_cut(
    tmp_path_factory: pytest.TempPathFactory, cells: list[tuple[str, str]], read_bytes: int, quoting: Any
) -> None:
    text = StringIO()
    writer = csv.writer(text, quoting=quoting, lineterminator="\r\n")
    writer.writerows([("id", "t", "n"), *((a, b, n) for n, (a, b) in enumerate(cells))])
    folder = tmp_path_factory.mktemp("csv")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "READ_BYTES", read_bytes)
        read = rows(feed(folder, "csv", text.getvalue().encode(), ("t", "n")))
    assert [(row["id"] or "", row["t"] or "", row["n"]) for row in read] == [(a, b, str(n)) for n, (a, b) in enumerate(cells)]


SOUP = st.lists(st.sampled_from([b"a", b",", b'"', b'""', b"\n", b"\r\n", b',"', b'"\n', b"\xff", b"1,x\n"]), max_size=40).map(b"".join)


@settings(deadline=None, max_examples=200)
@given(soup=SOUP, read_bytes=st.integers(1, 20))
def test_no_line_of_a_damaged_csv_vanishes(tmp_path_factory: pytest.TempPathFactory, soup: bytes, read_bytes: int) -> None:
    """A mark ends each line: whatever is around it, the mark arrives in a value or in a broken line."""
    data, marks = b"id,t\n", []
    for number, line in enumerate(soup.split(b"\n")):
        marks.append(b"<%d>" % number)
        data += line + marks[-1] + b"\n"
    folder = tmp_path_factory.mktemp("soup")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "READ_BYTES", read_bytes)
        read = rows(feed(folder, "csv", data))
    seen = b"".join(value if isinstance(value, bytes) else str(value).encode() for row in read for value in row.values())
    assert [mark for mark in marks if mark not in seen] == []


@settings(max_examples=200)
@given(soup=SOUP, sizes=st.lists(st.integers(1, 9), min_size=1))
def test_cutting_a_stream_into_records_loses_and_invents_no_byte(soup: bytes, sizes: list[int]) -> None:
    def stream() -> Iterator[bytes]:
        position, turn = 0, 0
        while position < len(soup):
            yield soup[position : position + sizes[turn % len(sizes)]]
            position, turn = position + sizes[turn % len(sizes)], turn + 1

    pieces = list(lines.records(stream(), masked=Dialect().masked))
    joined = b"".join(data + b"\n" if mask is None else data for data, mask in pieces)
    assert joined in (soup, soup + b"\n")


# JSON Lines


def test_broken_json_surfaces_and_its_neighbours_survive(tmp_path: Path) -> None:
    bad = [b"[1]", b'{"id": NaN}', b"{broken\xff", b'"text"', b'{"id": 4}{"id": 5}', b'{"id": "\x01"}', b'{"id": 1', b"{'id': 1}"]
    read = rows(feed(tmp_path, "jsonl", b'{"id": "1", "t": "a"}\r\n' + b"\n".join(bad) + b'\n\n \n{"id": "2"}'))
    assert good(read) == ["1", "2"]
    assert broken(read) == bad


@pytest.mark.parametrize("depth", [101, 900, 985, 990, 995, 1000, 100_000])
def test_bottomless_json_is_a_broken_line(tmp_path: Path, depth: int) -> None:
    read = rows(
        feed(tmp_path, "jsonl", b'{"id": "1", "t": ' + b"[" * depth + b"]" * depth + b'}\n{"id": "2", "t": [' + b"[]," * 500 + b"[]]}")
    )
    assert good(read) == ["2"]
    assert len(broken(read)) == 1


def test_json_values_keep_their_type_and_mixtures_become_text(tmp_path: Path) -> None:
    lines_ = [
        {"id": 1, "i": 1, "f": 1, "m": 1, "b": True, "n": {"a": [1, "ü"]}, "big": 1, "z": None},
        {"id": 2, "i": 2, "f": 2.5, "m": "x", "b": None, "n": None, "big": 2**70},
    ]
    data = "".join(json.dumps(line) + "\n" for line in lines_).encode()
    fields = ("i", "f", "m", "b", "n", "big", "z")
    (shard,) = feed(tmp_path, "jsonl", data, fields).read(ALL)
    (batch,) = shard.open()
    assert [str(batch.schema.field(name).type) for name in fields] == ["int64", "double", "string", "bool", "string", "string", "null"]
    assert batch.column("n").to_pylist() == ['{"a": [1, "ü"]}', None]
    assert batch.column("m").to_pylist() == ["1", "x"]
    assert batch.column("big").to_pylist() == ["1", str(2**70)]


def test_json_bytes_that_are_not_utf8_stay_bytes(tmp_path: Path) -> None:
    read = rows(
        feed(
            tmp_path,
            "jsonl",
            b'\xef\xbb\xbf{"id": "1", "t": "caf\xe9"}\n{"id": "2", "t": "\\ud83d"}\n{"id": "3", "t": "\xf0\x9f\x8f\x94"}\n',
        )
    )
    assert [row["id"] for row in read] == ["1", "2", "3"]
    assert [row["t"] for row in read] == [b"caf\xe9", b"\xed\xa0\xbd", "🏔".encode()]


def test_broken_lines_pass_every_window(tmp_path: Path) -> None:
    source = feed(tmp_path, "jsonl", b'{"id": "1", "at": "2020-01-01"}\nbroken\n', (), ColumnMap(updated_at="at"))
    assert broken(rows(source, Window(since=datetime(2024, 1, 1, tzinfo=UTC), until=LATER, bounded=True))) == [b"broken"]


def test_an_attribute_prefix_gathers_the_keys_of_each_block(tmp_path: Path) -> None:
    source = feed(
        tmp_path, "jsonl", b'{"id": "1", "attr_a": "x"}\n{"id": "2", "attr_b": 2, "other": 3}\n', (), ColumnMap(attributes="attr_*")
    )
    assert rows(source) == [{"id": "1", "attributes.a": "x", "attributes.b": None}, {"id": "2", "attributes.a": None, "attributes.b": 2}]


@settings(deadline=None, max_examples=80)
@given(
    widths=st.lists(st.integers(0, 60), max_size=30), shard_bytes=st.integers(1, 200), read_bytes=st.integers(1, 50), ended=st.booleans()
)
def test_a_split_file_gives_every_line_once(
    tmp_path_factory: pytest.TempPathFactory, widths: list[int], shard_bytes: int, read_bytes: int, *, ended: bool
) -> None:
    data = b"\n".join(b'{"id": %d, "t": "%s"}' % (n, b"x" * width) for n, width in enumerate(widths)) + (b"\n" if ended else b"")
    path = tmp_path_factory.mktemp("split") / "feed.jsonl"
    path.write_bytes(data)
    spec = SourceSpec(type="jsonl", path=str(path))
    split = FileSource(spec, Projection.of(ColumnMap(), fields=()), JsonlFormat(max_expansion=1000, shard_bytes=shard_bytes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "READ_BYTES", read_bytes)
        assert good(rows(split)) == list(range(len(widths)))


def test_a_mapped_column_beside_the_files_that_lack_it_is_null(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"id": "1"}\n')
    (tmp_path / "b.jsonl").write_bytes(b'{"id": "2", "t": 5}\n')
    source = open_source(SourceSpec(type="jsonl", path=str(tmp_path)), columns=ColumnMap(), fields=("t",))
    assert rows(source) == [{"id": "1", "t": None}, {"id": "2", "t": 5}]


def test_a_broken_line_in_ids_is_visible_too(tmp_path: Path) -> None:
    source = feed(tmp_path, "csv", b"id,t\n1,a\n2\n")
    read = pa.Table.from_batches([b.select([ID]) for shard in source.ids() for b in shard.open()][:1])
    assert read.column(ID).to_pylist() == ["1"]
    assert broken([row for shard in source.ids() for batch in shard.open() for row in batch.to_pylist()]) == [b"2"]


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text("a1.é", max_size=4)
)
JSON_ROWS = st.lists(
    st.fixed_dictionaries({"id": SCALARS, "title": SCALARS | st.lists(st.integers(), max_size=2), "price": SCALARS}), min_size=1, max_size=6
)


@given(JSON_ROWS)
@settings(max_examples=100, deadline=None)
def test_a_json_row_is_the_same_product_whatever_stands_beside_it(rows: list[dict[str, Any]]) -> None:
    def products(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "catalog.jsonl"
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
            source = open_source(SourceSpec(type="jsonl", path=str(path)), columns=ColumnMap(id="id"), fields=("title", "price"))
            schema = ProductSchema(text=("title",), filters={"price": "float"}, attributes=False)
            options = NormalizeOptions(schema=schema, deleted=None, now=datetime(2026, 1, 1, tzinfo=UTC), non_negative=())
            batches = [batch for shard in source.read(Window(since=None, until=options.now)) for batch in shard.open()]
            return [row for batch in batches for row in normalize(batch, options, shard="s").products.to_pylist()]

    def ordered(found: list[dict[str, Any]]) -> list[str]:
        return sorted(map(repr, found))

    assert ordered(products(rows)) == ordered([product for row in rows for product in products([row])])
