"""What changed between the published state and a catalog: one outer join on 16-byte hashes, in DuckDB, within a memory limit.

Inputs are Arrow tables or Parquet files; the outcome is a Parquet file of the changed rows, sorted by `id_hash`, and
counts. Row order, block sizes and thread counts change nothing. Both sides may be partitioned by `id_hash` and the
parts diffed anywhere: all rows of a product share one partition.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import InputError
from pipelines.hashes import as_uuids
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

Rows: TypeAlias = pa.Table | Sequence[Path]

_LEAST_MB = 32

_CHANGE = f"{ID_HASH}, {ACTION}, {TEXT_HASH}, {ATTR_HASH}, {TEXT_BYTES}"


@dataclass(frozen=True, kw_only=True)
class DiffOptions:
    """How much the join may use. Past `memory_mb` it spills beside the outcome."""

    memory_mb: int = 1024
    threads: int = 2

    def __post_init__(self) -> None:
        if self.memory_mb < _LEAST_MB or self.threads < 1:
            raise InputError(f"the diff needs at least {_LEAST_MB} MB and one thread, not {self.memory_mb} and {self.threads}.")


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
    options: DiffOptions | None = None,
) -> Difference:
    """Classify every product of both sides and write the changed ones to `outcome`.

    A tombstone and a rejected row mean that the product must go. So does a missing row where `absent_goes`, as in a
    whole catalog; for a part of one, `present` may list all ids there are, and what it does not list goes. Without
    `deletes` nothing goes. Of several rows with one id the newest counts, one without a
    time before all others, because every window reads it; between equally new ones a live row, then the smaller hashes.
    """
    with _connect(outcome, options or DiffOptions()) as db:
        num_previous, num_current = _attach(db, "previous", previous), _attach(db, "scanned", current)
        db.execute("CREATE VIEW current AS FROM scanned")
        _join(db, absent_goes=absent_goes)
        duplicates, conflicts = 0, _CONFLICTS.empty_table()
        if _has_duplicates(db, num_previous, num_current, absent_goes=absent_goes):
            duplicates, conflicts = _resolve(db)
            num_current = _one(db, "SELECT count(*) FROM current")
            _join(db, absent_goes=absent_goes)
        # Whatever is not live changes something or matches nothing, so the join lists all of it.
        gone: dict[int, int] = dict(db.execute(f"SELECT {STATE}, count(*) FROM joined WHERE {STATE} <> {LIVE} GROUP BY 1").fetchall())
        unseen = 0
        if present is not None:
            _attach(db, "present", present)
            unseen = _compare_ids(db)
        if not deletes:
            db.execute(f"DELETE FROM joined WHERE {ACTION} = '{DELETE}'")
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


def _join(db: duckdb.DuckDBPyConnection, *, absent_goes: bool) -> None:
    """Join both sides and keep every row that is not plainly the same."""
    kind = "FULL OUTER" if absent_goes else "LEFT"
    db.execute(f"""
        CREATE OR REPLACE TEMP TABLE joined AS
        SELECT * FROM (
            SELECT coalesce(c.{ID_HASH}, p.{ID_HASH}) AS {ID_HASH},
                   CASE WHEN c.{ID_HASH} IS NULL THEN '{DELETE}'
                        WHEN c.{STATE} <> {LIVE} THEN CASE WHEN p.{ID_HASH} IS NULL THEN NULL ELSE '{DELETE}' END
                        WHEN p.{ID_HASH} IS NULL THEN '{ADD}'
                        WHEN c.{TEXT_HASH} <> p.{TEXT_HASH} THEN '{TEXT}'
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
    return _one(
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
    if _one(db, f"SELECT count(*) - count(DISTINCT {ID_HASH}) {unmatched}"):
        return True
    if not absent_goes:
        return False
    missing = _one(db, f"SELECT count(*) FROM joined WHERE {STATE} IS NULL")
    return num_current - _one(db, f"SELECT count(*) {unmatched}") != num_previous - missing


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
    duplicates = _one(db, f"SELECT count(*) {losers} AND NOT ({conflict})")
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
    with _connect(changes, options or DiffOptions()) as db:
        _attach(db, "previous", previous)
        _attach(db, "changes", [changes])
        db.execute(f"""
            CREATE TEMP TABLE texts AS SELECT {TEXT_HASH}, any_value({TEXT_BYTES}) AS {TEXT_BYTES}, count(*) AS num_rows
            FROM changes WHERE {ACTION} IN ('{ADD}', '{TEXT}') GROUP BY 1;
            CREATE TEMP TABLE known AS SELECT {TEXT_HASH} FROM texts SEMI JOIN previous USING ({TEXT_HASH})""")
        rows, texts = db.execute("SELECT coalesce(sum(num_rows), 0), count(*) FROM texts").fetchall()[0]
        size = _one(db, f"SELECT coalesce(sum({TEXT_BYTES}), 0) FROM texts ANTI JOIN known USING ({TEXT_HASH})")
        return EmbedCounts(rows=int(rows), texts=texts, reused=_one(db, "SELECT count(*) FROM known"), text_bytes=size)


def with_ids(changes: Path, previous: Rows, current: Rows, *, outcome: Path, options: DiffOptions | None = None) -> None:
    """Write the changes once more, each with the product's id: the form in which a plan is saved."""
    with _connect(outcome, options or DiffOptions()) as db:
        _name(db, changes, previous, current, chosen="FROM changes")
        db.sql(f"SELECT {ID}, {_CHANGE} FROM changes JOIN names USING ({ID_HASH}) ORDER BY {ID_HASH}").write_parquet(str(outcome))


def first_ids(changes: Path, previous: Rows, current: Rows, *, limit: int) -> dict[str, list[str]]:
    """Return up to `limit` ids for each action, by their hashes, so that the choice is always the same."""
    with _connect(changes, DiffOptions()) as db:
        chosen = f"FROM changes QUALIFY row_number() OVER (PARTITION BY {ACTION} ORDER BY {ID_HASH}) <= {limit:d}"
        _name(db, changes, previous, current, chosen=chosen)
        rows = db.execute(f"SELECT {ACTION}, {ID} FROM changes JOIN names USING ({ID_HASH}) ORDER BY {ID_HASH}").fetchall()
    return {action: [name for found, name in rows if found == action] for action in ACTIONS}


def _name(db: duckdb.DuckDBPyConnection, changes: Path, previous: Rows, current: Rows, *, chosen: str) -> None:
    """Make the table `names`: the id behind every chosen id hash."""
    for name, rows in (("previous", previous), ("current", current), ("changes", [changes])):
        _attach(db, name, rows)
    db.execute(f"""
        CREATE TEMP TABLE names AS
        SELECT {ID_HASH}, any_value({ID}) AS {ID}
        FROM (SELECT {ID_HASH}, {ID} FROM current UNION ALL SELECT {ID_HASH}, {ID} FROM previous)
        SEMI JOIN (SELECT {ID_HASH} {chosen}) USING ({ID_HASH}) GROUP BY 1""")


def merge(parts: Sequence[Path], *, by: Sequence[str], outcome: Path, options: DiffOptions | None = None) -> None:
    """Write the rows of several files into one, sorted by columns; spills where memory ends."""
    with _connect(outcome, options or DiffOptions()) as db:
        _attach(db, "parts", parts)
        db.sql(f"SELECT * FROM parts ORDER BY {', '.join(by)}").write_parquet(str(outcome))


@contextmanager
def _connect(beside: Path, options: DiffOptions) -> Iterator[duckdb.DuckDBPyConnection]:
    """Open a private in-memory database that spills next to a file and keeps to its limits."""
    config = {
        "memory_limit": f"{options.memory_mb}MB",
        "threads": options.threads,
        "temp_directory": str(beside.with_suffix(".spill")),
        "preserve_insertion_order": False,
        "arrow_lossless_conversion": True,
    }
    with duckdb.connect(config=config) as db:
        yield db


def _attach(db: duckdb.DuckDBPyConnection, name: str, rows: Rows) -> int:
    """Make rows visible under a name, and return how many there are."""
    if isinstance(rows, pa.Table):
        db.from_arrow(as_uuids(rows)).create_view(name)
        return int(rows.num_rows)
    db.read_parquet([str(path) for path in rows]).create_view(name)
    return sum(pq.read_metadata(path).num_rows for path in rows)


def _one(db: duckdb.DuckDBPyConnection, query: str) -> int:
    return int(db.execute(query).fetchall()[0][0])
