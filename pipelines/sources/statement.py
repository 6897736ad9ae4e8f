"""SQL text for a catalog: one read-only statement, quoted names, and no value in it but small integers of our own."""

from __future__ import annotations

import re

from pipelines.errors import InputError

# Whatever a semicolon or a parenthesis may hide in: literals, quoted names, dollar quotes and comments.
_HIDDEN = re.compile(r"""'(?:[^']|'')*'|"(?:[^"]|"")*"|(\$\w*\$).*?\1|--[^\n]*|/\*.*?\*/""", re.DOTALL)


def checked(query: str) -> str:
    """Return a query that may stand in parentheses: a single SELECT or WITH."""
    text = query.strip().removesuffix(";").rstrip()
    bare = _HIDDEN.sub(" ", text)
    first = re.match(r"\s*(\w+)", bare)
    if first is None or first[1].upper() not in ("SELECT", "WITH"):
        raise InputError("`source.query` must be one SELECT (or WITH ... SELECT) statement.")
    depth = 0
    for mark in re.findall(r"[();]", bare):
        depth += {"(": 1, ")": -1}.get(mark, 0)
        if mark == ";" or depth < 0:
            raise InputError(f"`source.query` must be one statement: unexpected `{mark}`.")
    if depth:
        raise InputError("`source.query` has a parenthesis that is never closed.")
    return text


def quoted(name: str) -> str:
    """Return an identifier in double quotes."""
    if "\0" in name:
        raise InputError(f"{name!r} is no column name.")
    return '"' + name.replace('"', '""') + '"'


def relation(*, query: str | None, table: str | None) -> str:
    """Return what stands after FROM: a subquery, or a table with an optional schema."""
    if query is not None:
        # The line end closes a comment in the query's last line.
        return f"({checked(query)}\n) AS q"
    return ".".join(quoted(part) for part in (table or "").split(".")) + " AS q"


def select(columns: list[str], *, source: str, conditions: list[str], order_by: str | None = None, limit: int | None = None) -> str:
    """Return a SELECT of named columns."""
    chosen = ", ".join(f"q.{quoted(name)}" for name in columns)
    where = f" WHERE {' AND '.join(conditions)}" if conditions else ""
    order = f" ORDER BY q.{quoted(order_by)}" if order_by is not None else ""
    end = f" LIMIT {limit:d}" if limit is not None else ""
    return f"SELECT {chosen} FROM {source}{where}{order}{end}"  # noqa: S608 - names are quoted, numbers are ours, and the query is the operator's own
