"""Filters that a person writes: `brand = 'Acme' and price < 80 and category in ('A', 'B') and size is null`.

The text becomes a tree of typed comparisons, and the tree an Arrow expression: nothing of it reaches an engine as text.

Nulls are as in SQL: a row whose value is missing passes no comparison, so `brand != 'Acme'`, `brand not in ('Acme')`
and `not (brand = 'Acme')` all leave out products without a brand. `is null` and `is not null` ask for them.
"""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.errors import InputError

T = TypeVar("T")

MAX_CHARS = 16_384
MAX_DEPTH = 32
MAX_CHECKS = 100
MAX_LISTED = 1_000
# Arrow serialises an expression for an engine with both arguments of a call written twice, so bytes double with every
# level: 25 chained `or` made 6 GB (pyarrow 26). Groups are therefore balanced, and this bounds the bytes at about 4 MB.
MAX_WEIGHT = 20_000

_TOKEN = re.compile(
    r"""\s*(?:
        (?P<text>'(?:[^']|'')*')
      | (?P<quoted>"(?:[^"]|"")+")
      | (?P<number>[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?)(?![\w.])
      | (?P<word>[^\W\d]\w*)
      | (?P<sign><=|>=|<>|!=|<|>|=|\(|\)|,)
    )""",
    re.VERBOSE,
)
_KEYWORDS = frozenset({"and", "or", "not", "in", "is", "null", "true", "false"})
_OPPOSITE = {"=": "!=", "!=": "=", "<": ">=", ">=": "<", ">": "<=", "<=": ">"}
_COMPARE: Mapping[str, Callable[[pc.Expression, pa.Scalar], pc.Expression]] = {
    "=": lambda column, value: column == value,
    "!=": lambda column, value: column != value,
    "<": lambda column, value: column < value,
    "<=": lambda column, value: column <= value,
    ">": lambda column, value: column > value,
    ">=": lambda column, value: column >= value,
}


@dataclass(frozen=True, kw_only=True)
class Check:
    """One question about one column: a comparison with a value, membership in values, or absence."""

    column: str
    sign: str
    values: pa.Array | None = None

    def compiled(self) -> pc.Expression:
        """Return the test as an expression that is true only where it holds."""
        column = pc.field(self.column)
        if self.values is None:
            return column.is_null() if self.sign == "is null" else column.is_valid()
        if self.sign == "in":
            return column.isin(self.values)
        if self.sign == "not in":  # Arrow's membership of a null is false, not null: its opposite must ask for a value
            return column.is_valid() & ~column.isin(self.values)
        return _COMPARE[self.sign](column, self.values[0])

    @property
    def weight(self) -> int:
        """Return how large the test is in an engine's request, in comparisons."""
        listed = 1 + (0 if self.values is None else len(self.values) // 20)
        return 4 * listed if self.sign == "not in" else listed

    def opposite(self) -> Check:
        """Return the test that holds where this one fails and the value is there."""
        pairs = {**_OPPOSITE, "in": "not in", "not in": "in", "is null": "is not null", "is not null": "is null"}
        return Check(column=self.column, sign=pairs[self.sign], values=self.values)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Several tests or groups, of which all must hold, or any."""

    every: bool
    parts: tuple[Check | Group, ...]

    def compiled(self) -> pc.Expression:
        """Return the group as one expression, as flat as a tree of pairs can be."""
        join: Callable[[Any, Any], Any] = operator.and_ if self.every else operator.or_
        return _paired([part.compiled() for part in self.parts], join)

    @property
    def weight(self) -> int:
        """Return how large the group is in an engine's request, in comparisons."""
        return _paired([part.weight for part in self.parts], lambda one, other: 2 * (one + other))

    def opposite(self) -> Group:
        """Return the group that fails where this one holds: negation moves inward, so that it never meets a null."""
        return Group(every=not self.every, parts=tuple(part.opposite() for part in self.parts))


@dataclass(frozen=True, kw_only=True)
class Filter:
    """A parsed filter. `expression` works on Arrow tables and in scanners alike."""

    tree: Check | Group
    expression: pc.Expression = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "expression", self.tree.compiled())

    @property
    def columns(self) -> frozenset[str]:
        """Names of the columns that the filter reads."""
        return frozenset(_columns(self.tree))


def parse_where(text: str, columns: Mapping[str, pa.DataType]) -> Filter:
    """Read a filter over these columns; whatever does not fit raises `InputError` and says where.

    Signs are = != <> < <= > >=, `in (...)`, `not in (...)`, `is null`, `is not null`, and, or, not, parentheses. A text
    stands in single quotes, doubled inside; a column of an unusual name in double quotes; a time is an ISO text, in UTC
    unless it says otherwise; a column of true or false may stand alone.
    """
    if len(text) > MAX_CHARS:
        raise InputError(f"the filter has {len(text)} characters, more than {MAX_CHARS}. Filter by fewer values.")
    tree = _Parser(text, columns).whole()
    if tree.weight > MAX_WEIGHT:
        raise InputError("the filter is too large or nested too deeply. Use `in (...)` for many values of one column, or split it.")
    return Filter(tree=tree)


def _grouped(parts: Sequence[Check | Group], *, every: bool) -> Check | Group:
    """Make a group, without groups of its own kind inside it."""
    if len(parts) == 1:
        return parts[0]
    nested = ((part.parts if isinstance(part, Group) and part.every == every else (part,)) for part in parts)
    return Group(every=every, parts=tuple(chain.from_iterable(nested)))


def _paired(parts: Sequence[T], join: Callable[[T, T], T]) -> T:
    """Join neighbours until one is left, by halves."""
    half = len(parts) // 2
    return join(_paired(parts[:half], join), _paired(parts[half:], join)) if half else parts[0]


def _columns(tree: Check | Group) -> set[str]:
    return {tree.column} if isinstance(tree, Check) else set().union(*(_columns(part) for part in tree.parts))


@dataclass(frozen=True, kw_only=True)
class _Token:
    """A piece of the text. Keywords are in lower case."""

    kind: str
    value: str
    at: int


def _tokens(text: str) -> list[_Token]:
    found, at, end = [], 0, len(text.rstrip())
    while at < end:
        match = _TOKEN.match(text, at)
        if match is None:
            shown = text[at:].lstrip()
            what = "a quote that is never closed" if shown[0] in "'\"" else "a character or number that no filter has"
            raise InputError(f"the filter has {what} at position {at + len(text[at:]) - len(shown) + 1}: {shown[:20]!r}.")
        kind = str(match.lastgroup)
        value, place = match.group(kind), match.start(kind) + 1
        if kind in ("text", "quoted"):
            value = value[1:-1].replace(value[0] * 2, value[0])
        if kind == "word" and value.lower() in _KEYWORDS:
            kind, value = "keyword", value.lower()
        found.append(_Token(kind=kind, value=value, at=place))
        at = match.end()
    return [*found, _Token(kind="end", value="", at=end + 1)]


class _Parser:
    """Reads one filter from left to right: `or` binds least, then `and`, then `not`."""

    def __init__(self, text: str, columns: Mapping[str, pa.DataType]) -> None:
        self._tokens = _tokens(text)
        self._columns = columns
        self._next = 0
        self._depth = 0
        self._checks = 0

    def whole(self) -> Check | Group:
        """Read everything."""
        if self._peek().kind == "end":
            raise InputError("the filter is empty. Leave it out, or write a comparison such as brand = 'Acme'.")
        tree = self._any()
        if self._peek().kind != "end":
            raise self._unexpected("`and`, `or` or the end")
        return tree

    def _any(self) -> Check | Group:
        parts = [self._all()]
        while self._accept("keyword", "or"):
            parts.append(self._all())
        return _grouped(parts, every=False)

    def _all(self) -> Check | Group:
        parts = [self._one()]
        while self._accept("keyword", "and"):
            parts.append(self._one())
        return _grouped(parts, every=True)

    def _one(self) -> Check | Group:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise InputError(f"the filter is nested deeper than {MAX_DEPTH}. Remove parentheses.")
        if self._accept("keyword", "not"):
            tree = self._one().opposite()
        elif self._accept("sign", "("):
            tree = self._any()
            self._expect("sign", ")")
        else:
            tree = self._test()
        self._depth -= 1
        return tree

    def _test(self) -> Check:
        self._checks += 1
        if self._checks > MAX_CHECKS:
            raise InputError(f"the filter has more than {MAX_CHECKS} comparisons. Use `in (...)` for many values of one column.")
        column = self._column()
        kind = self._columns[column]
        if self._accept("keyword", "is"):
            negated = self._accept("keyword", "not")
            self._expect("keyword", "null")
            return Check(column=column, sign="is not null" if negated else "is null")
        negated = self._accept("keyword", "not")
        if self._accept("keyword", "in"):
            return Check(column=column, sign="not in" if negated else "in", values=self._listed(column, kind))
        token = self._peek()
        if not negated and token.kind == "sign" and (sign := token.value.replace("<>", "!=")) in _COMPARE:
            self._next += 1
            if pa.types.is_boolean(kind) and sign not in ("=", "!="):
                raise InputError(f"`{column}` is true or false and has no order: use = or != at position {token.at}.")
            return Check(column=column, sign=sign, values=self._value(column, kind))
        if not negated and pa.types.is_boolean(kind):
            return Check(column=column, sign="=", values=pa.array([True]))
        raise self._unexpected("a comparison such as =, <, `in` or `is null`")

    def _column(self) -> str:
        token = self._peek()
        if token.kind not in ("word", "quoted"):
            raise self._unexpected("a column")
        if token.value not in self._columns:
            near = difflib.get_close_matches(token.value, self._columns, n=1, cutoff=0.6)
            hint = f"Did you mean `{near[0]}`?" if near else f"There are: {', '.join(sorted(self._columns))}."
            raise InputError(f"unknown column {token.value[:80]!r} at position {token.at} of the filter. {hint}")
        self._next += 1
        return token.value

    def _listed(self, column: str, kind: pa.DataType) -> pa.Array:
        self._expect("sign", "(")
        values = [self._value(column, kind)]
        while self._accept("sign", ","):
            values.append(self._value(column, kind))
            if len(values) > MAX_LISTED:
                raise InputError(f"`{column}` is compared with more than {MAX_LISTED} values. Split the filter.")
        self._expect("sign", ")")
        return pa.concat_arrays(values)

    def _value(self, column: str, kind: pa.DataType) -> pa.Array:
        token = self._peek()
        if token.kind == "keyword" and token.value == "null":
            raise InputError(f"nothing equals null: write `{column} is null` at position {token.at} of the filter.")
        if token.kind not in ("text", "number") and token.value not in ("true", "false"):
            raise self._unexpected("a value (texts stand in single quotes)")
        self._next += 1
        value = _typed(token, kind)
        if value is None:
            raise InputError(f"`{column}` is {_named(kind)}, and {token.value[:40]!r} at position {token.at} of the filter is none.")
        return pa.array([value], kind)

    def _peek(self) -> _Token:
        return self._tokens[self._next]

    def _accept(self, kind: str, value: str) -> bool:
        token = self._peek()
        found = token.kind == kind and token.value == value
        self._next += found
        return found

    def _expect(self, kind: str, value: str) -> None:
        if not self._accept(kind, value):
            raise self._unexpected(f"`{value}`")

    def _unexpected(self, expected: str) -> InputError:
        token = self._peek()
        found = "the filter ends" if token.kind == "end" else f"there is {token.value[:40]!r}"
        return InputError(f"expected {expected} at position {token.at} of the filter, but {found}.")


def _typed(token: _Token, kind: pa.DataType) -> Any:
    """Return the value in the column's type, or None where it does not fit."""
    if pa.types.is_boolean(kind):
        return {"true": True, "false": False}[token.value] if token.kind == "keyword" else None
    if pa.types.is_string(kind):
        return token.value if token.kind == "text" else None
    if pa.types.is_timestamp(kind):
        return _moment(token.value) if token.kind == "text" else None
    if token.kind != "number":
        return None
    if pa.types.is_integer(kind):
        whole = int(token.value) if re.fullmatch(r"[-+]?\d+", token.value) else None
        return whole if whole is not None and -(2**63) <= whole < 2**63 else None
    number = float(token.value)
    return number if math.isfinite(number) else None


def _moment(text: str) -> datetime | None:
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def _named(kind: pa.DataType) -> str:
    names: Sequence[tuple[Callable[[pa.DataType], bool], str]] = (
        (pa.types.is_boolean, "true or false"),
        (pa.types.is_string, "a text (in single quotes)"),
        (pa.types.is_timestamp, "a time (an ISO text such as '2026-11-04T02:10:00Z')"),
        (pa.types.is_integer, "a whole number"),
        (pa.types.is_floating, "a number"),
    )
    return next((name for check, name in names if check(kind)), f"{kind}, which no filter can compare")
