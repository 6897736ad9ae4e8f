"""Filters that a program writes: `(col("price") < 80) & col("brand").is_in(["Acme", "Nord"])`.

An expression names columns and values only. It meets a table's columns when it is used: then every value is checked
against the type of its column, and the tree is the one that the same filter as a text has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, date, datetime
from numbers import Integral, Real
from typing import Any, NoReturn

import pyarrow as pa

from pipelines.errors import InputError
from pipelines.where.tree import MAX_CHECKS, MAX_LISTED, Check, Filter, Group, Nulls, grouped, named, nearest, typed_values

Columns = Mapping[str, pa.DataType]

# Deeper than any filter that a person means; negations and null policies count, so that no chain of them overflows a stack.
_MAX_STEPS = 4 * MAX_CHECKS


class _Operand:
    """What `&`, `|` and `~` take: an expression, or a column of true or false that stands alone. It has no truth of its own."""

    __slots__ = ()
    # NumPy would otherwise spread `5 < col("price")` over arrays.
    __array_ufunc__ = None

    def __and__(self, other: object) -> Expression:
        return _joined(self, other, every=True)

    def __or__(self, other: object) -> Expression:
        return _joined(self, other, every=False)

    def __rand__(self, other: object) -> Expression:
        return _joined(other, self, every=True)

    def __ror__(self, other: object) -> Expression:
        return _joined(other, self, every=False)

    def __invert__(self) -> Expression:
        inner = _expression(self)
        return Expression(lambda columns: inner.tree(columns).opposite(), text=f"~({inner!r})", checks=inner.checks, steps=inner.steps + 1)

    def filter(self, columns: Columns, *, nulls: Nulls = "drop") -> Filter:
        """Check every name and value against these columns; what does not fit raises `InputError`."""
        return Filter.of(_expression(self).tree(columns), nulls)

    def or_null(self) -> Expression:
        """Pass also the rows for which a missing value leaves this open."""
        inner = _expression(self)
        return Expression(
            lambda columns: inner.tree(columns).keeping(), text=f"({inner!r}).or_null()", checks=inner.checks, steps=inner.steps + 1
        )

    def __bool__(self) -> NoReturn:
        raise InputError(
            f"`{self!r}` is a question about rows, neither true nor false by itself. Join tests with & | ~ in place of and, or, not; "
            'write a range as col("price").between(10, 20), not as 10 <= col("price") <= 20.'
        )

    def __contains__(self, item: object) -> NoReturn:
        raise InputError(f'`in` asks nothing of `{self!r}`. Write col("brand").is_in(["Acme", "Nord"]).')

    def __iter__(self) -> NoReturn:
        raise InputError(f"`{self!r}` is a question about rows and has no values to go through. Search with it as `where`.")


class Expression(_Operand):
    """A test, or tests joined by & | ~. Give it to a search as `where`."""

    __slots__ = ("_text", "_tree", "checks", "steps")

    def __init__(self, tree: Callable[[Columns], Check | Group], *, text: str, checks: int = 1, steps: int = 1) -> None:
        if checks > MAX_CHECKS or steps > _MAX_STEPS:
            raise InputError(f"the filter has more than {MAX_CHECKS} comparisons. Use `is_in` for many values of one column.")
        self._tree, self._text, self.checks, self.steps = tree, text, checks, steps

    def __repr__(self) -> str:
        return self._text

    def __eq__(self, other: object) -> NoReturn:
        self._uncompared()

    def __ne__(self, other: object) -> NoReturn:
        self._uncompared()

    def __lt__(self, other: object) -> NoReturn:
        self._uncompared()

    __le__ = __gt__ = __ge__ = __lt__
    __hash__ = None  # type: ignore[assignment]  # a test has no equality that a set could use

    def tree(self, columns: Columns) -> Check | Group:
        """Return the tests with their values in the types of these columns."""
        return self._tree(columns)

    def _uncompared(self) -> NoReturn:
        raise InputError(
            f"`{self._text}` is a test already and cannot be compared. Put each test in parentheses before & and |: "
            '(col("price") < 80) & (col("brand") == "Acme").'
        )


class Column(_Operand):
    """A column of the table, to be compared with values."""

    __slots__ = ("_name",)
    __hash__ = None  # type: ignore[assignment]  # equality of a column is a test, so no set or dictionary can hold one

    def __init__(self, name: str) -> None:
        if not isinstance(name, str) or not name:
            raise InputError(f"a column is named by a text, not by {_shown(name)}.")
        self._name = name

    def __repr__(self) -> str:
        return f"col({self._name!r})"

    def __eq__(self, value: object) -> Expression:  # type: ignore[override]
        return self._compared("=", value)

    def __ne__(self, value: object) -> Expression:  # type: ignore[override]
        return self._compared("!=", value)

    def __lt__(self, value: object) -> Expression:
        return self._compared("<", value)

    def __le__(self, value: object) -> Expression:
        return self._compared("<=", value)

    def __gt__(self, value: object) -> Expression:
        return self._compared(">", value)

    def __ge__(self, value: object) -> Expression:
        return self._compared(">=", value)

    def is_in(self, values: Iterable[object]) -> Expression:
        """Pass the rows whose value is one of these."""
        if isinstance(values, str | bytes | _Operand) or not isinstance(values, Iterable):
            raise InputError(f'`{self!r}.is_in` takes a list of values, not {_shown(values)}. Write is_in(["Acme"]) for one.')
        listed = values.to_pylist() if isinstance(values, pa.Array | pa.ChunkedArray) else list(_first(values, MAX_LISTED + 1))
        if not listed:
            raise InputError(f"`{self!r}.is_in` of no values passes no row. Leave the filter out, or name a value.")
        if len(listed) > MAX_LISTED:
            raise InputError(f"`{self._name}` is compared with more than {MAX_LISTED} values. Split the filter.")
        return self._test("in", listed, f"{self!r}.is_in({_shown(listed)})")

    def between(self, low: object, high: object) -> Expression:
        """Pass the rows whose value is neither below `low` nor above `high`."""
        try:
            empty = bool(low > high)  # type: ignore[operator]
        except TypeError as error:
            raise InputError(f"`{self!r}.between` takes two values of one type, not {_shown(low)} and {_shown(high)}.") from error
        if empty:
            raise InputError(f"`{self!r}.between({_shown(low)}, {_shown(high)})` passes no row: the first value is the smaller one.")
        return (self >= low) & (self <= high)

    def is_null(self) -> Expression:
        """Pass the rows without a value."""
        return self._absent("is null")

    def is_not_null(self) -> Expression:
        """Pass the rows with a value."""
        return self._absent("is not null")

    def _compared(self, sign: str, value: object) -> Expression:
        return self._test(sign, [value], f"{self!r} {'==' if sign == '=' else sign} {_shown(value)}")

    def _absent(self, sign: str) -> Expression:
        def tree(columns: Columns) -> Check:
            _kind(self._name, columns)
            return Check(column=self._name, sign=sign)

        return Expression(tree, text=f"{self!r}.{sign.replace(' ', '_')}()")

    def _test(self, sign: str, values: list[object], text: str) -> Expression:
        for value in values:
            if isinstance(value, _Operand):
                raise InputError(
                    f"`{text}` compares with an expression. A column is compared with values; before & and | every test needs parentheses."
                )
            if value is None:
                raise InputError(f"nothing equals null: write {self!r}.is_null(), or .or_null() behind a test that null shall pass.")

        def tree(columns: Columns) -> Check:
            kind = _kind(self._name, columns)
            if pa.types.is_boolean(kind) and sign in ("<", "<=", ">", ">="):
                raise InputError(f"`{self._name}` is true or false and has no order: use == or != in {text}.")
            return Check(column=self._name, sign=sign, values=_values(self._name, values, kind))

        return Expression(tree, text=text)


def col(name: str) -> Column:
    """Name a column of the table that will be searched."""
    return Column(name)


def _joined(one: object, other: object, *, every: bool) -> Expression:
    left, right = _expression(one), _expression(other)
    return Expression(
        lambda columns: grouped([left.tree(columns), right.tree(columns)], every=every),
        text=f"({left!r}) {'&' if every else '|'} ({right!r})",
        checks=left.checks + right.checks,
        steps=left.steps + right.steps + 1,
    )


def _expression(item: object) -> Expression:
    """Return a test; a column alone asks whether it is true."""
    if isinstance(item, Expression):
        return item
    if isinstance(item, Column):
        return item == True  # noqa: E712  builds a test, compares nothing
    raise InputError(f'& and | join tests, not {_shown(item)}. Put each test in parentheses: (col("price") < 80) & (col("stock") == True).')


def _kind(name: str, columns: Columns) -> pa.DataType:
    if name not in columns:
        raise InputError(f"unknown column {name[:80]!r} in the filter. {nearest(name, columns)}")
    return columns[name]


def _values(name: str, values: list[object], kind: pa.DataType) -> pa.Array:
    """Return values in the type of their column; no type is bent into another."""
    fits = [_fitting(value, kind) for value in values]
    array = None if any(fit is None for fit in fits) else typed_values(fits, kind)
    if array is None:
        wrong = next(value for value, fit in zip(values, fits, strict=True) if fit is None or typed_values([fit], kind) is None)
        raise InputError(f"`{name}` is {named(kind)}, and {_shown(wrong)} is none.")
    return array


def _fitting(value: Any, kind: pa.DataType) -> Any:
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a NumPy number or time
        value = value.item()
    if pa.types.is_boolean(kind):
        return value if isinstance(value, bool) else None
    if pa.types.is_string(kind):
        return value if isinstance(value, str) else None
    if pa.types.is_timestamp(kind):
        return _moment(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    if pa.types.is_integer(kind):
        return int(value) if isinstance(value, Integral) else None
    return _finite(value) if pa.types.is_floating(kind) else None


def _finite(value: Real) -> float | None:
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _moment(value: object) -> datetime | None:
    """Return a time; one without a zone is in UTC, as in a filter's text."""
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            return None
    if isinstance(value, datetime):
        return value if value.tzinfo else value.replace(tzinfo=UTC)
    return datetime(value.year, value.month, value.day, tzinfo=UTC) if isinstance(value, date) else None


def _first(values: Iterable[object], count: int) -> Iterable[object]:
    """Return at most so many, so that an endless iterator ends."""
    return (value for value, _ in zip(values, range(count), strict=False))


def _shown(value: object) -> str:
    """Return a value for a message, cut short."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."  # noqa: PLR2004  a line of a message
