"""What changed between the published state and a catalog: one outer join on 16-byte hashes, in DuckDB, within a memory limit.

Inputs are Arrow tables or Parquet files; the outcome is a Parquet file of the changed rows, sorted by `id_hash`, and
counts. Row order, block sizes and thread counts change nothing. Both sides may be partitioned by `id_hash` and the
parts diffed anywhere: all rows of a product share one partition.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pyarrow as pa

from pipelines.diff.engine import DiffOptions, Rows, attach, connect, name_them, one
from pipelines.schema import (
    ACTION,
    ACTIONS,
    ADD,
    ATTR,
    ATTR_HASH,
    DELETE,
    ID,
    ID_HASH,
    LIVE,
    REJECTED,
    ROW,
    SHARD,
    STATE,
    TEXT,
    TEXT_BYTES,
    TEXT_HASH,
    TOMBSTONE,
    UPDATED_AT,
)

_CHANGE = f"{ID_HASH}, {ACTION}, {TEXT_HASH}, {ATTR_HASH}, {TEXT_BYTES}"


@dataclass(frozen=True, kw_only=True)
class Selection:
    """A part of the products, for a backfill: these id hashes, or all; of them only some actions, or everything made `again`."""

    id_hashes: pa.Array | None = None
    actions: tuple[str, ...] | None = None
    again: bool = False


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The outcome of a diff: the file of changed rows, how many of each action, and what became of the other rows.

    `conflicts` (id, shard, row) are rows that share an id with another that is equally new and has other content.
    `unseen` are products that are present and neither published nor in the part that was read: the window missed them.
    """

    changes: Path
    actions: Mapping[str, int]
    conflicts: pa.Table
    live: int
    tombstones: int
    duplicates: int
    unseen: int


@dataclass(frozen=True, kw_only=True)
class EmbedCounts:
    """What the changed texts cost: rows, distinct texts, those with a vector already, and the bytes of the rest."""

    rows: int
    texts: int
    reused: int
    text_bytes: int


def diff(
    previous: Rows,
    current: Rows,
    *,
    outcome: Path,
    absent_goes: bool = True,
    present: Rows | None = None,
    deletes: bool = True,
    selection: Selection | None = None,
    options: DiffOptions | None = None,
) -> Difference:
    """Classify every product of both sides and write the changed ones to `outcome`.

    A tombstone and a rejected row mean that the product must go. So does a missing row where `absent_goes`, as in a
    whole catalog; for a part of one, `present` may list all ids there are, and what it does not list goes. Without
    `deletes` nothing goes. Of several rows with one id the newest counts, one without a
    time before all others, because every window reads it; between equally new ones a live row, then the smaller hashes.
    """
    with connect(outcome, options or DiffOptions()) as db:
        num_previous, num_current = attach(db, "previous", previous), attach(db, "scanned", current)
        db.execute("CREATE VIEW current AS FROM scanned")
        chosen = _choose(db, selection)
        again = chosen if selection and selection.again else "false"
        _join(db, absent_goes=absent_goes, again=again)
        duplicates, conflicts = 0, _CONFLICTS.empty_table()
        if _has_duplicates(db, num_previous, num_current, absent_goes=absent_goes):
            duplicates, conflicts = _resolve(db)
            num_current = one(db, "SELECT count(*) FROM current")
            _join(db, absent_goes=absent_goes, again=again)
        # Whatever is not live changes something or matches nothing, so the join lists all of it.
        gone: dict[int, int] = dict(db.execute(f"SELECT {STATE}, count(*) FROM joined WHERE {STATE} <> {LIVE} GROUP BY 1").fetchall())
        unseen = 0
        if present is not None:
            attach(db, "present", present)
            unseen = _compare_ids(db)
        if not deletes:
            db.execute(f"DELETE FROM joined WHERE {ACTION} = '{DELETE}'")
        if selection is not None:
            kept = ", ".join(f"'{action}'" for action in selection.actions or ACTIONS)
            db.execute(f"DELETE FROM joined c WHERE NOT ({chosen} AND {ACTION} IN ({kept}))")
        actions: dict[str, int] = dict(db.execute(f"SELECT {ACTION}, count(*) FROM joined GROUP BY 1").fetchall())
        db.sql(f"SELECT {_CHANGE} FROM joined WHERE {ACTION} IS NOT NULL ORDER BY {ID_HASH}").write_parquet(str(outcome))
    return Difference(
        changes=outcome,
        actions={action: actions.get(action, 0) for action in ACTIONS},
        conflicts=conflicts,
        live=num_current - sum(gone.values()),
        tombstones=gone.get(TOMBSTONE, 0),
        duplicates=duplicates,
        unseen=unseen,
    )


_CONFLICTS = pa.schema([(ID, pa.string()), (SHARD, pa.string()), (ROW, pa.int64())])


def _choose(db: duckdb.DuckDBPyConnection, selection: Selection | None) -> str:
    """Make the chosen id hashes visible, and return the condition that a row `c` is among them."""
    if selection is None or selection.id_hashes is None:
        return "true"
    attach(db, "chosen", pa.table({ID_HASH: selection.id_hashes}))
    return f"c.{ID_HASH} IN (SELECT {ID_HASH} FROM chosen)"


def _join(db: duckdb.DuckDBPyConnection, *, absent_goes: bool, again: str) -> None:
    """Join both sides and keep every row that is not plainly the same, or shall be made `again`."""
    kind = "FULL OUTER" if absent_goes else "LEFT"
    db.execute(f"""
        CREATE OR REPLACE TEMP TABLE joined AS
        SELECT * FROM (
            SELECT coalesce(c.{ID_HASH}, p.{ID_HASH}) AS {ID_HASH},
                   CASE WHEN c.{ID_HASH} IS NULL THEN '{DELETE}'
                        WHEN c.{STATE} <> {LIVE} THEN CASE WHEN p.{ID_HASH} IS NULL THEN NULL ELSE '{DELETE}' END
                        WHEN p.{ID_HASH} IS NULL THEN '{ADD}'
                        WHEN c.{TEXT_HASH} <> p.{TEXT_HASH} OR {again} THEN '{TEXT}'
                        WHEN c.{ATTR_HASH} <> p.{ATTR_HASH} THEN '{ATTR}'
                        ELSE 'same' END AS {ACTION},
                   c.{TEXT_HASH}, c.{ATTR_HASH}, c.{TEXT_BYTES}, c.{STATE}, p.{ID_HASH} IS NOT NULL AS has_previous
            FROM current c {kind} JOIN previous p ON c.{ID_HASH} = p.{ID_HASH}
        ) WHERE {ACTION} IS DISTINCT FROM 'same'""")


def _compare_ids(db: duckdb.DuckDBPyConnection) -> int:
    """Let go of published products that are no longer present; return how many present ones nobody has seen."""
    db.execute(f"""
        INSERT INTO joined SELECT {ID_HASH}, '{DELETE}', NULL, NULL, NULL, NULL, true
        FROM previous ANTI JOIN present USING ({ID_HASH}) ANTI JOIN current USING ({ID_HASH})""")
    return one(
        db,
        f"""SELECT count(*) FROM (SELECT DISTINCT {ID_HASH} FROM present)
            ANTI JOIN previous USING ({ID_HASH}) ANTI JOIN current USING ({ID_HASH})""",
    )


def _has_duplicates(db: duckdb.DuckDBPyConnection, num_previous: int, num_current: int, *, absent_goes: bool) -> bool:
    """Tell whether an id occurs twice in `current`, from the join's own counts where they say it.

    The published state has no duplicates. So a full join matches as many current rows as previous ones, unless an id
    came twice; only ids that matched nothing are left to count. This saves a pass that costs as much as the join.
    """
    unmatched = f"FROM joined WHERE {STATE} IS NOT NULL AND NOT has_previous" if absent_goes else "FROM current"
    if one(db, f"SELECT count(*) - count(DISTINCT {ID_HASH}) {unmatched}"):
        return True
    if not absent_goes:
        return False
    missing = one(db, f"SELECT count(*) FROM joined WHERE {STATE} IS NULL")
    return num_current - one(db, f"SELECT count(*) {unmatched}") != num_previous - missing


def _resolve(db: duckdb.DuckDBPyConnection) -> tuple[int, pa.Table]:
    """Leave one row for each id in `current`; return the number of duplicates dropped and the conflicting rows."""
    db.execute(f"""
        CREATE TEMP TABLE twice AS SELECT {ID_HASH} FROM scanned GROUP BY 1 HAVING count(*) > 1;
        CREATE TEMP TABLE ranked AS
        SELECT *, row_number() OVER best AS place,
               first_value({UPDATED_AT}) OVER best AS best_at,
               first_value(({STATE}, {TEXT_HASH}, {ATTR_HASH})) OVER best AS best_content
        FROM scanned SEMI JOIN twice USING ({ID_HASH})
        WINDOW best AS (PARTITION BY {ID_HASH} ORDER BY {UPDATED_AT} DESC NULLS FIRST, {STATE}, {TEXT_HASH}, {ATTR_HASH}, {SHARD}, {ROW});
        CREATE OR REPLACE VIEW current AS
        SELECT * FROM scanned ANTI JOIN twice USING ({ID_HASH})
        UNION ALL BY NAME SELECT * EXCLUDE (place, best_at, best_content) FROM ranked WHERE place = 1""")
    conflict = f"{UPDATED_AT} IS NOT DISTINCT FROM best_at AND ({STATE}, {TEXT_HASH}, {ATTR_HASH}) IS DISTINCT FROM best_content"
    losers = f"FROM ranked WHERE place > 1 AND {STATE} <> {REJECTED}"
    conflicts = db.sql(f"SELECT {ID}, {SHARD}, {ROW} {losers} AND {conflict} ORDER BY ALL").to_arrow_table()
    duplicates = one(db, f"SELECT count(*) {losers} AND NOT ({conflict})")
    return duplicates, conflicts.cast(_CONFLICTS)


def combine(parts: Sequence[Difference], *, outcome: Path, options: DiffOptions | None = None) -> Difference:
    """Add up the outcomes of partitions: what one diff of everything would have returned."""
    merge([part.changes for part in parts], by=(ID_HASH,), outcome=outcome, options=options)
    total = {name: sum(getattr(part, name) for part in parts) for name in ("live", "tombstones", "duplicates", "unseen")}
    conflicts = pa.concat_tables([part.conflicts for part in parts])
    actions = {action: sum(part.actions[action] for part in parts) for action in ACTIONS}
    in_order = conflicts.sort_by([(name, "ascending") for name in _CONFLICTS.names])
    return Difference(changes=outcome, actions=actions, conflicts=in_order, **total)


def count_texts(changes: Path, previous: Rows, *, options: DiffOptions | None = None) -> EmbedCounts:
    """Count what a plan must embed: identical texts once, texts that `previous` holds not at all."""
    with connect(changes, options or DiffOptions()) as db:
        attach(db, "previous", previous)
        attach(db, "changes", [changes])
        db.execute(f"""
            CREATE TEMP TABLE texts AS SELECT {TEXT_HASH}, any_value({TEXT_BYTES}) AS {TEXT_BYTES}, count(*) AS num_rows
            FROM changes WHERE {ACTION} IN ('{ADD}', '{TEXT}') GROUP BY 1;
            CREATE TEMP TABLE known AS SELECT {TEXT_HASH} FROM texts SEMI JOIN previous USING ({TEXT_HASH})""")
        rows, texts = db.execute("SELECT coalesce(sum(num_rows), 0), count(*) FROM texts").fetchall()[0]
        size = one(db, f"SELECT coalesce(sum({TEXT_BYTES}), 0) FROM texts ANTI JOIN known USING ({TEXT_HASH})")
        return EmbedCounts(rows=int(rows), texts=texts, reused=one(db, "SELECT count(*) FROM known"), text_bytes=size)


def first_ids(changes: Path, previous: Rows, current: Rows, *, limit: int) -> dict[str, list[str]]:
    """Return up to `limit` ids for each action, by their hashes, so that the choice is always the same."""
    with connect(changes, DiffOptions()) as db:
        chosen = f"FROM changes QUALIFY row_number() OVER (PARTITION BY {ACTION} ORDER BY {ID_HASH}) <= {limit:d}"
        name_them(db, changes, previous, current, chosen=chosen)
        rows = db.execute(f"SELECT {ACTION}, {ID} FROM changes JOIN names USING ({ID_HASH}) ORDER BY {ID_HASH}").fetchall()
    return {action: [name for found, name in rows if found == action] for action in ACTIONS}


def merge(parts: Sequence[Path], *, by: Sequence[str], outcome: Path, options: DiffOptions | None = None) -> None:
    """Write the rows of several files into one, sorted by columns; spills where memory ends."""
    with connect(outcome, options or DiffOptions()) as db:
        attach(db, "parts", parts)
        db.sql(f"SELECT * FROM parts ORDER BY {', '.join(by)}").write_parquet(str(outcome))
