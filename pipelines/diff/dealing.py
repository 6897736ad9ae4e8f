"""From changes to work: which row of the source carries a change, and which part of the run takes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.diff.engine import DiffOptions, Rows, attach, connect, name_them, one
from pipelines.schema import (
    ACTION,
    ACTIONS,
    ADD,
    ATTR,
    ATTR_HASH,
    CHANGES,
    ID,
    ID_HASH,
    LIVE,
    ROW,
    SHARD,
    STATE,
    TEXT,
    TEXT_BYTES,
    TEXT_HASH,
)

# Rows that are in memory at a time when parts are read back.
_GROUP_ROWS = 1 << 16


def with_rows(changes: Path, previous: Rows, current: Rows, *, outcome: Path, options: DiffOptions | None = None) -> None:
    """Write the changes once more as CHANGES has them: each with its id, and with the row of the source that carries it."""
    with connect(outcome, options or DiffOptions()) as db:
        name_them(db, changes, previous, current, chosen="FROM changes")
        # Of several equal rows the first by shard and number, so that the choice is always the same.
        db.execute(f"""
            CREATE TEMP TABLE places AS
            SELECT {ID_HASH}, {TEXT_HASH}, {ATTR_HASH}, min(({SHARD}, {ROW})) AS place
            FROM current SEMI JOIN changes USING ({ID_HASH}, {TEXT_HASH}, {ATTR_HASH}) WHERE {STATE} = {LIVE} GROUP BY ALL""")
        db.sql(f"""
            SELECT {ID}, {ID_HASH}, {ACTION}, {TEXT_HASH}, {ATTR_HASH}, {TEXT_BYTES}, place[1] AS {SHARD}, place[2] AS {ROW}
            FROM changes JOIN names USING ({ID_HASH}) LEFT JOIN places USING ({ID_HASH}, {TEXT_HASH}, {ATTR_HASH})
            ORDER BY {ID_HASH}""").write_parquet(str(outcome))


def assign(
    changes: Path,
    *,
    known: Rows,
    paid: Rows,
    part_rows: int,
    outcome: Path,
    rewrite: bool = False,
    options: DiffOptions | None = None,
) -> Mapping[str, int]:
    """Deal the changes of `with_rows` out to parts, and count them.

    A text is embedded where it stands first; its other rows are copied. So are the rows of texts that the table holds
    (`known`) and that dead runs paid for (`paid`: text_hash, part). Parts follow the order of the source, because
    neighbours are read together; copies follow the part that they are copied from. With `rewrite` every row is written
    whole, so a change of attributes copies its vector too.
    """
    whole = (ADD, TEXT, ATTR) if rewrite else (ADD, TEXT)
    vectors = ", ".join(f"'{action}'" for action in whole)
    others = ", ".join(f"'{action}'" for action in ACTIONS if action not in whole)
    with connect(outcome, options or DiffOptions()) as db:
        attach(db, "changes", [changes])
        attach(db, "known", known)
        attach(db, "paid", paid)
        db.execute(f"""
            CREATE TEMP TABLE held AS
            SELECT {TEXT_HASH}, -1 AS origin FROM (SELECT DISTINCT {TEXT_HASH} FROM changes) SEMI JOIN known USING ({TEXT_HASH})
            UNION ALL
            SELECT {TEXT_HASH}, min(part) FROM (SELECT DISTINCT {TEXT_HASH} FROM changes) JOIN paid USING ({TEXT_HASH})
            ANTI JOIN known USING ({TEXT_HASH}) GROUP BY 1;
            CREATE TEMP TABLE fresh AS
            SELECT *, min(part) OVER (PARTITION BY {TEXT_HASH}) AS home FROM (
                SELECT *, (row_number() OVER (ORDER BY {SHARD}, {ROW}) - 1) // {part_rows:d} AS part
                FROM changes ANTI JOIN held USING ({TEXT_HASH}) WHERE {ACTION} IN ({vectors}));
            CREATE TEMP TABLE dealt AS
            SELECT * EXCLUDE (part, home), 'embed' AS kind, part::BIGINT AS part, 'run' AS source, home::BIGINT AS origin
            FROM fresh WHERE part = home
            UNION ALL BY NAME
            SELECT *, (row_number() OVER (ORDER BY source, origin, {SHARD}, {ROW}) - 1) // {part_rows:d} AS part FROM (
                SELECT * EXCLUDE (part, home), 'copy' AS kind, 'run' AS source, home::BIGINT AS origin FROM fresh WHERE part <> home
                UNION ALL BY NAME
                SELECT *, 'copy' AS kind, if(origin < 0, 'table', 'paid') AS source FROM changes JOIN held USING ({TEXT_HASH})
                WHERE {ACTION} IN ({vectors}))
            UNION ALL BY NAME
            SELECT *, {ACTION} AS kind, (row_number() OVER (PARTITION BY {ACTION} ORDER BY {SHARD}, {ROW}, {ID_HASH}) - 1) // {4 * part_rows:d} AS part,
                   NULL AS source, NULL AS origin
            FROM changes WHERE {ACTION} IN ({others})""")
        db.sql(f"FROM dealt ORDER BY kind, part, {ID_HASH}").write_parquet(str(outcome), row_group_size=_GROUP_ROWS)
        return {
            "texts": one(db, f"SELECT count(DISTINCT {TEXT_HASH}) FROM dealt WHERE kind = 'embed'"),
            "embed_rows": one(db, "SELECT count(*) FROM dealt WHERE kind = 'embed'"),
            "embed_parts": one(db, "SELECT coalesce(max(part) + 1, 0) FROM dealt WHERE kind = 'embed'"),
            "copy_rows": one(db, "SELECT count(*) FROM dealt WHERE kind = 'copy'"),
            "other_rows": one(db, "SELECT count(*) FROM dealt WHERE kind NOT IN ('embed', 'copy')"),
        }


def dealt_parts(dealt: Path, *, kind: str) -> Iterator[tuple[int, pa.Table]]:
    """Yield the parts of one kind in order, as `assign` dealt them: CHANGES, then where a copy comes from."""
    waiting: list[pa.Table] = []
    number = -1
    for batch in pq.ParquetFile(dealt).iter_batches(batch_size=_GROUP_ROWS):
        rows = pa.Table.from_batches([batch])
        rows = rows.filter(pc.equal(rows.column("kind"), kind))
        for part in pc.unique(rows.column("part")).to_pylist():
            if part != number and waiting:
                yield number, _as_changes(pa.concat_tables(waiting))
                waiting = []
            number = part
            waiting.append(rows.filter(pc.equal(rows.column("part"), part)))
    if waiting:
        yield number, _as_changes(pa.concat_tables(waiting))


def first_embedded(changes: Path, *, limit: int) -> pa.Table:
    """Return a few changes that need a vector, as CHANGES: the ones with the smallest hashes."""
    with connect(changes, DiffOptions()) as db:
        attach(db, "changes", [changes])
        wanted = f"FROM changes WHERE {ACTION} IN ('{ADD}', '{TEXT}') ORDER BY {ID_HASH} LIMIT {limit:d}"
        rows = db.sql(f"SELECT *, NULL AS source, NULL AS origin {wanted}").to_arrow_table()
    return _as_changes(rows).select(CHANGES.names)


def _as_changes(rows: pa.Table) -> pa.Table:
    """Give DuckDB's columns the types of CHANGES: UUIDs become the 16 bytes that they are."""
    wanted = pa.schema([*CHANGES, ("source", pa.string()), ("origin", pa.int64())])
    columns = []
    for item in wanted:
        column = rows.column(item.name)
        if isinstance(column.type, pa.BaseExtensionType):
            column = pa.chunked_array([chunk.storage for chunk in column.chunks], item.type)
        columns.append(column.cast(item.type))
    return pa.Table.from_arrays(columns, schema=wanted)
