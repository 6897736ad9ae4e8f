"""What a configuration may say about a catalog. Checked when it is made; credentials never show in its repr."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches

import pyarrow as pa

from pipelines.errors import InputError

# What each type is addressed by (exactly one of these must be set), and what else it understands.
_ADDRESSED_BY = {
    "parquet": ("path",),
    "csv": ("path",),
    "jsonl": ("path",),
    "lance": ("path",),
    "delta": ("path",),
    "sql": ("query", "table"),
    "memory": ("data",),
}
_ONLY_FOR = {
    "path": ("parquet", "csv", "jsonl", "lance", "delta"),
    "options": ("parquet", "csv", "jsonl", "lance", "delta"),
    "version": ("lance", "delta"),
    "delimiter": ("csv",),
    "uri": ("sql",),
    "query": ("sql",),
    "table": ("sql",),
    "shards": ("sql",),
    "data": ("memory",),
}
# How many names a message lists before it says "and more".
_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class SourceSpec:
    """One catalog: its type, where it is, and how to read it.

    `limit` takes the catalog to be its first rows, before any window: for development. `max_expansion` is how many times
    its stored size a compressed file may grow to before it counts as a decompression bomb; a gibibyte is always allowed.
    """

    type: str
    path: str | None = None
    version: int | None = None
    uri: str | None = field(default=None, repr=False)
    query: str | None = None
    table: str | None = None
    shards: int | None = None
    delimiter: str | None = None
    limit: int | None = None
    max_expansion: int = 1000
    options: Mapping[str, str] = field(default_factory=dict, repr=False)
    data: pa.Table | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.type not in _ADDRESSED_BY:
            raise InputError(f"source type `{self.type}` is unknown.{suggest(self.type, tuple(_ADDRESSED_BY))}")
        self._check_addresses()
        for name in ("shards", "limit", "max_expansion"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"`source.{name}` is {value}; it must be at least 1.")
        mark = self.delimiter
        if mark is not None and (len(mark) != 1 or not mark.isascii() or mark in '"\r\n\0'):
            raise InputError(f"`source.delimiter` is {mark!r}; it must be one ASCII character, such as ',' or ';' or a tab.")

    def _check_addresses(self) -> None:
        for name, types in _ONLY_FOR.items():
            if self.type not in types and getattr(self, name) not in (None, {}):
                raise InputError(f"`source.{name}` means nothing to a source of type `{self.type}`: it is for {', '.join(types)}.")
        names = _ADDRESSED_BY[self.type]
        if len([name for name in names if getattr(self, name) not in (None, "")]) != 1:
            raise InputError(f"a source of type `{self.type}` needs {' or '.join(f'`source.{name}`' for name in names)}, and only one.")
        if self.type == "sql" and not self.uri:
            raise InputError("a source of type `sql` needs `source.uri`, such as `${CATALOG_URI}` from the environment.")


def suggest(wrong: str, known: tuple[str, ...]) -> str:
    """Return a sentence that names the nearest known word, or lists what there is."""
    near = get_close_matches(wrong, known, n=1, cutoff=0.6)
    shown = ", ".join(f"`{name}`" for name in known[:_SHOWN])
    more = f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else ""
    return (f" Did you mean `{near[0]}`?" if near else "") + (f" There is: {shown}{more}." if known else "")
