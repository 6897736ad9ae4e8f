"""The one door to DuckDB: a private database within a memory limit, Arrow or Parquet in, Parquet out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import InputError
from pipelines.hashes import as_uuids
from pipelines.schema import ID, ID_HASH

Rows: TypeAlias = pa.Table | Sequence[Path]

_LEAST_MB = 32


@dataclass(frozen=True, kw_only=True)
class DiffOptions:
    """How much the join may use. Past `memory_mb` it spills beside the outcome."""

    memory_mb: int = 1024
    threads: int = 2

    def __post_init__(self) -> None:
        if self.memory_mb < _LEAST_MB or self.threads < 1:
            raise InputError(f"the diff needs at least {_LEAST_MB} MB and one thread, not {self.memory_mb} and {self.threads}.")


@contextmanager
def connect(beside: Path, options: DiffOptions) -> Iterator[duckdb.DuckDBPyConnection]:
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


def attach(db: duckdb.DuckDBPyConnection, name: str, rows: Rows) -> int:
    """Make rows visible under a name, and return how many there are."""
    if isinstance(rows, pa.Table):
        db.from_arrow(as_uuids(rows)).create_view(name)
        return int(rows.num_rows)
    db.read_parquet([str(path) for path in rows]).create_view(name)
    return sum(pq.read_metadata(path).num_rows for path in rows)


def one(db: duckdb.DuckDBPyConnection, query: str) -> int:
    """Return the one number that a query answers with."""
    return int(db.execute(query).fetchall()[0][0])


def name_them(db: duckdb.DuckDBPyConnection, changes: Path, previous: Rows, current: Rows, *, chosen: str) -> None:
    """Make the table `names`: the id behind every chosen id hash."""
    for name, rows in (("previous", previous), ("current", current), ("changes", [changes])):
        attach(db, name, rows)
    db.execute(f"""
        CREATE TEMP TABLE names AS
        SELECT {ID_HASH}, any_value({ID}) AS {ID}
        FROM (SELECT {ID_HASH}, {ID} FROM current UNION ALL SELECT {ID_HASH}, {ID} FROM previous)
        SEMI JOIN (SELECT {ID_HASH} {chosen}) USING ({ID_HASH}) GROUP BY 1""")
