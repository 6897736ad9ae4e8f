"""Which of a source's columns are read, and what they are called afterwards. Rules only: no file is touched here."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa

from pipelines.contracts import ColumnMap
from pipelines.errors import InputError
from pipelines.schema import ATTRIBUTES, DELETED, ID, LOCALE, MALFORMED, UPDATED_AT
from pipelines.sources.spec import suggest

EXCERPT_BYTES = 200


@dataclass(frozen=True, kw_only=True)
class Projection:
    """Pairs of our name and the source's, in the order of the result; `prefix` gathers attribute columns."""

    columns: tuple[tuple[str, str], ...]
    prefix: str | None = None

    @classmethod
    def of(cls, columns: ColumnMap, *, fields: Sequence[str]) -> Projection:
        """Work out the pairs from a configuration."""
        pairs = [(ID, columns.id)]
        if columns.locale is not None:
            pairs.append((LOCALE, columns.locale))
        pairs += [(name, columns.columns.get(name, name)) for name in dict.fromkeys(fields)]
        prefix, attributes = None, columns.attributes
        if isinstance(attributes, str) and "*" in attributes:
            prefix = attributes[:-1]
            if not prefix or "*" in prefix:
                raise InputError(f"`attributes: {attributes}` is not understood. Name one column, a prefix such as `attr_*`, or a list.")
        elif isinstance(attributes, str):
            pairs.append((ATTRIBUTES, attributes))
        elif attributes is not None:
            pairs += [(f"{ATTRIBUTES}.{name}", name) for name in attributes]
        if columns.updated_at is not None:
            pairs.append((UPDATED_AT, columns.updated_at))
        if columns.deleted is not None:
            pairs.append((DELETED, columns.deleted.column))
        return cls(columns=tuple(pairs), prefix=prefix)

    def for_ids(self) -> Projection:
        """Return the part that deletes need."""
        return replace(self, columns=tuple(pair for pair in self.columns if pair[0] in (ID, DELETED)), prefix=None)

    @property
    def id(self) -> str:
        """The source's name of the id."""
        return dict(self.columns)[ID]

    @property
    def updated_at(self) -> str | None:
        """The source's name of the update time, where it is mapped."""
        return dict(self.columns).get(UPDATED_AT)

    def wanted(self, available: Collection[str]) -> list[str]:
        """Return the source columns to read of those available, each once."""
        named = [theirs for _, theirs in self.columns if theirs in available]
        gathered = [] if self.prefix is None else sorted(name for name in available if name.startswith(self.prefix))
        return list(dict.fromkeys([*named, *gathered]))

    def missing(self, available: Collection[str]) -> list[str]:
        """Return the mapped names that are not available; a prefix that no column has is one of them."""
        names = [theirs for _, theirs in self.columns if theirs not in available]
        if self.prefix is not None and not any(name.startswith(self.prefix) for name in available):
            names.append(f"{self.prefix}*")
        return list(dict.fromkeys(names))

    def require(self, available: Collection[str], *, where: str) -> None:
        """Refuse a configuration that names columns which are not there."""
        missing = self.missing(available)
        if missing:
            ours = [name for name, theirs in self.columns if theirs == missing[0]]
            use = f", mapped to `{ours[0]}`," if ours and ours[0] != missing[0] else ""
            more = f" Also missing: {', '.join(missing[1:])}." if missing[1:] else ""
            raise InputError(f"{where} has no column `{missing[0]}`{use} in any part.{suggest(missing[0], tuple(available))}{more}")

    def refuse_twins(self, names: Sequence[str], *, where: str) -> None:
        """Refuse a mapped name that two columns have: nobody could say which is meant."""
        twins = [name for name in self.wanted(names) if names.count(name) > 1]
        if twins:
            raise InputError(f"{where} has more than one column `{twins[0]}`. Rename all but one.")

    def apply(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Rename a batch's columns to ours; a column that this part of the source lacks is null."""
        names = batch.schema.names
        pairs = list(self.columns)
        if self.prefix is not None:
            pairs += [(f"{ATTRIBUTES}.{name.removeprefix(self.prefix)}", name) for name in names if name.startswith(self.prefix)]
        if MALFORMED in names:
            pairs.append((MALFORMED, MALFORMED))
        arrays = [batch.column(names.index(theirs)) if theirs in names else pa.nulls(batch.num_rows) for _, theirs in pairs]
        return pa.RecordBatch.from_arrays(arrays, names=[ours for ours, _ in pairs])


def broken_rows(lines: Sequence[bytes]) -> pa.RecordBatch:
    """Return lines that could not be parsed as rows without an id, so that they reach the quarantine."""
    return pa.RecordBatch.from_arrays([pa.array([line[:EXCERPT_BYTES] for line in lines], pa.binary())], names=[MALFORMED])
