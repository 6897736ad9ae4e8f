"""A filter means what SQL says about it, whatever is in its texts; what does not fit the columns is refused with a place."""

from __future__ import annotations

import contextlib
import operator
import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.errors import InputError
from pipelines.schema import TIMESTAMP
from pipelines.where import MAX_CHARS, MAX_CHECKS, MAX_DEPTH, MAX_LISTED, parse_where

COLUMNS = {
    "brand": pa.string(),
    "price": pa.float64(),
    "pieces": pa.int64(),
    "stock": pa.bool_(),
    "listed": TIMESTAMP,
    'odd "name': pa.string(),
}
TEXTS = ["Acme", "O'Hara", "' or 1=1 --", '"', "", "東京", "a\\' b", "%", "null", "NULL; drop table x"]
VALUES: dict[str, list[Any]] = {
    "brand": TEXTS,
    "price": [-1.5, 0.0, 9.99, 80.0],
    "pieces": [-3, 0, 7],
    "stock": [True, False],
    "listed": [datetime(2026, 1, day, tzinfo=UTC) for day in (1, 2, 3)],
    'odd "name': TEXTS[:3],
}
OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<>": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
Rule = Callable[[dict[str, Any]], bool | None]


def literal(value: Any) -> str:
    """Spell a value as a filter has it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, datetime):
        return f"'{value.isoformat()}'"
    return "'{}'".format(value.replace("'", "''")) if isinstance(value, str) else repr(value)


def spelled(column: str) -> str:
    return column if column.isidentifier() else '"{}"'.format(column.replace('"', '""'))


@st.composite
def checks(draw: st.DrawFn) -> tuple[str, Rule]:
    """One comparison, as text and as a rule with three truth values."""
    column = draw(st.sampled_from(sorted(COLUMNS)))
    value = st.sampled_from(VALUES[column])
    form = draw(st.sampled_from(["compare", "in", "not in", "is null", "is not null"]))
    name = spelled(column)
    if form == "compare":
        sign = draw(st.sampled_from(["=", "!=", "<>"] if column == "stock" else sorted(OPERATORS)))
        wanted = draw(value)
        return f"{name} {sign} {literal(wanted)}", lambda row: None if row[column] is None else OPERATORS[sign](row[column], wanted)
    if form in ("in", "not in"):
        listed = draw(st.lists(value, min_size=1, max_size=3))
        text = f"{name} {form} ({', '.join(literal(item) for item in listed)})"
        return text, lambda row: None if row[column] is None else (row[column] in listed) == (form == "in")
    return f"{name} {form.upper()}", lambda row: (row[column] is None) == (form == "is null")


def both(one: bool | None, other: bool | None) -> bool | None:
    return False if one is False or other is False else None if one is None or other is None else True


def negated(one: bool | None) -> bool | None:
    return None if one is None else not one


def joined(pair: tuple[tuple[str, Rule], str, tuple[str, Rule]]) -> tuple[str, Rule]:
    (left, first), word, (right, second) = pair
    if word == "and":
        return f"({left} and {right})", lambda row: both(first(row), second(row))
    return f"({left} OR {right})", lambda row: negated(both(negated(first(row)), negated(second(row))))


FILTERS = st.recursive(
    checks(),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["and", "or"]), inner).map(joined),
        inner.map(lambda one: (f"not ({one[0]})", lambda row: negated(one[1](row)))),
    ),
    max_leaves=6,
)
ROWS = st.lists(st.fixed_dictionaries({name: st.sampled_from([None, *values]) for name, values in VALUES.items()}), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(made=FILTERS, rows=ROWS)
def test_a_filter_keeps_the_rows_that_three_valued_logic_keeps(made: tuple[str, Rule], rows: list[dict[str, Any]]) -> None:
    text, rule = made
    table = pa.Table.from_pylist(rows, pa.schema(list(COLUMNS.items())))
    found = table.filter(parse_where(text, COLUMNS).expression)
    assert found.to_pylist() == [row for row in table.to_pylist() if rule(row) is True]


def kept(text: str) -> list[str]:
    rows = [
        {"brand": "Acme", "price": 10.0, "pieces": 1, "stock": True, "listed": datetime(2026, 1, 1, tzinfo=UTC)},
        {"brand": "O'Hara", "price": 90.0, "pieces": None, "stock": False, "listed": datetime(2026, 2, 1, tzinfo=UTC)},
        {"brand": None, "price": None, "pieces": 3, "stock": None, "listed": None},
    ]
    table = pa.Table.from_pylist(rows, pa.schema(list(COLUMNS.items())))
    return [str(name) for name in table.filter(parse_where(text, COLUMNS).expression).column("brand").to_pylist()]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("brand = 'O''Hara'", ["O'Hara"]),
        ("brand != 'Acme'", ["O'Hara"]),
        ("not (brand = 'Acme')", ["O'Hara"]),
        ("NOT brand NOT IN ('Acme')", ["Acme"]),
        ("brand is null or price<80", ["Acme", "None"]),
        ("price < 80 and stock", ["Acme"]),
        ("not stock", ["O'Hara"]),
        ("price >= -1e3 and price <= +9.0e1", ["Acme", "O'Hara"]),
        ("price > 10", ["O'Hara"]),
        ("pieces in (1, 3)", ["Acme", "None"]),
        ("listed > '2026-01-15'", ["O'Hara"]),
        ("listed = '2026-01-01T01:00:00+01:00'", ["Acme"]),
        ("brand = 'Acme' or brand = 'x' and price = 1", ["Acme"]),
        ('"odd ""name" is null', ["Acme", "O'Hara", "None"]),
    ],
)
def test_examples_of_filters(text: str, names: list[str]) -> None:
    assert kept(text) == names


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the filter is empty"),
        ("  ", "the filter is empty"),
        ("brnad = 'x'", "unknown column 'brnad' at position 1 of the filter. Did you mean `brand`?"),
        ("zzz = 1", "There are: brand, listed"),
        ("price < 'cheap'", "`price` is a number, and 'cheap' at position 9 of the filter is none"),
        ("brand = 5", "`brand` is a text (in single quotes), and '5'"),
        ("pieces = 1.5", "`pieces` is a whole number"),
        ("pieces = 9223372036854775808", "`pieces` is a whole number"),
        ("price < 1e999", "`price` is a number"),
        ("stock = 'true'", "`stock` is true or false"),
        ("stock < true", "has no order"),
        ("listed > 'yesterday'", "`listed` is a time"),
        ("brand = null", "write `brand is null` at position 9"),
        ("brand in ('a', null)", "nothing equals null"),
        ("brand in ()", "expected a value"),
        ("brand = Acme", "expected a value (texts stand in single quotes) at position 9 of the filter, but there is 'Acme'"),
        ("brand = 'Acme", "a quote that is never closed at position 9"),
        ("brand = 'a' 'b'", "expected `and`, `or` or the end at position 13"),
        ("(brand = 'a'", "expected `)` at position 13 of the filter, but the filter ends"),
        ("brand", "expected a comparison"),
        ("brand not = 'a'", "expected a comparison"),
        ("brand = 'a' and", "expected a column at position 16"),
        ("brand = 'a'; drop table x", "a character or number that no filter has at position 12: '; drop table x'"),
        ("price = 12abc", "a character or number"),
        ("price = 1.2.3", "a character or number"),
        ("brand = brand", "expected a value"),
        ("lower(brand) = 'a'", "unknown column 'lower'"),
        ("1 = 1", "expected a column"),
        ("brand like 'a%'", "expected a comparison"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_place(text: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        parse_where(text, COLUMNS)


@pytest.mark.parametrize(
    "text",
    [
        "(" * (MAX_DEPTH + 1) + "stock" + ")" * (MAX_DEPTH + 1),
        "not " * 5_000 + "stock",
        "(stock and (pieces = 1 or " * 8 + "stock" + "))" * 8,
        " or ".join(["stock"] * (MAX_CHECKS + 1)),
        f"pieces in ({','.join(['1'] * (MAX_LISTED + 1))})",
        "brand = '" + "x" * MAX_CHARS + "'",
    ],
)
def test_a_filter_has_bounds(text: str) -> None:
    with pytest.raises(InputError):
        parse_where(text, COLUMNS)


def test_the_largest_filters_still_work() -> None:
    assert kept("(" * (MAX_DEPTH - 1) + "stock" + ")" * (MAX_DEPTH - 1)) == ["Acme"]
    assert kept(" or ".join(["stock"] * MAX_CHECKS)) == ["Acme"]
    assert kept("(stock or " * (MAX_DEPTH - 1) + "stock" + ")" * (MAX_DEPTH - 1)) == ["Acme"]
    assert kept(f"pieces in ({','.join(['1'] * MAX_LISTED)})") == ["Acme"]


@settings(max_examples=50, deadline=None)
@given(made=FILTERS)
def test_what_an_engine_receives_stays_small(made: tuple[str, Rule]) -> None:
    where = parse_where(made[0], COLUMNS)
    assert len(where.expression.to_substrait(pa.schema(list(COLUMNS.items())))) < 400 * (where.tree.weight + 8)


def test_a_filter_knows_its_columns() -> None:
    made = parse_where("brand = 'a' and (price < 1 or not stock) and brand is not null", COLUMNS)
    assert made.columns == {"brand", "price", "stock"}
    assert made == parse_where("brand='a' AND (price<1.0 OR NOT stock) AND brand IS NOT NULL", COLUMNS)


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet="brandpicesto 'nl()=<>!,.09-\"\\;\n", max_size=40))
def test_any_text_is_a_filter_or_an_input_error(text: str) -> None:
    with contextlib.suppress(InputError):
        assert parse_where(text, COLUMNS).columns <= {*COLUMNS}
