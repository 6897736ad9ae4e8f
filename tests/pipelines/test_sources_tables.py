"""What tables and databases promise beyond the behaviour suite: versions, partitions, push-down, read-only, no secrets."""

from __future__ import annotations

import shutil
import traceback
import uuid
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import deltalake
import lance
import pyarrow as pa
import pytest

from pipelines.contracts import ColumnMap, Source, Window
from pipelines.errors import InputError, SourceError, SourceMoved
from pipelines.schema import ID
from pipelines.sources import SourceSpec, open_source
from pipelines.sources.statement import checked, quoted

pytest_plugins = ["tests.postgres"]

LATER = datetime(2100, 1, 1, tzinfo=UTC)
ALL = Window(since=None, until=LATER)
TIMED = ColumnMap(updated_at="at")


def source(spec: dict[str, Any], columns: ColumnMap | None = None, fields: tuple[str, ...] = ()) -> Source:
    return open_source(SourceSpec(**spec), columns=columns or ColumnMap(), fields=fields)


def rows(read_from: Source, window: Window = ALL) -> list[dict[str, Any]]:
    return [row for shard in read_from.read(window) for batch in shard.open() for row in batch.to_pylist()]


def ids(read_from: Source, window: Window = ALL) -> list[Any]:
    return [row[ID] for row in rows(read_from, window)]


# Lance


def test_lance_reads_an_older_version_when_told_to(tmp_path: Path) -> None:
    path = str(tmp_path / "t.lance")
    lance.write_dataset(pa.table({"id": [1, 2]}), path)
    lance.write_dataset(pa.table({"id": [3]}), path, mode="append")
    assert ids(source({"type": "lance", "path": path})) == [1, 2, 3]
    assert ids(source({"type": "lance", "path": path, "version": 1})) == [1, 2]
    with pytest.raises(SourceError, match=r"t\.lance version 9 cannot be opened"):
        source({"type": "lance", "path": path, "version": 9}).snapshot()


def test_a_lance_table_replaced_by_another_with_the_same_version_is_a_move(tmp_path: Path) -> None:
    path = tmp_path / "t.lance"
    lance.write_dataset(pa.table({"id": [1, 2]}), str(path))
    pinned = source({"type": "lance", "path": str(path)})
    before, shards = pinned.snapshot(), pinned.read(ALL)
    shutil.rmtree(path)
    lance.write_dataset(pa.table({"id": [1, 9]}), str(path))
    assert source({"type": "lance", "path": str(path)}).snapshot() != before
    with pytest.raises(SourceMoved, match="replaced"):
        list(shards[0].open())
    shutil.rmtree(path)
    with pytest.raises(SourceMoved, match="no longer there"):
        list(shards[0].open())


def test_lance_rows_deleted_in_the_table_are_gone_and_move_the_pin(tmp_path: Path) -> None:
    path = str(tmp_path / "t.lance")
    table = lance.write_dataset(pa.table({"id": [1, 2, 3]}), path)
    before = source({"type": "lance", "path": path}).snapshot()
    table.delete("id = 2")
    after = source({"type": "lance", "path": path})
    assert before.moved(after.snapshot())
    assert ids(after) == [1, 3]


@pytest.mark.parametrize("name", ["at", "Modified At", "d'é\"x"])
def test_lance_filters_by_any_column_name(tmp_path: Path, name: str) -> None:
    path = str(tmp_path / "t.lance")
    times = [datetime(2024, 1, day, tzinfo=UTC) for day in (1, 2, 3)]
    lance.write_dataset(pa.table({"id": [1, 2, 3], name: pa.array(times, pa.timestamp("us", "UTC"))}), path)
    window = Window(since=times[1], until=LATER)
    assert ids(source({"type": "lance", "path": path}, ColumnMap(updated_at=name)), window) == [2, 3]


def test_lance_and_delta_are_read_from_a_bucket(s3: Any) -> None:
    table = pa.table({"id": ["a", "b"], "t": ["x", None]})
    root = f"s3://{s3.bucket()}"
    lance.write_dataset(table, f"{root}/t.lance", storage_options=s3.options)
    deltalake.write_deltalake(f"{root}/delta", table, storage_options={**s3.options, "aws_s3_allow_unsafe_rename": "true"})
    for kind, name in (("lance", "t.lance"), ("delta", "delta")):
        opened = source({"type": kind, "path": f"{root}/{name}", "options": s3.options}, fields=("t",))
        assert opened.snapshot().bytes > 0
        assert rows(opened) == table.to_pylist()


# Delta


def test_delta_reads_partitions_whose_values_are_no_file_names(tmp_path: Path) -> None:
    path = str(tmp_path / "delta")
    table = pa.table({"id": [1, 2, 3], "brand": ["a b/ü%20=", None, "x"], "day": [date(2024, 1, d) for d in (1, 2, 3)]})
    deltalake.write_deltalake(path, table, partition_by=["brand", "day"])
    opened = source({"type": "delta", "path": path}, ColumnMap(updated_at="day"), ("brand",))
    read = sorted(rows(opened), key=lambda row: int(row[ID]))
    assert [(row[ID], row["brand"], row["updated_at"]) for row in read] == [
        (row["id"], row["brand"], row["day"]) for row in table.to_pylist()
    ]
    window = Window(since=datetime(2024, 1, 2, tzinfo=UTC), until=LATER)
    assert sorted(ids(opened, window)) == [2, 3]


def test_delta_skips_files_by_their_statistics(tmp_path: Path) -> None:
    path = str(tmp_path / "delta")
    times = [datetime(2024, 1, day, tzinfo=UTC) for day in range(1, 5)]
    for number, moment in enumerate(times):
        deltalake.write_deltalake(path, pa.table({"id": [number], "at": pa.array([moment], pa.timestamp("us", "UTC"))}), mode="append")
    opened = source({"type": "delta", "path": path}, TIMED)
    assert len(opened.read(ALL)) == 4
    assert len(opened.read(Window(since=times[2], until=LATER))) == 2
    assert sorted(ids(opened, Window(since=times[2], until=LATER))) == [2, 3]


def test_delta_columns_added_later_are_null_before(tmp_path: Path) -> None:
    path = str(tmp_path / "delta")
    deltalake.write_deltalake(path, pa.table({"id": [1]}))
    deltalake.write_deltalake(path, pa.table({"id": [2], "t": ["x"]}), mode="append", schema_mode="merge")
    read = sorted(rows(source({"type": "delta", "path": path}, fields=("t",))), key=lambda row: int(row[ID]))
    assert read == [{"id": 1, "t": None}, {"id": 2, "t": "x"}]
    assert ids(source({"type": "delta", "path": path, "version": 0})) == [1]


def test_a_delta_file_that_was_vacuumed_is_a_move(tmp_path: Path) -> None:
    path = tmp_path / "delta"
    deltalake.write_deltalake(str(path), pa.table({"id": [1]}))
    shards = source({"type": "delta", "path": str(path)}).read(ALL)
    next(path.glob("*.parquet")).unlink()
    with pytest.raises(SourceMoved, match="is gone"):
        list(shards[0].open())


def test_a_delta_table_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot be opened"):
        source({"type": "delta", "path": str(tmp_path / "none")}).snapshot()


# SQL text


@pytest.mark.parametrize(
    "query",
    [
        "select 1 as id",
        "  WITH x AS (SELECT 1 AS id) SELECT * FROM x ; ",
        "-- all; of (it\nselect ';' as \"a;(\" /* ) ; */ from t -- end",
        "select $q$ ; ) $q$ as id",
        "select 'it''s ; (' as id",
    ],
)
def test_one_select_is_accepted(query: str) -> None:
    assert checked(query) == query.strip().removesuffix(";").rstrip()


@pytest.mark.parametrize(
    "query",
    [
        "delete from t",
        "",
        "select 1; select 2",
        "select 1) as q; drop table t --",
        "select (1",
        "select 1 /* ; */; select ';'",
        "update t set id = 1",
    ],
)
def test_anything_but_one_select_is_refused(query: str) -> None:
    with pytest.raises(InputError, match=r"source\.query"):
        checked(query)


def test_identifiers_are_quoted() -> None:
    assert quoted('a"; DROP') == '"a""; DROP"'
    with pytest.raises(InputError):
        quoted("a\0b")


# SQLite


def sqlite_file(tmp_path: Path, script: str) -> str:
    import sqlite3

    with sqlite3.connect(tmp_path / "shop.db") as connection:
        connection.executescript(script)
    connection.close()
    return f"sqlite://{tmp_path}/shop.db"


def test_sqlite_is_opened_for_reading_only_and_its_text_times_are_filtered(tmp_path: Path) -> None:
    script = "create table t(id text, at text); insert into t values ('a', '2024-01-01'), ('b', '2024-02-01T00:00:00+01:00'), ('c', null);"
    uri = sqlite_file(tmp_path, script)
    before = (tmp_path / "shop.db").read_bytes()
    opened = source({"type": "sql", "uri": uri, "query": "select * from t -- all"}, TIMED)
    assert ids(opened, Window(since=datetime(2024, 1, 31, 23, tzinfo=UTC), until=LATER)) == ["b", "c"]
    assert ids(opened, Window(since=datetime(2024, 1, 31, 23, 0, 1, tzinfo=UTC), until=LATER)) == ["c"]
    assert (tmp_path / "shop.db").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shop.db"]


def test_a_database_file_that_is_not_there_is_an_error_and_not_a_new_file(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"none\.db"):
        source({"type": "sql", "uri": f"sqlite://{tmp_path}/none.db", "table": "t"}).snapshot()
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_database_is_refused_without_its_uri() -> None:
    with pytest.raises(InputError, match="unknown scheme") as caught:
        source({"type": "sql", "uri": "mysql://u:canary@host/db", "table": "t"})
    assert "canary" not in str(caught.value)


# PostgreSQL


def execute(uri: str, *statements: str) -> None:
    """Change the database, by the same driver but by none of the product's code."""
    from adbc_driver_postgresql import dbapi

    with dbapi.connect(uri) as connection, connection.cursor() as cursor:
        for statement in statements:
            cursor.execute(statement)
        connection.commit()


def postgres_table(uri: str, columns: str, values: str) -> str:
    name = f"t_{uuid.uuid4().hex[:8]}"
    execute(uri, f"CREATE TABLE {name} ({columns})", f"INSERT INTO {name} {values}")
    return name


def test_postgres_shards_hold_every_row_once_ids_that_are_null_included(postgres: str) -> None:
    name = postgres_table(postgres, "id bigint, t text", "SELECT nullif(g, 7), 'x' FROM generate_series(1, 5000) g")
    opened = source({"type": "sql", "uri": postgres, "table": f"public.{name}", "shards": 4}, fields=("t",))
    counts = [sum(batch.num_rows for batch in shard.open()) for shard in opened.read(ALL)]
    assert len(counts) == 4
    assert min(counts) > 1000
    read = ids(opened)
    assert read.count(None) == 1
    assert sorted(number for number in read if number is not None) == [number for number in range(1, 5001) if number != 7]


@pytest.mark.parametrize("kind", ["timestamptz", "timestamp", "date", "text"])
def test_postgres_filters_every_kind_of_time(postgres: str, kind: str) -> None:
    values = f"VALUES (1, CAST('2024-01-01' AS {kind})), (2, CAST('2024-02-01' AS {kind})), (3, NULL), (4, CAST('0001-01-01' AS {kind}))"
    opened = source({"type": "sql", "uri": postgres, "table": postgres_table(postgres, f"id int, at {kind}", values)}, TIMED)
    since = datetime(2024, 2, 1, tzinfo=UTC)
    assert sorted(ids(opened, Window(since=since, until=LATER))) == [2, 3, 4]
    assert ids(opened, Window(since=since - timedelta(days=40), until=since, bounded=True)) == [1]


def test_postgres_applies_the_window_in_the_server(postgres: str) -> None:
    """Rows outside the window would divide by zero if the server computed them."""
    name = postgres_table(postgres, "id int, at timestamptz", "VALUES (0, '2024-01-01'), (1, '2024-02-01')")
    opened = source({"type": "sql", "uri": postgres, "query": f"SELECT id, at, 1 / id AS t FROM {name}"}, TIMED, ("t",))  # noqa: S608 - a test's own text
    assert ids(opened, Window(since=datetime(2024, 2, 1, tzinfo=UTC), until=LATER)) == [1]
    with pytest.raises(SourceError, match="division by zero"):
        ids(opened)


def test_postgres_is_read_in_batches_and_not_at_once(postgres: str) -> None:
    name = postgres_table(postgres, "id int, at timestamptz, t text", "SELECT g, now(), repeat('x', 1000) FROM generate_series(1, 40000) g")
    opened = source({"type": "sql", "uri": postgres, "table": name}, TIMED, ("t",))
    (shard,) = opened.read(Window(since=datetime(2000, 1, 1, tzinfo=UTC), until=LATER))
    sizes = [batch.num_rows for batch in shard.open()]
    assert len(sizes) > 1
    assert sum(sizes) == 40_000


def test_postgres_refuses_to_write_whatever_the_query_calls(postgres: str) -> None:
    name = postgres_table(postgres, "id int", "VALUES (1)")
    wipe = f"DELETE FROM {name} RETURNING id"  # noqa: S608 - a test's own text
    execute(postgres, f"CREATE FUNCTION wipe_{name}() RETURNS int LANGUAGE sql AS '{wipe}'")
    with pytest.raises(SourceError, match="read-only transaction"):
        source({"type": "sql", "uri": postgres, "query": f"SELECT wipe_{name}() AS id"}).snapshot()
    assert ids(source({"type": "sql", "uri": postgres, "table": name})) == [1]


def test_a_postgres_value_that_changes_without_its_time_moves_the_pin(postgres: str) -> None:
    name = postgres_table(postgres, "id int, at timestamptz, t text, other text", "VALUES (1, '2024-01-01', 'a', 'o')")
    opened = source({"type": "sql", "uri": postgres, "table": name}, TIMED, ("t",))
    before = opened.snapshot()
    for column, moved in (("other", False), ("t", True)):
        execute(postgres, f"UPDATE {name} SET {column} = 'b'")  # noqa: S608 - a test's own text
        assert (opened.snapshot() != before) is moved


def test_no_error_of_a_database_shows_its_password(postgres: str) -> None:
    address = postgres.partition("@")[2].partition("/")[0]
    uris = {
        "wrong password": postgres.replace("canary-", "canary-wrong-"),
        "wrong port": f"postgresql://shop:canary-port@{address.partition(':')[0]}:1/postgres",
        "no number": "postgresql://shop:canary-text@127.0.0.1:notaport/postgres",
        "bad parameter": f"{postgres}?canary_parameter=1",
    }
    for uri in [*uris.values(), postgres]:
        opened = source({"type": "sql", "uri": uri, "query": "SELECT no_such_column AS id"})
        with pytest.raises(SourceError) as caught:
            opened.snapshot()
        shown = "".join(traceback.format_exception(caught.value)) + repr(opened)
        assert "canary-" not in shown
        assert "postgresql://127.0.0.1" in str(caught.value)
