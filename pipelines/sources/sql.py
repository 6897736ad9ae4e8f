"""A SQL query as a catalog, streamed as Arrow through ADBC: PostgreSQL, and SQLite.

Weaker than files and tables in two ways: the pin is a fingerprint of the answer (counts, the latest update, and hashes in
PostgreSQL), and shards are separate transactions. Compare the pin before and after reading to notice a move.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.types as pt

from pipelines.contracts import PinnedObject, Shard, SourcePin, Window
from pipelines.sources.batches import emit, limited
from pipelines.sources.database import POSTGRESQL, Database
from pipelines.sources.projection import Projection
from pipelines.sources.spec import SourceSpec
from pipelines.sources.statement import quoted, relation, select
from pipelines.sources.windowing import EPOCH, effective

_SINCE, _UNTIL = "catalog_embed.since", "catalog_embed.until"


@dataclass(frozen=True, kw_only=True)
class SqlShard:
    """The rows whose hashed id falls to this shard."""

    database: Database
    statement: str
    settings: tuple[tuple[str, str], ...]
    number: int
    shards: int
    projection: Projection
    window: Window | None

    @property
    def name(self) -> str:
        """The database and the shard's number."""
        return f"{self.database.address}#{self.number + 1}/{self.shards}"

    def open(self) -> Iterator[pa.RecordBatch]:
        """Stream the window's rows in a read-only transaction."""
        batches = self.database.stream(self.statement, settings=self.settings)
        return emit(batches, projection=self.projection, window=self.window)


class SqlSource:
    """Reads the answer of one SELECT."""

    def __init__(self, spec: SourceSpec, projection: Projection) -> None:
        self._spec, self._projection = spec, projection
        self._database = Database.of(spec.uri or "")
        self._from = relation(query=spec.query, table=spec.table)

    def snapshot(self) -> SourcePin:
        """Fingerprint the answer: rows, the latest update, and a hash of all rows (in SQLite: lengths of all values)."""
        schema = self._schema(self._projection)
        columns = [f"q.{quoted(name)}" for name in self._projection.wanted(schema.names)]
        if self._database.kind == POSTGRESQL:
            digest = f"sum(hashtextextended(CAST(ROW({', '.join(columns)}) AS text), 0))"
        else:
            digest = f"sum({' + '.join(f'ifnull(length({column}), -1)' for column in columns)})"
        latest = f"max(q.{quoted(self._projection.updated_at)})" if self._projection.updated_at is not None else "NULL"
        statement = f"SELECT count(*), CAST({latest} AS text), CAST({digest} AS text) FROM {self._from}"  # noqa: S608 - names are quoted, and the query is the operator's own
        rows, moment, value = (column[0].as_py() for column in pa.Table.from_batches(self._database.stream(statement)).columns)
        answer = PinnedObject(name="answer", size=0, etag=f"rows {rows}, latest {moment}, digest {value}")
        return SourcePin(kind="sql", address=self._database.address, objects=(answer,))

    def read(self, window: Window) -> Sequence[Shard]:
        """Return shards by a hash of the id (PostgreSQL), or one (SQLite, or with a limit)."""
        return self._shards(self._projection, effective(window, updated_at=self._projection.updated_at))

    def ids(self) -> Sequence[Shard]:
        """Return shards that read only the id and the tombstone column."""
        return self._shards(self._projection.for_ids(), None)

    def _schema(self, projection: Projection) -> pa.Schema:
        """Return the answer's columns, checked against the configuration."""
        schema = self._database.schema(f"SELECT * FROM {self._from} LIMIT 0")  # noqa: S608 - the query is the operator's own
        projection.require(schema.names, where=self._database.address)
        projection.refuse_twins(schema.names, where=self._database.address)
        return schema

    def _shards(self, projection: Projection, window: Window | None) -> Sequence[Shard]:
        schema, limit = self._schema(projection), self._spec.limit
        early = window if limit is None else None
        conditions, settings = self._conditions(schema, early)
        several = self._database.kind == POSTGRESQL and limit is None
        count = (self._spec.shards or 1) if several else 1
        identity = projection.id
        share = f"(hashtext(coalesce(CAST(q.{quoted(identity)} AS text), '')) & 2147483647) % {count:d} = "
        shards = [
            SqlShard(
                database=self._database,
                statement=select(
                    projection.wanted(schema.names),
                    source=self._from,
                    conditions=[*conditions, *([f"{share}{number:d}"] if count > 1 else [])],
                    order_by=identity if limit is not None else None,
                    limit=limit,
                ),
                settings=settings,
                number=number,
                shards=count,
                projection=projection,
                window=early,
            )
            for number in range(count)
        ]
        return limited(shards, limit=limit, window=window)

    def _conditions(self, schema: pa.Schema, window: Window | None) -> tuple[list[str], tuple[tuple[str, str], ...]]:
        """Return the window as conditions on session settings, where PostgreSQL can compare the column with a moment.

        Settings and not bound parameters: with those ADBC cannot COPY, and holds the whole answer in memory.
        """
        name = self._projection.updated_at
        if window is None or name is None or self._database.kind != POSTGRESQL:
            return [], ()
        kind = schema.field(name).type
        if not (pt.is_timestamp(kind) or pt.is_date(kind)):
            return [], ()
        column = f"q.{quoted(name)}"
        since = f"{column} >= CAST(current_setting('{_SINCE}') AS timestamptz)"
        settings = ((_SINCE, (window.since or EPOCH).isoformat()), (_UNTIL, window.until.isoformat()))
        if window.bounded:
            return [since, f"{column} < CAST(current_setting('{_UNTIL}') AS timestamptz)"], settings
        return [f"({since} OR {column} IS NULL OR {column} < TIMESTAMPTZ '1970-01-01 00:00:00Z')"], settings


def make(spec: SourceSpec, projection: Projection) -> SqlSource:
    """Return the answer of a query as a catalog."""
    return SqlSource(spec, projection)
