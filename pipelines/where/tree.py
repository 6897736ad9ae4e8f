"""A filter as a tree of typed comparisons, its meaning as an Arrow expression, and its text."""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from hashlib import blake2b
from itertools import chain
from typing import Any, Literal, TypeVar, get_args

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.errors import InputError

T = TypeVar("T")
Nulls = Literal["drop", "keep"]

MAX_CHARS = 16_384
MAX_DEPTH = 32
MAX_CHECKS = 100
MAX_LISTED = 1_000
# Arrow serialises an expression for an engine with both arguments of a call written twice, so bytes double with every
# level: 25 chained `or` made 6 GB (pyarrow 26). Groups are therefore balanced, and this bounds the bytes at about 4 MB.
MAX_WEIGHT = 20_000
KEYWORDS = frozenset({"and", "or", "not", "in", "is", "null", "true", "false"})

_OPPOSITE = {"=": "!=", "!=": "=", "<": ">=", ">=": "<", ">": "<=", "<=": ">"}
_OPPOSITE |= {"in": "not in", "not in": "in", "is null": "is not null", "is not null": "is null"}
_PLAIN_NAME = re.compile(r"[^\W\d]\w*")
COMPARE: Mapping[str, Callable[[pc.Expression, pa.Scalar], pc.Expression]] = {
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
        return COMPARE[self.sign](column, self.values[0])

    @property
    def weight(self) -> int:
        """Return how large the test is in an engine's request, in comparisons."""
        listed = 1 + (0 if self.values is None else len(self.values) // 20)
        return 4 * listed if self.sign == "not in" else listed

    def opposite(self) -> Check:
        """Return the test that holds where this one fails and the value is there."""
        return Check(column=self.column, sign=_OPPOSITE[self.sign], values=self.values)

    def keeping(self) -> Check | Group:
        """Return the test that holds also where the value is missing."""
        if self.values is None:
            return self
        return Group(every=False, parts=(self, Check(column=self.column, sign="is null")))

    def spelled(self) -> str:
        """Return the test as a filter's text has it."""
        name = self.column if _PLAIN_NAME.fullmatch(self.column) and self.column.lower() not in KEYWORDS else _quoted(self.column, '"')
        if self.values is None:
            return f"{name} {self.sign}"
        values = [_literal(value) for value in self.values.to_pylist()]
        return f"{name} {self.sign} " + (f"({', '.join(values)})" if self.sign.endswith("in") else values[0])


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

    def keeping(self) -> Check | Group:
        """Return the group that holds also where a missing value leaves it open; without negations, part by part."""
        return grouped([part.keeping() for part in self.parts], every=self.every)

    def spelled(self) -> str:
        """Return the group as a filter's text has it."""
        parts = [f"({part.spelled()})" if isinstance(part, Group) else part.spelled() for part in self.parts]
        return (" and " if self.every else " or ").join(parts)


@dataclass(frozen=True, kw_only=True)
class Filter:
    """A filter of one table's columns. `expression` works on Arrow tables and in scanners alike."""

    tree: Check | Group
    expression: pc.Expression = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.tree.weight > MAX_WEIGHT:
            raise InputError("the filter is too large or nested too deeply. Use `in (...)` for many values of one column, or split it.")
        object.__setattr__(self, "expression", self.tree.compiled())

    @classmethod
    def of(cls, tree: Check | Group, nulls: Nulls) -> Filter:
        """Return the filter of a tree: rows that a missing value leaves open are dropped as in SQL, or kept."""
        if nulls not in get_args(Nulls):
            raise InputError(f"nulls is `{nulls}`. Use `drop` for rows whose value is missing to be left out, or `keep`.")
        return cls(tree=tree.keeping() if nulls == "keep" else tree)

    @property
    def columns(self) -> frozenset[str]:
        """Names of the columns that the filter reads."""
        return frozenset(_columns(self.tree))

    @cached_property
    def text(self) -> str:
        """The filter in words, one spelling for equal filters; `parse_where` reads it back."""
        return self.tree.spelled()

    @cached_property
    def key(self) -> bytes:
        """What names the filter among others of one table."""
        return blake2b(self.text.encode(), digest_size=16).digest()


def grouped(parts: Sequence[Check | Group], *, every: bool) -> Check | Group:
    """Make a group, without groups of its own kind inside it."""
    if len(parts) == 1:
        return parts[0]
    nested = ((part.parts if isinstance(part, Group) and part.every == every else (part,)) for part in parts)
    return Group(every=every, parts=tuple(chain.from_iterable(nested)))


def typed_values(values: Sequence[Any], kind: pa.DataType) -> pa.Array | None:
    """Return values in a column's type, or None where it has no room for one."""
    try:
        array = pa.array(values, kind)
        if pa.types.is_timestamp(kind):
            array.to_pylist()  # Arrow holds times of years that no text of a filter could name
    except (pa.ArrowException, OverflowError, ValueError):
        return None
    return None if array.null_count else array


def named(kind: pa.DataType) -> str:
    """Say what the values of a column are."""
    names: Sequence[tuple[Callable[[pa.DataType], bool], str]] = (
        (pa.types.is_boolean, "true or false"),
        (pa.types.is_string, "a text (in single quotes)"),
        (pa.types.is_timestamp, "a time (an ISO text such as '2026-11-04T02:10:00Z')"),
        (pa.types.is_integer, "a whole number"),
        (pa.types.is_floating, "a number"),
    )
    return next((name for check, name in names if check(kind)), f"{kind}, which no filter can compare")


def nearest(name: str, columns: Mapping[str, pa.DataType]) -> str:
    """Say which column may have been meant."""
    near = difflib.get_close_matches(name, columns, n=1, cutoff=0.6)
    return f"Did you mean `{near[0]}`?" if near else f"There are: {', '.join(sorted(columns))}."


def _paired(parts: Sequence[T], join: Callable[[T, T], T]) -> T:
    """Join neighbours until one is left, by halves."""
    half = len(parts) // 2
    return join(_paired(parts[:half], join), _paired(parts[half:], join)) if half else parts[0]


def _columns(tree: Check | Group) -> set[str]:
    return {tree.column} if isinstance(tree, Check) else set().union(*(_columns(part) for part in tree.parts))


def _quoted(text: str, quote: str) -> str:
    return quote + text.replace(quote, quote * 2) + quote


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return _quoted(value.isoformat() if isinstance(value, datetime) else value, "'") if isinstance(value, datetime | str) else repr(value)
