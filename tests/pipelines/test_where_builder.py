"""A filter that a program builds fits the table or is refused with advice, and cannot be misused without an error."""

from __future__ import annotations

import functools
import itertools
import math
import operator
import re
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipelines.errors import InputError
from pipelines.where import MAX_CHECKS, MAX_LISTED, Filter, col, parse_where
from tests.pipelines.test_where import COLUMNS

price, brand, stock, pieces, listed = col("price"), col("brand"), col("stock"), col("pieces"), col("listed")


@pytest.mark.parametrize(
    ("built", "text"),
    [
        (price < 80, "price < 80"),
        (80 > price, "price < 80"),  # noqa: SIM300  the reflected comparison is what is tested
        (price.between(10, 20.5), "price >= 10 and price <= 20.5"),
        (brand.is_in(["A", "B"]), "brand in ('A', 'B')"),
        (brand.is_in(pa.array(["A"])), "brand in ('A')"),
        (pieces.is_in(np.array([1, 2])), "pieces in (1, 2)"),
        (pieces.is_in(iter((1, 2))), "pieces in (1, 2)"),
        (~brand.is_in(["A"]), "brand not in ('A')"),
        (stock & (price < 80), "stock and price < 80"),
        (~stock | brand.is_null(), "not stock or brand is null"),
        (price == np.float32(0.5), "price = 0.5"),
        (np.float64(0.5) < price, "price > 0.5"),
        (pieces != np.int32(7), "pieces != 7"),
        (listed >= date(2026, 1, 2), "listed >= '2026-01-02'"),
        (listed < datetime(2026, 1, 2, 3, tzinfo=timezone(timedelta(hours=1))), "listed < '2026-01-02T02:00:00Z'"),
        (listed == datetime(2026, 1, 2), "listed = '2026-01-02T00:00:00+00:00'"),  # noqa: DTZ001  without a zone it is UTC
        (listed == "2026-01-02", "listed = '2026-01-02'"),
        (brand == "' or 1=1 --", "brand = ''' or 1=1 --'"),
        ((price < 80).or_null(), "price < 80 or price is null"),
        (~(price < 80).or_null(), "price >= 80 and price is not null"),
        (stock.or_null(), "stock or stock is null"),
        (col('odd "name').is_not_null(), '"odd ""name" is not null'),
    ],
)
def test_what_is_built_is_what_the_text_says(built: Any, text: str) -> None:
    assert built.filter(COLUMNS) == parse_where(text, COLUMNS)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: col("brnad") == "x", "unknown column 'brnad' in the filter. Did you mean `brand`?"),
        (lambda: col("zzz").is_null(), "There are: brand, listed"),
        (lambda: price < "cheap", "`price` is a number, and 'cheap' is none."),
        (lambda: operator.le(price, math.nan), "`price` is a number, and nan is none."),
        (lambda: math.inf > price, "`price` is a number, and inf is none."),
        (lambda: price == 10**400, "`price` is a number"),
        (lambda: price == True, "`price` is a number, and True is none."),  # noqa: E712
        (lambda: price == Decimal("1.5"), "`price` is a number, and Decimal('1.5') is none."),
        (lambda: price == np.array([1.0, 2.0]), "`price` is a number, and array([1., 2.]) is none."),
        (lambda: pieces == 1.0, "`pieces` is a whole number, and 1.0 is none."),
        (lambda: pieces == 2**63, "`pieces` is a whole number"),
        (lambda: pieces.is_in([1, "2"]), "`pieces` is a whole number, and '2' is none."),
        (lambda: brand == 5, "`brand` is a text"),
        (lambda: brand == b"Acme", "`brand` is a text"),
        (lambda: brand == "\ud800", "`brand` is a text"),
        (lambda: stock == "true", "`stock` is true or false"),
        (lambda: stock < True, "has no order"),
        (lambda: ~brand, "`brand` is a text"),
        (lambda: listed > "yesterday", "`listed` is a time"),
        (lambda: listed > "0001-01-01T00:00:00+14:00", "`listed` is a time"),
        (lambda: brand == None, "nothing equals null: write col('brand').is_null()"),  # noqa: E711
        (lambda: brand.is_in(["A", None]), "nothing equals null"),
        (lambda: brand.is_in([]), "is_in` of no values passes no row"),
        (lambda: brand.is_in("Acme"), 'is_in(["Acme"]) for one'),
        (lambda: brand.is_in(5), "takes a list of values"),  # type: ignore[arg-type]
        (lambda: pieces.is_in(itertools.count()), f"more than {MAX_LISTED} values"),
        (lambda: price.between(20, 10), "passes no row: the first value is the smaller one"),
        (lambda: price.between(10, "b"), "takes two values of one type"),
        (lambda: col(5), "a column is named by a text"),  # type: ignore[arg-type]
        (lambda: functools.reduce(operator.or_, [pieces == number for number in range(5000)]), f"more than {MAX_CHECKS} comparisons"),
        (lambda: functools.reduce(lambda one, _: ~one, range(5000), pieces == 1), f"more than {MAX_CHECKS} comparisons"),
        (lambda: functools.reduce(lambda one, _: (one & stock) | stock, range(40), pieces == 1), "too large or nested too deeply"),
    ],
)
def test_what_does_not_fit_is_refused_with_advice(use: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        use().filter(COLUMNS)


@pytest.mark.parametrize(
    "use",
    [
        lambda: (price < 80) and (brand == "A"),
        lambda: (price < 80) or (brand == "A"),
        lambda: not price < 80,
        lambda: not stock,
        lambda: 10 <= price <= 20,
        lambda: [1] if price < 80 else [],
        lambda: bool(stock),
        lambda: price < 80 & stock,
        lambda: brand == "A" | stock,
        lambda: (price < 80) & "stock",
        lambda: (price < 80) == True,  # noqa: E712
        lambda: (price < 80) != (stock == True),  # noqa: E712
        lambda: (price < 80) > 3,
        lambda: price == brand,
        lambda: brand == (price < 80),
        lambda: "A" in brand,
        lambda: brand in ("A", "B"),
        lambda: (price < 80) in [price < 80, stock == True],  # noqa: E712
        lambda: [*brand],
        lambda: max(price, pieces),
        lambda: sorted([price < 1, price < 2]),
    ],
)
def test_python_s_own_words_raise_in_place_of_a_wrong_filter(use: Callable[[], Any]) -> None:
    with pytest.raises(InputError):
        use()


def test_an_expression_is_no_key_of_a_set() -> None:
    for item in (price, price < 80):
        with pytest.raises(TypeError, match="unhashable"):
            hash(item)


def test_an_expression_shows_what_it_asks() -> None:
    built = (~((price < 80) & brand.is_in(["A"]))).or_null()
    assert repr(built) == "(~((col('price') < 80) & (col('brand').is_in(['A'])))).or_null()"
    assert len(repr(brand.is_in(["x" * 50] * 500))) < 100


def test_the_largest_filters_still_work() -> None:
    built = functools.reduce(operator.or_, [pieces == number for number in range(MAX_CHECKS)])
    assert built.filter(COLUMNS) == parse_where(" or ".join(f"pieces = {number}" for number in range(MAX_CHECKS)), COLUMNS)
    table = pa.table({"pieces": pa.array([5, None, MAX_LISTED])})
    where = pieces.is_in([*range(MAX_LISTED)]).filter(COLUMNS)
    assert table.filter(where.expression).column("pieces").to_pylist() == [5]


def test_one_expression_serves_tables_of_other_types() -> None:
    built = (price < 80).or_null()
    for kind in (pa.int64(), pa.float64(), pa.float32()):
        table = pa.table({"price": pa.array([79, 80, None], kind)})
        assert table.filter(built.filter({"price": kind}).expression).column("price").to_pylist() == [79, None]


def test_a_filter_has_a_key_that_tells_it_from_others() -> None:
    made = [(price < 80), (price <= 80), (price < 80).or_null(), (pieces < 80), (brand == "80"), (brand == "a, b"), brand.is_in(["a", "b"])]
    assert len({item.filter(COLUMNS).key for item in made}) == len(made)
    assert isinstance(made[0].filter(COLUMNS), Filter)
    assert (listed == datetime(2026, 1, 1, tzinfo=UTC)).filter(COLUMNS).key == parse_where("listed = '2026-01-01'", COLUMNS).key


def test_an_unknown_null_policy_is_refused() -> None:
    unknown: Any = "skip"
    with pytest.raises(InputError, match="Use `drop`"):
        parse_where("stock", COLUMNS, nulls=unknown)
    with pytest.raises(InputError, match="Use `drop`"):
        stock.filter(COLUMNS, nulls=unknown)
