"""Normalising: every kind of poison ends where the corpus says, clean rows never change, and no row is lost."""

from __future__ import annotations

import dataclasses
import datetime as dt
import decimal
import json
import unicodedata
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.contracts import DeletedRule
from pipelines.errors import InputError
from pipelines.normalize import Normalized, NormalizeOptions, normalize, sanitize
from pipelines.normalize.flatjson import parse_objects, parse_one_by_one
from pipelines.normalize.products import BLOCK_ROWS
from pipelines.normalize.reasons import QUARANTINE_REASONS, REASONS
from pipelines.schema import QUARANTINE, ProductSchema
from tests.poison import GOOD, NOW, POISONS, SCHEMA, UPDATED, Poison, as_table

OPTIONS = NormalizeOptions(schema=SCHEMA, deleted=None, now=NOW)


def run(table: pa.Table | pa.RecordBatch, options: NormalizeOptions = OPTIONS, first_row: int = 0) -> Normalized:
    """Normalise, and check what holds for any input: Arrow's own validation, the identity, idempotence."""
    done = normalize(table, options, shard="part-1", first_row=first_row)
    done.products.validate(full=True)
    done.rejected.validate(full=True)
    assert done.products.schema == options.schema.arrow
    assert done.rejected.schema == QUARANTINE
    assert done.rows_in == table.num_rows == done.products.num_rows + done.rejected.num_rows
    again = normalize(done.products, dataclasses.replace(options, deleted=None), shard="again")
    assert again.products.equals(done.products)
    assert not again.repaired
    assert again.rejected.num_rows == 0
    return done


def texts(values: list[bytes | None]) -> pa.Array:
    return pa.array(values, pa.binary())


def test_good_row_passes_unchanged_and_uncounted() -> None:
    done = run(as_table([GOOD]))
    assert not done.repaired
    row = done.products.to_pylist()[0]
    assert row["title"] == "Größere Läufer"
    assert row["attributes"] == [("color", "red"), ("size", "M")]
    assert row["updated_at"] == UPDATED


@pytest.mark.parametrize("poison", POISONS, ids=lambda poison: poison.name)
def test_poison_ends_where_the_corpus_says(poison: Poison) -> None:
    done = run(poison.table(), first_row=100)
    assert done.repaired == poison.repaired
    if poison.reason:
        record = done.rejected.to_pylist()[0]
        assert (record["shard"], record["row"], record["stage"], record["reason"]) == ("part-1", 100, "normalize", poison.reason)
        return
    clean = normalize(as_table([GOOD]), OPTIONS, shard="clean").products.to_pylist()[0]
    assert done.products.to_pylist()[0] == clean | poison.expected


def test_corpus_has_at_least_forty_kinds_and_reaches_every_reason() -> None:
    assert len({poison.name for poison in POISONS}) == len(POISONS) >= 40
    reached = {poison.reason for poison in POISONS} | {reason for poison in POISONS for reason in poison.repaired}
    assert reached - {None} == set(REASONS)


def test_every_reason_says_what_it_means_and_what_to_do() -> None:
    assert all(reason.meaning and reason.advice.endswith((".", "`.")) for reason in REASONS.values())
    assert list(REASONS)[: len(QUARANTINE_REASONS)] == list(QUARANTINE_REASONS)


def test_poison_leaves_its_neighbours_byte_identical() -> None:
    rows = [{**GOOD, "id": b"SKU-%d" % i, "title": "Größe %d".encode() % i if i % 3 else b"size"} for i in range(20_000)]
    kinds = [poison for poison in POISONS if poison.keeps_types]
    spoiled = {i * 1000 + 7: kinds[i * len(kinds) // 20] for i in range(20)}
    dirty = run(as_table([spoiled[i].apply(row) if i in spoiled else row for i, row in enumerate(rows)]))
    clean = run(as_table(rows))
    survivors = np.setdiff1d(np.arange(20_000), dirty.rejected["row"].to_numpy())
    untouched = pa.array(~np.isin(survivors, list(spoiled)))
    assert dirty.products.filter(untouched).equals(clean.products.filter(pa.array(~np.isin(np.arange(20_000), list(spoiled)))))
    assert dirty.rejected["reason"].to_pylist() == [poison.reason for poison in spoiled.values() if poison.reason]
    expected = Counter[str]()
    for poison in spoiled.values():
        expected.update(poison.repaired)
    assert dirty.repaired == dict(expected)


def test_all_poison_at_once_is_the_sum_of_its_kinds() -> None:
    kinds = [poison for poison in POISONS if poison.keeps_types]
    done = run(as_table([poison.apply(GOOD) for poison in kinds]))
    expected = Counter[str]()
    for poison in kinds:
        expected.update(poison.repaired)
    assert done.repaired == dict(expected)
    assert done.rejected["reason"].to_pylist() == [poison.reason for poison in kinds if poison.reason]


CELL = st.none() | st.binary(max_size=24) | st.text(max_size=12).map(lambda text: text.encode("utf-8", "surrogatepass"))
ROW = st.fixed_dictionaries(
    {
        "id": CELL | st.from_regex(rb"[a-z]{1,4}", fullmatch=True),
        "locale": CELL | st.sampled_from([b"de_CH", b"en"]),
        "title": CELL | st.text(alphabet="aé \u0301\u200b\u202e\u00a0\u1112\u1161\u3099か\n", max_size=8).map(str.encode),
        "brand": CELL,
        "price": st.none() | st.floats(),
        "stock": st.none() | st.integers(-(2**63), 2**63 - 1),
        "in_stock": st.none() | st.booleans(),
        "available": st.none() | st.datetimes(timezones=st.just(dt.UTC)),
        "updated_at": st.none() | st.datetimes(timezones=st.just(dt.UTC)),
        "attributes": st.none() | st.lists(st.tuples(CELL.filter(lambda key: key is not None), CELL), max_size=4),
        "deleted": st.none() | st.booleans(),
    }
)


@settings(max_examples=120, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=8), st.data())
def test_any_rows_are_accounted_for_whatever_their_order_and_blocks(rows: list[dict[str, Any]], data: st.DataObject) -> None:
    table = as_table(rows)
    whole = run(table)
    cut = data.draw(st.integers(0, len(rows)))
    first, second = run(table.slice(0, cut)), run(table.slice(cut), first_row=cut)
    assert pa.concat_tables([first.products, second.products]).equals(whole.products)
    assert pa.concat_tables([first.rejected, second.rejected]).equals(whole.rejected)
    assert Counter(first.repaired) + Counter(second.repaired) == Counter(whole.repaired)
    order = data.draw(st.permutations(range(len(rows))))
    shuffled = run(table.take(order))
    gone = set(whole.rejected["row"].to_pylist())
    places = {row: place for place, row in enumerate(row for row in range(len(rows)) if row not in gone)}
    assert shuffled.products.equals(whole.products.take(pa.array([places[row] for row in order if row in places], pa.int64())))
    assert shuffled.repaired == whole.repaired


TEXTUAL = (
    st.none()
    | st.binary(max_size=30)
    | st.sampled_from([b"1e5", b"-0", b"0012", b"2026-02-29", b"2026-12-31T23:59:59.9Z", b"9" * 19, b"on"])
)


@settings(max_examples=100, deadline=None)
@given(st.lists(TEXTUAL, min_size=1, max_size=6))
def test_any_bytes_in_typed_columns_are_read_or_counted(cells: list[bytes | None]) -> None:
    names = ("price", "stock", "in_stock", "available", "updated_at", "deleted", "attributes")
    rows = [{**GOOD, "id": b"%d" % i, **dict.fromkeys(names, cell)} for i, cell in enumerate(cells)]
    run(as_table(rows, dict.fromkeys(names, pa.binary())))


WRAPPINGS = (pa.string(), pa.large_string(), pa.string_view(), pa.large_binary(), pa.binary_view(), pa.dictionary(pa.int32(), pa.string()))


@pytest.mark.parametrize("kind", WRAPPINGS, ids=str)
def test_text_is_the_same_in_every_arrow_wrapping(kind: pa.DataType) -> None:
    rows = [{**GOOD, "id": b"%d" % i, "title": title} for i, title in enumerate((b"a  b", None, "é\u200b".encode(), b"plain"))]
    names = ("id", "locale", "title", "brand", "description")
    plain = as_table(rows)
    wrapped = plain
    for name in names:
        cells = plain.column(name).combine_chunks().cast(pa.string())
        cells = cells.dictionary_encode() if pa.types.is_dictionary(kind) else cells.cast(kind)
        wrapped = wrapped.set_column(wrapped.column_names.index(name), name, cells)
    assert run(wrapped).products.equals(run(plain).products)
    assert run(wrapped).repaired == run(plain).repaired


def any_type_arrays() -> list[pa.Array]:
    """Two values and a null of every kind of type that a source may hand over."""
    one = dt.datetime(2026, 1, 1)  # noqa: DTZ001 - Arrow adds the zone
    plain: list[tuple[list[Any], pa.DataType]] = [
        *(([1, 0, None], kind) for kind in (pa.int8(), pa.uint8(), pa.int16(), pa.int32(), pa.uint32(), pa.int64(), pa.uint64())),
        *(([1.5, float("nan"), None], kind) for kind in (pa.float16(), pa.float32(), pa.float64())),
        *(
            ([decimal.Decimal("1.50"), decimal.Decimal(-2), None], kind)
            for kind in (pa.decimal32(5, 2), pa.decimal128(20, 5), pa.decimal256(60, 3))
        ),
        *(([one, one, None], pa.timestamp(unit, zone)) for unit in ("s", "ms", "us", "ns") for zone in (None, "Europe/Berlin", "+05:30")),
        *(([dt.date(2026, 1, 1), dt.date(1, 1, 1), None], kind) for kind in (pa.date32(), pa.date64())),
        *(([dt.time(1, 2), dt.time(), None], kind) for kind in (pa.time32("s"), pa.time64("ns"))),
        ([dt.timedelta(1), dt.timedelta(-1), None], pa.duration("us")),
        ([(1, 2, 3), (0, 0, 0), None], pa.month_day_nano_interval()),
        ([True, False, None], pa.bool_()),
        ([None, None, None], pa.null()),
        ([b"ab", b"\xff\xff", None], pa.binary(2)),
        ([[1], [], None], pa.list_(pa.int64())),
        ([[1], [], None], pa.large_list(pa.int64())),
        ([[1, 2], [3, None], None], pa.list_(pa.int64(), 2)),
        ([[1], [], None], pa.list_view(pa.int64())),
        ([{"key": 1, "x": [2]}, {}, None], pa.struct([("key", pa.int64()), ("x", pa.list_(pa.int64()))])),
        (
            [[{"key": None, "value": {"y": 1}}], [], None],
            pa.large_list(pa.struct([("key", pa.string()), ("value", pa.struct([("y", pa.int8())]))])),
        ),
        ([[(1, 2.5)], [], None], pa.map_(pa.int32(), pa.float32())),
        ([bytes(16), b"0123456789abcdef", None], pa.uuid()),
        (['{"a": 1}', "[", None], pa.json_()),
    ]
    arrays = [pa.array(values, kind) for values, kind in plain]
    union = pa.UnionArray.from_dense(pa.array([0, 1, 0], pa.int8()), pa.array([0, 0, 1], pa.int32()), [pa.array(["a", "b"]), pa.array([1])])
    return [*arrays, union, pa.array([1, 2, None]).dictionary_encode(), pa.array([["a"], None, ["a"]])]


@pytest.mark.parametrize("cells", any_type_arrays(), ids=lambda cells: str(cells.type))
def test_any_arrow_type_in_any_column_is_converted_or_counted(cells: pa.Array) -> None:
    table = as_table([{**GOOD, "id": b"%d" % i} for i in range(3)])
    for place, name in enumerate(table.column_names):
        mixed = table.set_column(place, name, cells)
        done = run(mixed)
        assert done.rows_in == 3
        assert run(mixed.slice(1, 1)).rows_in == 1
        if name not in ("id", "_malformed"):
            assert done.products.num_rows == 3


def test_run_end_encoded_and_sliced_columns_are_read_as_their_values() -> None:
    titles = pa.RunEndEncodedArray.from_arrays([3, 5], ["first", "second"])
    table = pa.table(
        {"id": list("abcde"), "title": titles, "attributes": pa.array([[("k", i)] for i in "vwxyz"], pa.map_(pa.string(), pa.string()))}
    )
    batch = table.to_batches()[0].slice(2, 2)
    rows = run(batch).products.to_pylist()
    assert [(row["id"], row["title"], row["attributes"]) for row in rows] == [("c", "first", [("k", "x")]), ("d", "second", [("k", "y")])]


def test_bytes_under_null_cells_do_not_leak() -> None:
    hidden = pa.Array.from_buffers(
        pa.string(), 2, [pa.py_buffer(b"\x02"), pa.py_buffer(np.array([0, 4, 6], np.int32)), pa.py_buffer(b"\xff\x00  ok")], null_count=1
    )
    done = run(pa.table({"id": ["a", "b"], "title": hidden, "brand": ["x", "y"]}))
    assert done.products["title"].to_pylist() == [None, "ok"]
    assert done.products["title"].chunk(0).buffers()[2].to_pybytes() == b"ok"
    assert not done.repaired


def test_blocks_are_invisible() -> None:
    count = BLOCK_ROWS * 2 + 5
    done = run(pa.table({"id": pa.array(range(count)), "title": pa.array(["", "x"] * (count // 2) + [""])}))
    assert done.products["id"].to_pylist() == [str(i) for i in range(1, count, 2)]
    assert done.rejected["row"].to_pylist() == list(range(0, count, 2))


def test_missing_columns_are_null_and_extra_columns_are_ignored() -> None:
    row = run(pa.table({"id": ["a"], "title": ["T"], "surprise": [[1]]})).products.to_pylist()[0]
    assert row == {"id": "a", "locale": "und", "title": "T", "attributes": None, "updated_at": None, "deleted": False} | dict.fromkeys(
        ("brand", "description", "price", "stock", "in_stock", "available")
    )
    assert run(pa.table({"title": ["T"]})).rejected["reason"].to_pylist() == ["null_id"]
    assert run(pa.table({"id": pa.array([], pa.string())})).rows_in == 0


def test_accepted_unsafe_ids_still_may_not_hide_characters() -> None:
    options = dataclasses.replace(OPTIONS, unsafe_ids="accept")
    names = ["gid://shopify/Product/1", "a b", "O'Brien", "-x", "a\u202eb", "", "a\u3000b"]
    done = run(pa.table({"id": names, "title": ["T"] * len(names)}), options)
    assert done.products["id"].to_pylist() == ["gid://shopify/Product/1", "a b", "O'Brien", "-x", "a\u3000b"]
    assert done.rejected["reason"].to_pylist() == ["control_id", "empty_id"]


def test_quarantine_shows_ids_escaped_and_excerpts_cut() -> None:
    records = run(pa.table({"id": texts([b"a\x1b[1m\xff", b"x" * 1000]), "title": ["T", "T"]})).rejected.to_pylist()
    assert [record["id"] for record in records] == ["a\\x1b[1m\\xff", "x" * 256]
    assert [record["excerpt"] for record in records] == [b"a\x1b[1m\xff", b"x" * 200]
    assert {record["field"] for record in records} == {"id"}


def test_row_without_text_keeps_its_good_id_in_quarantine() -> None:
    options = dataclasses.replace(OPTIONS, unsafe_ids="accept")
    record = run(pa.table({"id": ["a\u3000b"]}), options).rejected.to_pylist()[0]
    assert (record["id"], record["field"], record["reason"]) == ("a\u3000b", "title", "no_text")


@pytest.mark.parametrize(
    ("rule", "cells", "deleted"),
    [
        (DeletedRule(column="status", equals="gone"), ["gone", " gone ", "live", None], [True, True, False, False]),
        (DeletedRule(column="active", equals=False), [True, False, None], [False, True, False]),
        (DeletedRule(column="active", equals=False), ["yes", "no", "?"], [False, True, False]),
        (DeletedRule(column="state", equals=9), [9, 1, None], [True, False, False]),
        (DeletedRule(column="state", equals=9), ["9", "x", ""], [True, False, False]),
    ],
)
def test_tombstones_follow_the_rule_under_either_name(rule: DeletedRule, cells: list[Any], deleted: list[bool]) -> None:
    options = dataclasses.replace(OPTIONS, deleted=rule)
    for name in ("deleted", rule.column):
        table = pa.table({"id": [str(i) for i in range(len(cells))], "title": ["T"] * len(cells), name: cells})
        assert run(table, options).products["deleted"].to_pylist() == deleted


def test_attribute_columns_and_attributes_of_any_shape_give_one_map() -> None:
    rows: list[dict[str, Any]] = [{"b": 2, "a": "x"}, {"a": "y"}, {}]
    expected = [[("a", "x"), ("b", "2")], [("a", "y")], None]
    ids, title = ["1", "2", "3"], ["T"] * 3
    shapes = (
        pa.array([json.dumps(row) for row in rows]),
        pa.array(rows, pa.struct([("b", pa.int64()), ("a", pa.string())])),
        pa.array([[(k, str(v)) for k, v in row.items()] for row in rows], pa.map_(pa.string(), pa.string())),
        pa.array([json.dumps(row) for row in rows]).dictionary_encode(),
    )
    for shape in shapes:
        assert run(pa.table({"id": ids, "title": title, "attributes": shape})).products["attributes"].to_pylist() == expected
    columns = pa.table({"id": ids, "title": title, "attributes.b": pa.array([2, None, None]), "attributes.a": ["x", "y", ""]})
    assert run(columns).products["attributes"].to_pylist() == expected


def test_schema_without_attributes_or_text_asks_for_neither() -> None:
    bare = NormalizeOptions(schema=ProductSchema(text=(), attributes=False), deleted=None, now=NOW, non_negative=())
    done = run(pa.table({"id": ["a"], "attributes": ["{"]}), bare)
    assert done.products.to_pylist() == [{"id": "a", "locale": "und", "updated_at": None, "deleted": False}]
    assert not done.repaired


@pytest.mark.parametrize(
    "wrong",
    [
        {"now": dt.datetime(2026, 1, 1)},  # noqa: DTZ001 - the missing zone is the point
        {"default_locale": "de_DE"},
        {"unsafe_ids": "perhaps"},
        {"max_text_bytes": 0},
        {"non_negative": ("prize",)},
        {"non_negative": ("brand",)},
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="|".join(str(value) for value in wrong) and next(iter(wrong))):
        dataclasses.replace(OPTIONS, **wrong)


# Text repair, against the Unicode database and over every code point there is.


STRIPPED_POINTS = {
    point
    for ranges in (sanitize.CONTROLS, sanitize.BIDIS, sanitize.ZERO_WIDTHS)
    for first, last in ranges
    for point in range(first, last + 1)
}


def naive(text: str) -> str | None:
    """Clean one text the plain way: strip, squeeze, trim, compose."""
    kept = "".join(character for character in text if ord(character) not in STRIPPED_POINTS)
    return unicodedata.normalize("NFC", " ".join(kept.split())) or None


def test_every_assigned_code_point_is_cleaned_as_the_naive_twin_cleans_it() -> None:
    # A code point that this Python does not know yet may be known to Arrow, so only assigned ones are compared.
    known = [f"a{c}b" for c in map(chr, range(0x110000)) if unicodedata.category(c) not in ("Cn", "Cs")]
    cleaned = sanitize.clean_text(pa.array(known).cast(pa.binary()), max_bytes=64, repaired=Counter()).to_pylist()
    assert [(given, found) for given, found in zip(known, cleaned, strict=True) if found != naive(given)] == []


def test_nothing_that_unicode_calls_a_control_or_bidi_format_survives() -> None:
    formats = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    bad = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) == "Cc" or unicodedata.bidirectional(c) in formats]
    assert len(bad) >= 65 + 9
    cleaned = sanitize.clean_text(pa.array([f"a{c}b" for c in bad]).cast(pa.binary()), max_bytes=64, repaired=Counter())
    assert set(cleaned.to_pylist()) == {"ab", "a b"}


@settings(max_examples=300, deadline=None)
@given(
    st.text(
        alphabet="ab \n\u00a0\u00ad\u0301\u0327\u0342\u061c\u093c\u0915\u1112\u1161\u11ab\u2000\u200b\u200d\u2126\u3099かが\ufeff𝅘𝅥\x00é",
        max_size=12,
    )
)
def test_any_mix_of_marks_is_cleaned_as_the_naive_twin_cleans_it(text: str) -> None:
    assert sanitize.clean_text(texts([text.encode()]), max_bytes=200, repaired=Counter())[0].as_py() == naive(text)


def test_ranges_called_composed_are_untouched_by_nfc() -> None:
    seconds = set(range(0x1161, 0x1176)) | set(range(0x11A8, 0x11C3))  # Hangul vowels and finals compose by rule
    for point in range(0x110000):
        parts = unicodedata.decomposition(chr(point)).split()
        if len(parts) == 2 and not parts[0].startswith("<"):
            seconds.add(int(parts[1], 16))
    for first, last in sanitize.COMPOSED:
        for point in range(first, last + 1):
            character = chr(point)
            assert point not in seconds, hex(point)
            assert unicodedata.combining(character) == 0, hex(point)
            assert unicodedata.is_normalized("NFC", character), hex(point)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=20), min_size=1, max_size=5))
def test_decoding_is_what_python_calls_replacement(cells: list[bytes]) -> None:
    assert sanitize.decode(texts(list(cells)), Counter()).to_pylist() == [cell.decode("utf-8", "replace") for cell in cells]


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40), st.integers(16, 40))
def test_cut_text_is_a_prefix_within_the_limit(text: str, limit: int) -> None:
    loose, tight = (sanitize.clean_text(texts([text.encode()]), max_bytes=size, repaired=Counter())[0].as_py() for size in (10_000, limit))
    assert (loose is None) == (tight is None)
    if loose is not None:
        assert loose.startswith(tight)
        assert len(tight.encode()) <= limit
        assert len(loose.encode()) <= limit or len(tight.encode()) > limit - 4 or loose[len(tight)] == " "


# The columnar JSON path, held to the standard library.

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
DOCUMENTS = st.dictionaries(st.text(max_size=4), SCALARS | st.lists(SCALARS, max_size=2), max_size=4)
BROKEN = st.text(alphabet='{}[]:," \\ue1.-0tn\n', max_size=14)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(DOCUMENTS, st.booleans(), st.sampled_from([None, 2])).map(lambda t: json.dumps(t[0], ensure_ascii=t[1], indent=t[2]))
        | BROKEN,
        min_size=1,
        max_size=5,
    )
)
def test_columnar_json_equals_the_standard_library(documents: list[str]) -> None:
    documents = [document.encode("utf-8", "replace").decode() for document in documents]
    cells = pa.array(documents, pa.string())
    fast, slow = Counter[str](), Counter[str]()
    members = parse_objects(cells, repaired=fast)
    twin = parse_one_by_one(cells, repaired=slow)
    found = sorted(
        (
            (row, place, k, v)
            for part in members
            for place, (row, k, v) in enumerate(zip(part.rows, part.keys.to_pylist(), part.values.to_pylist(), strict=True))
        ),
        key=lambda item: item[:2],
    )
    assert [(row, k, v) for row, _, k, v in found] == list(zip(twin.rows, twin.keys.to_pylist(), twin.values.to_pylist(), strict=True))
    assert fast == slow
