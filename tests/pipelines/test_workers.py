"""Workers fail in the ways that workers fail; a scan then ends, and says why."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.errors import CatalogEmbedError, InputError, SourceError
from pipelines.workers import scan, spread

pytestmark = pytest.mark.usefixtures("ray_cluster")


@dataclass(frozen=True)
class Numbers:
    """A shard of two batches."""

    start: int

    @property
    def name(self) -> str:
        return f"numbers {self.start}"

    def open(self) -> Iterator[pa.RecordBatch]:
        for begin in (self.start, self.start + 3):
            yield pa.record_batch({"n": list(range(begin, begin + 3))})


@dataclass(frozen=True)
class Dying(Numbers):
    """Kills its worker the first `times` times that it is opened."""

    marks: Path
    times: int

    def open(self) -> Iterator[pa.RecordBatch]:
        if len(list(self.marks.iterdir())) < self.times:
            (self.marks / f"{os.getpid()}-{len(list(self.marks.iterdir()))}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        yield from super().open()


@dataclass(frozen=True)
class Failing(Numbers):
    """Fails as code does."""

    error: Exception

    def open(self) -> Iterator[pa.RecordBatch]:
        raise self.error
        yield


def named(batch: pa.RecordBatch, *, shard: str, first_row: int) -> pa.Table:
    return pa.table({"n": batch.column("n"), "row": range(first_row, first_row + batch.num_rows), "shard": [shard] * batch.num_rows})


def found(shards: list[Numbers]) -> list[dict[str, object]]:
    return sorted(pa.concat_tables(scan(shards, named)).to_pylist(), key=str)


def test_a_scan_reads_every_shard_and_numbers_its_rows() -> None:
    rows = found([Numbers(0), Numbers(100)])
    assert sorted((row["shard"], row["row"], row["n"]) for row in rows) == [
        (f"numbers {start}", row, start + row) for start in (0, 100) for row in range(6)
    ]


def test_a_scan_of_nothing_is_empty() -> None:
    assert list(scan([], named)) == []


def test_a_worker_that_dies_once_costs_nothing(tmp_path: Path) -> None:
    assert found([Dying(0, tmp_path, 1), Numbers(100)]) == found([Numbers(0), Numbers(100)])


def test_a_shard_that_always_kills_its_worker_ends_the_scan(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"died|crashed|killed"):
        list(scan([Dying(0, tmp_path, 99)], named))
    assert 1 < len(list(tmp_path.iterdir())) <= 8


@pytest.mark.parametrize("error", [SourceError("the file is gone. Export it again."), InputError("no column `x`.")])
def test_our_own_errors_come_back_as_themselves(error: CatalogEmbedError) -> None:
    with pytest.raises(type(error)) as raised:
        list(scan([Failing(0, error)], named))
    assert str(raised.value) == str(error)


def test_foreign_errors_keep_their_message() -> None:
    with pytest.raises(Exception, match="the disk is on fire"):
        list(scan([Failing(0, RuntimeError("the disk is on fire"))], named))


def _divided(number: int, by: int) -> tuple[int, int]:
    return divmod(number, by)


def test_spread_calls_a_function_for_every_argument() -> None:
    assert sorted(spread(_divided, [(7, 2), (9, 4), (20, 6)], in_flight=2)) == [(2, 1), (3, 1), (3, 2)]
