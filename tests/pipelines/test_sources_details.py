"""What files promise beyond the behaviour suite: where they are found, what is fetched, and what bounds them."""

from __future__ import annotations

import gzip
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.contracts import ColumnMap, Source, Window
from pipelines.errors import InputError, SourceError, SourceMoved
from pipelines.schema import ID
from pipelines.sources import SourceSpec, batches, open_source
from pipelines.sources.files import FileSource
from pipelines.sources.parquet import ParquetFormat
from pipelines.sources.projection import Projection

LATER = datetime(2100, 1, 1, tzinfo=UTC)
ALL = Window(since=None, until=LATER)
TIMED = ColumnMap(updated_at="at")


def source(path: Path | str, columns: ColumnMap | None = None, fields: tuple[str, ...] = (), **more: Any) -> Source:
    return open_source(SourceSpec(**{"type": "parquet", "path": str(path), **more}), columns=columns or ColumnMap(), fields=fields)


def rows(read_from: Source, window: Window = ALL) -> list[dict[str, Any]]:
    return [row for shard in read_from.read(window) for batch in shard.open() for row in batch.to_pylist()]


def ids(read_from: Source, window: Window = ALL) -> list[Any]:
    return [row[ID] for row in rows(read_from, window)]


def write(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def spoil(path: Path, column: str, group: int = 0) -> None:
    """Overwrite a column chunk, so that reading it fails."""
    footer = pq.read_metadata(path)
    chunk = next(c for c in map(footer.row_group(group).column, range(footer.num_columns)) if c.path_in_schema == column)
    start = chunk.dictionary_page_offset if chunk.has_dictionary_page else chunk.data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(data)


# Finding files


def test_files_come_in_name_order_and_hidden_ones_not_at_all(tmp_path: Path) -> None:
    for name in ("b.parquet", "a.parquet", "sub/c.parquet", "_tmp/d.parquet", ".hidden.parquet", "sub/_e.parquet"):
        write(tmp_path / name, id=[name])
    (tmp_path / ".a.parquet.crc").write_bytes(b"crc")
    assert ids(source(tmp_path)) == ["a.parquet", "b.parquet", "sub/c.parquet"]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.parquet", ["a.parquet"]),
        ("**/*.parquet", ["a.parquet", "x/b.parquet", "x/y/c.parquet"]),
        ("x/*.parquet", ["x/b.parquet"]),
        ("?.par[!x]uet", ["a.parquet"]),
        ("*/y/[a-c].parquet", ["x/y/c.parquet"]),
        ("a.parquet", ["a.parquet"]),
    ],
)
def test_patterns_match_as_in_a_shell(tmp_path: Path, pattern: str, found: list[str]) -> None:
    for name in ("a.parquet", "x/b.parquet", "x/y/c.parquet", "x/_hidden/d.parquet"):
        write(tmp_path / name, id=[name])
    assert ids(source(tmp_path / pattern)) == found


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path: Path) -> None:
    write(tmp_path / "part[1].parquet", id=["bracket"])
    write(tmp_path / "part1.parquet", id=["plain"])
    assert ids(source(tmp_path / "part[1].parquet")) == ["bracket"]


def test_nothing_found_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"none/\*\.parquet: nothing to read"):
        source(tmp_path / "none/*.parquet").snapshot()


def test_a_file_that_appeared_after_the_pin_is_not_read_and_one_that_went_is_a_move(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", id=["a"])
    pinned = source(tmp_path)
    before = pinned.snapshot()
    write(tmp_path / "b.parquet", id=["b"])
    assert ids(pinned) == ["a"]
    assert before.moved(source(tmp_path).snapshot()) == [f"{tmp_path}/b.parquet is new"]
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(SourceMoved, match=r"a\.parquet is gone"):
        ids(pinned)


def test_a_file_rewritten_while_it_is_read_is_a_move(tmp_path: Path) -> None:
    path = tmp_path / "big.jsonl"
    path.write_text('{"id": "x"}\n' * 500_000)
    (shard,) = source(path, type="jsonl").read(ALL)
    stream = shard.open()
    next(stream)
    path.write_text('{"id": "y"}\n' * 500_000)
    with pytest.raises(SourceMoved, match="changed"):
        list(stream)


def test_a_file_of_another_format_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("hello, this is no Parquet")
    with pytest.raises(SourceError, match=r"readme\.txt cannot be read: .*`source\.type` fits"):
        ids(source(tmp_path))


# Parquet


def test_an_unmapped_column_is_never_fetched(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", id=["a", "b"], title=["x", "y"], junk=["j" * 99, "k" * 99])
    spoil(path, "junk")
    assert ids(source(path, fields=("title",))) == ["a", "b"]
    with pytest.raises(SourceError):
        ids(source(path, fields=("junk",)))


@pytest.mark.parametrize("kind", [pa.timestamp("ns"), pa.timestamp("us", "UTC"), pa.timestamp("s", "Asia/Tokyo"), pa.date32(), pa.date64()])
def test_row_groups_outside_the_window_are_never_fetched(tmp_path: Path, kind: pa.DataType) -> None:
    days = [datetime(2024, 1, 1, tzinfo=UTC) + timedelta(days=n) for n in range(30)]
    times = pa.array([(day - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(days=1) * 86400 for day in days], pa.int64())
    at = times.cast(pa.timestamp("s")).cast(kind) if pa.types.is_date(kind) else times.cast(pa.timestamp("s", kind.tz)).cast(kind)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": range(30), "at": at}), path, row_group_size=10)
    spoil(path, "id", group=0)
    window = Window(since=days[15], until=days[29])
    assert ids(source(path, TIMED), window) == list(range(15, 30))
    assert ids(source(path, TIMED), Window(since=days[10], until=days[20], bounded=True)) == list(range(10, 20))
    with pytest.raises(SourceError):
        ids(source(path, TIMED))


def test_a_large_file_is_split_by_row_groups_into_the_same_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": range(1000), "t": [str(n) * 50 for n in range(1000)]}), path, row_group_size=100)
    form = ParquetFormat(max_expansion=1000, shard_bytes=path.stat().st_size // 4)
    split = FileSource(SourceSpec(type="parquet", path=str(path)), Projection.of(ColumnMap(), fields=("t",)), form)
    assert 2 <= len(split.read(ALL)) <= 4
    assert rows(split) == rows(source(path, fields=("t",)))


def test_types_may_differ_between_files_and_a_column_may_be_absent_in_some(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", id=[1], price=[1.5])
    write(tmp_path / "b.parquet", id=["x"], price=["2,50"], brand=["Acme"])
    write(tmp_path / "c.parquet", id=pa.array(["y"]).dictionary_encode(), brand=pa.array(["B"]).dictionary_encode())
    read = rows(source(tmp_path, fields=("price", "brand")))
    assert read == [
        {"id": 1, "price": 1.5, "brand": None},
        {"id": "x", "price": "2,50", "brand": "Acme"},
        {"id": "y", "price": None, "brand": "B"},
    ]


def test_two_columns_of_one_name_are_refused_only_where_mapped(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_arrays([pa.array([n]) for n in "abc"], names=["id", "t", "t"]), tmp_path / "a.parquet")
    assert ids(source(tmp_path)) == ["a"]
    with pytest.raises(InputError, match="more than one column `t`"):
        ids(source(tmp_path, fields=("t",)))


def test_nested_attributes_arrive_as_they_are(tmp_path: Path) -> None:
    maps = pa.array([[("color", "red")], None], pa.map_(pa.string(), pa.string()))
    write(tmp_path / "a.parquet", id=["a", "b"], attrs=maps)
    read = rows(source(tmp_path, ColumnMap(attributes="attrs")))
    assert [row["attributes"] for row in read] == [[("color", "red")], None]


# Bounds


@pytest.mark.parametrize("declared", [True, False], ids=["declared as a dictionary", "declared as text"])
def test_a_parquet_bomb_comes_in_small_batches_and_is_stopped(tmp_path: Path, *, declared: bool) -> None:
    huge = pa.DictionaryArray.from_arrays(pa.array([0] * 4000, pa.int32()), ["x" * (1 << 20)])
    path = tmp_path / "bomb.parquet"
    pq.write_table(pa.table({"id": range(4000), "t": huge}), path, store_schema=declared)
    assert path.stat().st_size < 200_000
    sizes: list[int] = []

    def drain(stream: Iterator[pa.RecordBatch]) -> None:
        sizes.extend(batch.nbytes for batch in stream)

    before = pa.default_memory_pool().max_memory()
    (shard,) = source(path, fields=("t",)).read(ALL)
    with pytest.raises(SourceError, match=r"bomb\.parquet: .* raise `source\.max_expansion`"):
        drain(shard.open())
    assert max(sizes) <= batches.MAX_BYTES
    assert sum(sizes) <= 1 << 30
    # Decoded at once, the row group takes 4 GiB.
    assert pa.default_memory_pool().max_memory() <= max(before, 1 << 30)


@pytest.mark.parametrize("codec", ["gzip", "zstd"])
def test_a_compressed_bomb_is_stopped(tmp_path: Path, codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "_HARMLESS_BYTES", 1 << 20)
    line = b'{"id": "x", "t": "' + b" " * 1_000_000 + b'"}\n'
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as stream:
        stream.write(line * 16)
    path = tmp_path / "bomb.jsonl"
    path.write_bytes(sink.getvalue())
    with pytest.raises(SourceError, match=r"bomb\.jsonl: .* over 2 times.* raise `source\.max_expansion`"):
        ids(source(path, type="jsonl", max_expansion=2))
    assert len(ids(source(path, type="jsonl", max_expansion=1_000_000))) == 16


def test_a_truncated_archive_is_an_error_and_not_a_short_catalog(tmp_path: Path) -> None:
    path = tmp_path / "feed.csv"
    path.write_bytes(gzip.compress(b"id\n" + b"".join(b"%d\n" % n for n in range(10_000)))[:-9])
    with pytest.raises(SourceError, match=r"feed\.csv cannot be read: Truncated"):
        ids(source(path, type="csv"))


def test_wide_rows_come_in_batches_of_at_most_64_mib() -> None:
    table = pa.table({"id": range(100), "t": pa.repeat("x" * (2 << 20), 100)})
    (shard,) = open_source(SourceSpec(type="memory", data=table), columns=ColumnMap(), fields=("t",)).read(ALL)
    sizes = [(batch.num_rows, batch.nbytes) for batch in shard.open()]
    assert sum(count for count, _ in sizes) == 100
    assert max(size for _, size in sizes) <= 64 << 20


# Windows


def arrow_of(moment: datetime | None, kind: str) -> Any:
    if moment is None:
        return None
    seconds = (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(seconds=1)
    forms = {"naive": moment.replace(tzinfo=None), "date": moment.date(), "text": moment.isoformat(), "s": seconds, "ms": seconds * 1000}
    return forms.get(kind, moment)


KINDS = {
    "zoned": pa.timestamp("us", "UTC"),
    "naive": pa.timestamp("ms"),
    "nano": pa.timestamp("ns", "America/New_York"),
    "date": pa.date32(),
    "text": pa.string(),
    "s": pa.int64(),
    "ms": pa.int64(),
}
DAYS = st.integers(0, 9).map(lambda day: datetime(2024, 2, 25, tzinfo=UTC) + timedelta(days=day))
# At 1e8 seconds exactly, milliseconds would be read as seconds of the year 5138.
MOMENTS = DAYS | st.integers(10**8 + 1, 4 * 10**9).map(lambda seconds: datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds))
EDGES = st.tuples(MOMENTS, MOMENTS).filter(lambda pair: pair[0] < pair[1])
WINDOWS = st.builds(lambda edges, bounded: Window(since=edges[0], until=edges[1], bounded=bounded), EDGES, st.booleans())


def holds(window: Window, moment: datetime | None) -> bool:
    assert window.since is not None
    if moment is None:
        return not window.bounded
    return moment >= window.since and (not window.bounded or moment < window.until)


@settings(deadline=None, max_examples=80)
@given(times=st.lists(st.none() | MOMENTS, min_size=1, max_size=12), kind=st.sampled_from(sorted(KINDS)), window=WINDOWS)
def test_windows_hold_the_same_rows_as_their_definition(
    tmp_path_factory: pytest.TempPathFactory, times: list[datetime | None], kind: str, window: Window
) -> None:
    if kind == "date":
        times = [None if moment is None else moment.replace(hour=0, minute=0, second=0) for moment in times]
    table = pa.table({"id": range(len(times)), "at": pa.array([arrow_of(moment, kind) for moment in times], KINDS[kind])})
    path = tmp_path_factory.mktemp("window") / "a.parquet"
    pq.write_table(table, path, row_group_size=3)
    expected = [number for number, moment in enumerate(times) if holds(window, moment)]
    assert ids(source(path, TIMED), window) == expected
    memory = open_source(SourceSpec(type="memory", data=table), columns=TIMED, fields=())
    assert ids(memory, window) == expected


def test_times_that_cannot_be_read_or_lie_before_1970_count_as_none(tmp_path: Path) -> None:
    texts = ["2024-05-01T00:00:00+02:00", "yesterday", "0001-01-01", "2023-01-01", ""]
    window = Window(since=datetime(2024, 1, 1, tzinfo=UTC), until=LATER)
    assert ids(source(write(tmp_path / "t.parquet", id=range(5), at=texts), TIMED), window) == [0, 1, 2, 4]
    old = pa.array([datetime(1900, 1, 1), datetime(2000, 1, 1)])  # noqa: DTZ001 - a naive column is the point
    assert ids(source(write(tmp_path / "o.parquet", id=[0, 1], at=old), TIMED), window) == [0]


# Descriptions and places


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"type": "parqet", "path": "x"}, r"type `parqet` is unknown\. Did you mean `parquet`\?"),
        ({"type": "csv"}, r"needs `source\.path`"),
        ({"type": "sql", "uri": "sqlite:///x"}, r"needs `source\.query` or `source\.table`, and only one"),
        ({"type": "sql", "uri": "sqlite:///x", "query": "select 1", "table": "t"}, "and only one"),
        ({"type": "sql", "table": "t"}, r"needs `source\.uri`"),
        ({"type": "parquet", "path": "x", "delimiter": ";"}, r"`source\.delimiter` means nothing .* for csv"),
        ({"type": "csv", "path": "x", "delimiter": '"'}, "one ASCII character"),
        ({"type": "csv", "path": "x", "limit": 0}, r"`source\.limit` is 0"),
    ],
)
def test_a_wrong_description_says_what_is_right(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SourceSpec(**given)


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("gs://bucket/x", {}, r"`gs://` is not supported"),
        ("s3://bucket/x", {"acces_key_id": "k"}, r"Did you mean `access_key_id`\?"),
        ("s3://bucket/x", {"endpoint": "http://127.0.0.1:1"}, "not encrypted"),
        ("/tmp/x", {"region": "r"}, "are for buckets"),  # noqa: S108 - only a name; nothing is opened
    ],
)
def test_a_wrong_place_says_what_is_right(path: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        source(path, options=options).snapshot()


def test_a_wrong_attribute_pattern_is_refused() -> None:
    with pytest.raises(InputError, match="a prefix such as"):
        Projection.of(ColumnMap(attributes="*_attr*"), fields=())


def test_a_missing_engine_names_the_extra_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "pipelines.sources.delta", raising=False)
    monkeypatch.setitem(sys.modules, "deltalake", None)
    with pytest.raises(InputError, match=r"type `delta` needs `deltalake`: pip install 'catalog-embed\[delta\]'"):
        source("x", type="delta")


def test_errors_of_a_bucket_show_no_key(s3: Any) -> None:
    options = {**s3.options, "secret_access_key": "canary-key"}
    with pytest.raises(SourceError, match=r"s3://no-such-bucket") as caught:
        source("s3://no-such-bucket/x", options=options).snapshot()
    assert "canary" not in f"{caught.value} {caught.value.__cause__}"
