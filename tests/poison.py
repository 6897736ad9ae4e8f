"""The poison corpus: what real feeds do to a good row, and what must become of it. Data only; any pipeline test may use it."""

from __future__ import annotations

import datetime as dt
import decimal
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipelines.schema import ProductSchema

NOW = dt.datetime(2026, 6, 1, 12, 0, tzinfo=dt.UTC)
UPDATED = dt.datetime(2026, 5, 1, 8, 30, tzinfo=dt.UTC)

SCHEMA = ProductSchema(
    text=("title", "brand", "description"),
    filters={"brand": "string", "price": "float", "stock": "int", "in_stock": "bool", "available": "timestamp"},
)

# Text travels as bytes here, because a feed is bytes before it is text.
TYPES: Mapping[str, pa.DataType] = {
    "id": pa.binary(),
    "locale": pa.binary(),
    "title": pa.binary(),
    "brand": pa.binary(),
    "description": pa.binary(),
    "price": pa.float64(),
    "stock": pa.int64(),
    "in_stock": pa.bool_(),
    "available": pa.timestamp("us", "UTC"),
    "attributes": pa.map_(pa.binary(), pa.binary()),
    "updated_at": pa.timestamp("us", "UTC"),
    "deleted": pa.bool_(),
    "_malformed": pa.binary(),
}

GOOD: Mapping[str, Any] = {
    "id": b"SKU-1",
    "locale": b"de-DE",
    "title": "Größere Läufer".encode(),
    "brand": b"Nordwand",
    "description": b"Light and dry.",
    "price": 19.5,
    "stock": 3,
    "in_stock": True,
    "available": UPDATED,
    "attributes": [(b"color", b"red"), (b"size", b"M")],
    "updated_at": UPDATED,
    "deleted": False,
    "_malformed": None,
}


@dataclass(frozen=True, kw_only=True)
class Poison:
    """One kind: the cells it replaces, and either the quarantine reason or the repairs and the values they leave."""

    name: str
    cells: Mapping[str, Any]
    types: Mapping[str, pa.DataType] = field(default_factory=dict)
    reason: str | None = None
    repaired: Mapping[str, int] = field(default_factory=dict)
    expected: Mapping[str, Any] = field(default_factory=dict)

    @property
    def keeps_types(self) -> bool:
        """Whether the poisoned row fits a table of good rows."""
        return not self.types

    def apply(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return the row with this poison in it."""
        return {**row, **self.cells}

    def table(self) -> pa.Table:
        """Return one good row, poisoned."""
        return as_table([self.apply(GOOD)], self.types)


def as_table(rows: Iterable[Mapping[str, Any]], types: Mapping[str, pa.DataType] | None = None) -> pa.Table:
    """Lay rows out in the corpus' columns, some of them with another type."""
    rows = list(rows)
    return pa.table({name: pa.array([row.get(name) for row in rows], kind) for name, kind in {**TYPES, **(types or {})}.items()})


def rejected(name: str, reason: str, cells: Mapping[str, Any], **types: pa.DataType) -> Poison:
    """Describe a kind that ends in quarantine."""
    return Poison(name=name, cells=cells, types=types, reason=reason)


def textless(name: str, cells: Mapping[str, Any], repaired: Mapping[str, int]) -> Poison:
    """Describe a kind that has no text left once its cells are clean."""
    return Poison(name=name, cells=cells, reason="no_text", repaired=repaired)


def cured(name: str, repaired: str | Mapping[str, int], cell: tuple[str, Any, Any], kind: pa.DataType | None = None) -> Poison:
    """Describe a kind that is repaired in one column: (column, poison, what is left)."""
    column, value, left = cell
    counters = {repaired: 1} if isinstance(repaired, str) and repaired else repaired or {}
    assert not isinstance(counters, str)
    return Poison(name=name, cells={column: value}, types={column: kind} if kind else {}, repaired=counters, expected={column: left})


IDS = (
    rejected("null id", "null_id", {"id": None}),
    rejected("id column of nulls", "null_id", {"id": None}, id=pa.null()),
    rejected("empty id", "empty_id", {"id": b""}),
    rejected("blank id", "empty_id", {"id": b" \t\xc2\xa0"}),
    rejected("long id", "long_id", {"id": b"x" * 257}),
    rejected("Latin-1 id", "invalid_utf8_id", {"id": b"caf\xe9"}),
    rejected("surrogate in id", "invalid_utf8_id", {"id": b"a\xed\xa0\x80"}),
    rejected("overlong NUL in id", "invalid_utf8_id", {"id": b"a\xc0\x80"}),
    rejected("NUL in id", "control_id", {"id": b"a\x00b"}),
    rejected("escape sequence in id", "control_id", {"id": b"\x1b[31mred"}),
    rejected("newline in id", "control_id", {"id": b"a\nINFO forged"}),
    rejected("bidi override in id", "control_id", {"id": "a\u202eb".encode()}),
    rejected("zero-width space in id", "control_id", {"id": "a\u200bb".encode()}),
    rejected("path in id", "unsafe_id", {"id": b"a/b"}),
    rejected("path climbing in id", "unsafe_id", {"id": b"../../etc/passwd"}),
    rejected("dots alone as id", "unsafe_id", {"id": b".."}),
    rejected("Windows path in id", "unsafe_id", {"id": b"a\\b"}),
    rejected("SQL in id", "unsafe_id", {"id": b"x' OR '1'='1"}),
    rejected("double quote in id", "unsafe_id", {"id": b'a"b'}),
    rejected("backtick in id", "unsafe_id", {"id": b"a`id`"}),
    rejected("HTML in id", "unsafe_id", {"id": b"<script>"}),
    rejected("space in id", "unsafe_id", {"id": b"a b"}),
    rejected("no-break space in id", "unsafe_id", {"id": "a\u00a0b".encode()}),
    rejected("option as id", "unsafe_id", {"id": b"-rf"}),
    rejected("fractional id", "id_wrong_type", {"id": 12.5}, id=pa.float64()),
    rejected("NaN id", "id_wrong_type", {"id": float("nan")}, id=pa.float64()),
    rejected("float id past 2**53", "id_wrong_type", {"id": 2.0**60}, id=pa.float64()),
    rejected("boolean id", "id_wrong_type", {"id": True}, id=pa.bool_()),
    rejected("list id", "id_wrong_type", {"id": ["a"]}, id=pa.list_(pa.string())),
    rejected("date id", "id_wrong_type", {"id": dt.date(2026, 1, 1)}, id=pa.date32()),
    cured("float id", "id_from_float", ("id", 12.0, "12"), pa.float64()),
    cured("decimal id", "id_from_float", ("id", decimal.Decimal("12.00"), "12"), pa.decimal128(9, 2)),
    cured("integer id", "", ("id", 12, "12"), pa.int64()),
    cured("UUID id", "", ("id", bytes(range(16)), "00010203-0405-0607-0809-0a0b0c0d0e0f"), pa.uuid()),
)

TEXTS = (
    rejected("malformed line", "malformed_row", dict.fromkeys(GOOD) | {"_malformed": b'{"id": "a", '}),
    textless("no text", {"title": None, "brand": None, "description": b""}, {}),
    textless("invisible text", {"title": None, "brand": None, "description": " \u200b\n".encode()}, {"zero_width": 1, "whitespace": 1}),
    textless("text of controls", {"title": b"\x00\x01", "brand": None, "description": None}, {"control_characters": 1}),
    cured("Latin-1 title", "invalid_utf8", ("title", b"Gr\xf6\xdfe", "Gr\ufffd\ufffde")),
    cured("truncated UTF-8", "invalid_utf8", ("description", "naïve €".encode()[:-1], "naïve \ufffd")),
    cured("lone surrogate", "invalid_utf8", ("title", b"a\xed\xa0\xbdb", "a\ufffd\ufffd\ufffdb")),
    cured("overlong slash", "invalid_utf8", ("title", b"a\xc0\xafb", "a\ufffd\ufffdb")),
    cured("beyond Unicode", "invalid_utf8", ("title", b"a\xf4\x90\x80\x80", "a\ufffd\ufffd\ufffd\ufffd")),
    cured("NUL in text", "control_characters", ("title", b"a\x00b", "ab")),
    cured("terminal escape", "control_characters", ("description", b"\x1b[2Jgone", "[2Jgone")),
    cured("C1 control", "control_characters", ("title", "a\u0090b".encode(), "ab")),
    cured("DEL", "control_characters", ("title", b"a\x7fb", "ab")),
    cured("bidi override", "bidi_controls", ("title", "abc\u202egpj.exe".encode(), "abcgpj.exe")),
    cured("bidi isolate", "bidi_controls", ("brand", "\u2066Acme\u2069".encode(), "Acme")),
    cured("right-to-left mark", "bidi_controls", ("title", "עברית\u200f".encode(), "עברית")),
    cured("byte order mark", "zero_width", ("title", "\ufeffTitle".encode(), "Title")),
    cured("zero-width space", "zero_width", ("title", "wire\u200bless".encode(), "wireless")),
    cured("soft hyphen", "zero_width", ("title", "Wasch\u00admaschine".encode(), "Waschmaschine")),
    cured("smuggled tag characters", "zero_width", ("title", "ok\U000e0041\U000e0042".encode(), "ok")),
    cured("decomposed accent", "not_nfc", ("title", "Cafe\u0301".encode(), "Café")),
    cured("decomposed Hangul", "not_nfc", ("title", "\u1112\u1161\u11ab".encode(), "한")),
    cured("compatibility Kelvin", "not_nfc", ("title", "300 \u212a".encode(), "300 K")),
    cured("accent behind a zero-width space", {"zero_width": 1, "not_nfc": 1}, ("title", "e\u200b\u0301".encode(), "é")),
    cured("tabs and newlines", "whitespace", ("description", b"a\t\tb\r\nc", "a b c")),
    cured("ends with spaces", "whitespace", ("title", b"  Title ", "Title")),
    cured("no-break spaces", "whitespace", ("title", "a\u00a0\u00a0b\u3000c".encode(), "a b c")),
    cured("line separator", "whitespace", ("title", "a\u2028b".encode(), "a b")),
    cured("long text", "long_text", ("description", b"x" * 40_000, "x" * 32_768)),
    cured("long text cut inside a character", "long_text", ("description", ("x" + "é" * 20_000).encode(), "x" + "é" * 16_383)),
    cured("a megabyte of text", "long_text", ("description", "€uro ".encode() * 150_000 + b"x", ("€uro " * 4681).strip())),
    cured("emoji stay", "", ("title", "👩\u200d🚀 ok ❤️".encode(), "👩\u200d🚀 ok ❤️")),
    cured("spreadsheet formula stays", "", ("title", b'=HYPERLINK("x")', '=HYPERLINK("x")')),
    cured("markup stays", "", ("title", b"<b>{{7*7}}</b>", "<b>{{7*7}}</b>")),
    cured("integer as text", "text_from_scalar", ("title", 501, "501"), pa.int64()),
    cured("float as text", "text_from_scalar", ("brand", 3.0, "3"), pa.float64()),
    cured("list as text", "wrong_type", ("brand", ["a", "b"], None), pa.list_(pa.string())),
)

NUMBERS = (
    cured("NaN price", "not_finite", ("price", float("nan"), None)),
    cured("infinite price", "not_finite", ("price", float("-inf"), None)),
    cured("negative price", "negative_number", ("price", -1.0, None)),
    cured("negative zero", "", ("price", -0.0, 0.0)),
    cured("price as text", "number_from_text", ("price", "12.99", 12.99), pa.string()),
    cured("price as spaced text", "number_from_text", ("price", " +5 ", 5.0), pa.string()),
    cured("price in words", "bad_number", ("price", "on request", None), pa.string()),
    cured("price with a comma", "bad_number", ("price", "1.299,00", None), pa.string()),
    cured("price with a currency", "bad_number", ("price", "€12", None), pa.string()),
    cured("NaN as text", "not_finite", ("price", "NaN", None), pa.string()),
    cured("price past float64", "not_finite", ("price", "1e999", None), pa.string()),
    cured("empty price", "", ("price", "", None), pa.string()),
    cured("negative price as text", {"number_from_text": 1, "negative_number": 1}, ("price", "-3", None), pa.string()),
    cured("decimal price", "", ("price", decimal.Decimal("19.99"), 19.99), pa.decimal128(9, 2)),
    cured("boolean price", "wrong_type", ("price", True, None), pa.bool_()),
    cured("struct price", "wrong_type", ("price", {"EUR": 1}, None), pa.struct([("EUR", pa.int64())])),
    cured("fractional stock", "bad_number", ("stock", 2.5, None), pa.float64()),
    cured("stock as float", "", ("stock", 2.0, 2), pa.float64()),
    cured("stock past int64", "integer_overflow", ("stock", 2**64 - 1, None), pa.uint64()),
    cured("stock past int64 in text", "integer_overflow", ("stock", "9223372036854775808", None), pa.string()),
    cured("stock past int64 in float", "integer_overflow", ("stock", 1e19, None), pa.float64()),
    cured("largest stock in text", "number_from_text", ("stock", "9223372036854775807", 2**63 - 1), pa.string()),
    cured("yes as boolean", "bool_from_other", ("in_stock", "Yes", True), pa.string()),
    cured("zero as boolean", "bool_from_other", ("in_stock", 0, False), pa.int8()),
    cured("maybe as boolean", "bad_bool", ("in_stock", "maybe", None), pa.string()),
    cured("two as boolean", "bad_bool", ("in_stock", 2, None), pa.int64()),
)

TIMES = (
    cured("future update", "future_timestamp", ("updated_at", NOW + dt.timedelta(days=1), NOW)),
    cured("year 9999", "future_timestamp", ("updated_at", dt.datetime(9999, 12, 31, tzinfo=dt.UTC), NOW)),
    cured("slightly fast clock", "", ("updated_at", NOW + dt.timedelta(seconds=300), NOW + dt.timedelta(seconds=300))),
    cured("year 1", "ancient_timestamp", ("updated_at", dt.datetime(1, 1, 1, tzinfo=dt.UTC), None)),
    cured("time without a zone", "naive_timestamp", ("updated_at", UPDATED.replace(tzinfo=None), UPDATED), pa.timestamp("ms")),
    cured("time in another zone", "", ("updated_at", "2026-05-01T10:30:00+02:00", UPDATED), pa.string()),
    cured("epoch milliseconds", "timestamp_from_number", ("updated_at", int(UPDATED.timestamp() * 1000), UPDATED), pa.int64()),
    cured("epoch seconds in text", "timestamp_from_number", ("updated_at", str(int(UPDATED.timestamp())), UPDATED), pa.string()),
    cured("unreadable time", "bad_timestamp", ("updated_at", "yesterday", None), pa.string()),
    cured("30 February", "bad_timestamp", ("updated_at", "2026-02-30T00:00:00Z", None), pa.string()),
    cured("American date", "bad_timestamp", ("updated_at", "05/01/2026", None), pa.string()),
    cured("seconds past the calendar", "timestamp_overflow", ("updated_at", 2**60, None), pa.timestamp("s", "UTC")),
    cured("boolean time", "wrong_type", ("updated_at", True, None), pa.bool_()),
    cured("future availability stays", "", ("available", dt.datetime(2030, 1, 1, tzinfo=dt.UTC), dt.datetime(2030, 1, 1, tzinfo=dt.UTC))),
)

LOCALES = (
    cured("POSIX locale", "locale_form", ("locale", b"de_DE.UTF-8", "de-DE")),
    cured("lower-case region", "locale_form", ("locale", b"zh-hant-tw", "zh-Hant-TW")),
    cured("no locale", "bad_locale", ("locale", b"Deutsch (Schweiz)", "und")),
    cured("hostile locale", "bad_locale", ("locale", b"../../de", "und")),
    cured("null locale", "", ("locale", None, "und")),
)

MAP_OF_INTS = pa.map_(pa.string(), pa.list_(pa.int64()))
ATTRIBUTES = (
    cured("malformed JSON attributes", "bad_attributes", ("attributes", '{"a": ', None), pa.string()),
    cured("JSON array attributes", "bad_attributes", ("attributes", "[1, 2]", None), pa.string()),
    cured("two JSON documents", "bad_attributes", ("attributes", "{} {}", None), pa.string()),
    cured("JSON bomb", "bad_attributes", ("attributes", '{"a":' + "[" * 100_000, None), pa.string()),
    cured("number as attributes", "bad_attributes", ("attributes", 7, None), pa.int64()),
    cured("empty JSON attributes", "", ("attributes", "{}", None), pa.string()),
    cured(
        "JSON scalars", "", ("attributes", '{"c":2.50,"b":true,"a":-7,"d":null}', [("a", "-7"), ("b", "true"), ("c", "2.5")]), pa.string()
    ),
    cured("JSON huge integer", "", ("attributes", '{"n":' + "9" * 5000 + "}", [("n", "9" * 5000)]), pa.string()),
    cured("JSON NaN", "not_finite", ("attributes", '{"a":NaN,"b":"x"}', [("b", "x")]), pa.string()),
    cured("JSON half emoji", "invalid_utf8", ("attributes", '{"a":"\\ud83d!"}', [("a", "\ufffd!")]), pa.string()),
    cured("JSON escaped NUL", "control_characters", ("attributes", '{"a":"x\\u0000y"}', [("a", "xy")]), pa.string()),
    cured("nested JSON value", "nested_attribute", ("attributes", '{"a":[1],"b":"x"}', [("b", "x")]), pa.string()),
    cured("JSON key twice", "duplicate_attribute", ("attributes", '{"a":"1","a":"2"}', [("a", "2")]), pa.string()),
    cured("map key twice", "duplicate_attribute", ("attributes", [(b"a", b"1"), (b"a", b"2")], [("a", "2")])),
    cured(
        "keys equal once clean", {"duplicate_attribute": 1, "whitespace": 1}, ("attributes", [(b"a", b"1"), (b" a", b"2")], [("a", "2")])
    ),
    cured("unsorted keys", "", ("attributes", [(b"b", b"1"), (b"a", b"2")], [("a", "2"), ("b", "1")])),
    cured("empty values", "", ("attributes", [(b"a", b""), (b"b", None), (b"c", b"x")], [("c", "x")])),
    cured("empty key", "nameless_attribute", ("attributes", [(b"", b"1"), (b"b", b"x")], [("b", "x")])),
    cured("Latin-1 value", "invalid_utf8", ("attributes", [(b"a", b"\xe9")], [("a", "\ufffd")])),
    cured("bidi in a key", "bidi_controls", ("attributes", [("a\u202e".encode(), b"1")], [("a", "1")])),
    cured("nested map values", "nested_attribute", ("attributes", [("a", [1])], None), MAP_OF_INTS),
    cured(
        "too many attributes",
        "too_many_attributes",
        ("attributes", [(b"k%04d" % i, b"v") for i in range(300)], [(f"k{i:04d}", "v") for i in range(256)]),
    ),
    cured(
        "struct attributes",
        "",
        ("attributes", {"b": 1.0, "a": "x"}, [("a", "x"), ("b", "1")]),
        pa.struct([("b", pa.float64()), ("a", pa.string())]),
    ),
    cured(
        "list of pairs",
        "",
        ("attributes", [{"key": "b", "value": 2}, {"key": "a", "value": 1}], [("a", "1"), ("b", "2")]),
        pa.list_(pa.struct([("key", pa.string()), ("value", pa.int64())])),
    ),
)

TOMBSTONES = (
    Poison(
        name="bare tombstone",
        cells={**dict.fromkeys(GOOD), "id": b"SKU-1", "deleted": True},
        expected=dict.fromkeys(SCHEMA.fields) | {"locale": "und", "attributes": None, "updated_at": None, "deleted": True},
    ),
    cured("deleted in words", "bool_from_other", ("deleted", "yes", True), pa.string()),
    cured("unreadable tombstone stays live", "bad_bool", ("deleted", "soon", False), pa.string()),
    rejected("tombstone without an id", "null_id", {"id": None, "deleted": True}),
)

POISONS: tuple[Poison, ...] = (*IDS, *TEXTS, *NUMBERS, *TIMES, *LOCALES, *ATTRIBUTES, *TOMBSTONES)
