"""A filter means what SQL says about it, whatever is in its texts; what does not fit the columns is refused with a place."""

from __future__ import annotations

import contextlib
import operator
import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, cast

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.errors import InputError
from pipelines.schema import TIMESTAMP
from pipelines.where import MAX_CHARS, MAX_CHECKS, MAX_DEPTH, MAX_LISTED, Expression, Filter, col, parse_where

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
# One filter three times: as a text, as a program builds it, and as a rule with three truth values.
Made = tuple[str, Expression, Rule]


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
def checks(draw: st.DrawFn) -> Made:
    """One comparison."""
    column = draw(st.sampled_from(sorted(COLUMNS)))
    value = st.sampled_from(VALUES[column])
    form = draw(st.sampled_from(["compare", "in", "not in", "is null", "is not null"]))
    name, built = spelled(column), col(column)
    if form == "compare":
        sign = draw(st.sampled_from(["=", "!=", "<>"] if column == "stock" else sorted(OPERATORS)))
        wanted = draw(value)
        rule: Rule = lambda row: None if row[column] is None else OPERATORS[sign](row[column], wanted)  # noqa: E731
        return f"{name} {sign} {literal(wanted)}", cast("Expression", OPERATORS[sign](built, wanted)), rule
    if form in ("in", "not in"):
        listed = draw(st.lists(value, min_size=1, max_size=3))
        text = f"{name} {form} ({', '.join(literal(item) for item in listed)})"
        member = built.is_in(listed)
        return (
            text,
            member if form == "in" else ~member,
            lambda row: None if row[column] is None else (row[column] in listed) == (form == "in"),
        )
    absent = built.is_null() if form == "is null" else built.is_not_null()
    return f"{name} {form.upper()}", absent, lambda row: (row[column] is None) == (form == "is null")


def both(one: bool | None, other: bool | None) -> bool | None:
    return False if one is False or other is False else None if one is None or other is None else True


def negated(one: bool | None) -> bool | None:
    return None if one is None else not one


def joined(pair: tuple[Made, str, Made]) -> Made:
    (left, one, first), word, (right, other, second) = pair
    if word == "and":
        return f"({left} and {right})", one & other, lambda row: both(first(row), second(row))
    return f"({left} OR {right})", one | other, lambda row: negated(both(negated(first(row)), negated(second(row))))


FILTERS = st.recursive(
    checks(),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["and", "or"]), inner).map(joined),
        inner.map(lambda one: (f"not ({one[0]})", ~one[1], lambda row: negated(one[2](row)))),
    ),
    max_leaves=6,
)
# A null policy anywhere in a filter; a text has no word for it, so these have none.
POLICIES = st.recursive(
    FILTERS,
    lambda inner: st.one_of(
        inner.map(lambda one: ("", one[1].or_null(), lambda row: one[2](row) is not False)),
        st.tuples(inner, st.sampled_from(["and", "or"]), inner).map(joined),
        inner.map(lambda one: ("", ~one[1], lambda row: negated(one[2](row)))),
    ),
    max_leaves=3,
)
ROWS = st.lists(st.fixed_dictionaries({name: st.sampled_from([None, *values]) for name, values in VALUES.items()}), min_size=1, max_size=12)


def left_by(made: Filter, table: pa.Table) -> Any:
    return table.filter(made.expression).to_pylist()


@settings(max_examples=150, deadline=None)
@given(made=FILTERS, rows=ROWS)
def test_a_filter_keeps_the_rows_that_three_valued_logic_keeps(made: Made, rows: list[dict[str, Any]]) -> None:
    text, built, rule = made
    table = pa.Table.from_pylist(rows, pa.schema(list(COLUMNS.items())))
    surely = [row for row in table.to_pylist() if rule(row) is True]
    perhaps = [row for row in table.to_pylist() if rule(row) is not False]
    assert left_by(parse_where(text, COLUMNS), table) == left_by(built.filter(COLUMNS), table) == surely
    assert left_by(parse_where(text, COLUMNS, nulls="keep"), table) == left_by(built.filter(COLUMNS, nulls="keep"), table) == perhaps


@settings(max_examples=150, deadline=None)
@given(made=POLICIES, rows=ROWS)
def test_a_null_policy_means_the_same_inside_of_any_filter(made: Made, rows: list[dict[str, Any]]) -> None:
    _, built, rule = made
    table = pa.Table.from_pylist(rows, pa.schema(list(COLUMNS.items())))
    assert left_by(built.filter(COLUMNS), table) == [row for row in table.to_pylist() if rule(row) is True]


@settings(max_examples=150, deadline=None)
@given(made=FILTERS)
def test_text_and_builder_make_one_tree_whose_text_reads_back(made: Made) -> None:
    parsed, built = parse_where(made[0], COLUMNS), made[1].filter(COLUMNS)
    assert (parsed, parsed.key) == (built, built.key)
    assert parse_where(parsed.text, COLUMNS) == parsed


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
def test_what_an_engine_receives_stays_small(made: Made) -> None:
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
