"""Reads a filter's text into a tree: `or` binds least, then `and`, then `not`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from pipelines.errors import InputError
from pipelines.where.tree import (
    COMPARE,
    KEYWORDS,
    MAX_CHARS,
    MAX_CHECKS,
    MAX_DEPTH,
    MAX_LISTED,
    Check,
    Filter,
    Group,
    Nulls,
    grouped,
    named,
    nearest,
    typed_values,
)

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


def parse_where(text: str, columns: Mapping[str, pa.DataType], *, nulls: Nulls = "drop") -> Filter:
    """Read a filter over these columns; whatever does not fit raises `InputError` and says where.

    Signs are = != <> < <= > >=, `in (...)`, `not in (...)`, `is null`, `is not null`, and, or, not, parentheses. A text
    stands in single quotes, doubled inside; a column of an unusual name in double quotes; a time is an ISO text, in UTC
    unless it says otherwise; a column of true or false may stand alone. `nulls="keep"` passes the rows too for which
    the filter is neither true nor false, because a value is missing.
    """
    if len(text) > MAX_CHARS:
        raise InputError(f"the filter has {len(text)} characters, more than {MAX_CHARS}. Filter by fewer values.")
    return Filter.of(_Parser(text, columns).whole(), nulls)


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
        if kind == "word" and value.lower() in KEYWORDS:
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
        return grouped(parts, every=False)

    def _all(self) -> Check | Group:
        parts = [self._one()]
        while self._accept("keyword", "and"):
            parts.append(self._one())
        return grouped(parts, every=True)

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
        if not negated and token.kind == "sign" and (sign := token.value.replace("<>", "!=")) in COMPARE:
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
            hint = nearest(token.value, self._columns)
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
        array = None if value is None else typed_values([value], kind)
        if array is None:
            raise InputError(f"`{column}` is {named(kind)}, and {token.value[:40]!r} at position {token.at} of the filter is none.")
        return array

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
