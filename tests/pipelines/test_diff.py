"""`diff` against a naive twin on dictionaries, and what must not change its outcome."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.diff import Difference, combine, count_texts, diff
from pipelines.diff.dealing import with_rows
from pipelines.diff.engine import DiffOptions
from pipelines.hashes import as_uuids, id_hashes
from pipelines.schema import (
    ACTION,
    ATTR_HASH,
    HASH,
    ID,
    ID_HASH,
    LIVE,
    PUBLISHED,
    REJECTED,
    SCANNED,
    TEXT_HASH,
    TOMBSTONE,
)
from pipelines.spool import Spool

State = dict[str, tuple[str, str]]
START = datetime(2026, 3, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Row:
    """A scanned row, as a person would write it: `at` counts minutes, None is unknown."""

    id: str
    text: str = "t"
    attr: str = "a"
    state: int = LIVE
    at: int | None = 0


def hashed(word: str) -> bytes:
    return blake2b(word.encode(), digest_size=16).digest()


def published(state: State) -> pa.Table:
    ids = sorted(state)
    columns = [id_hashes(pa.array(ids, pa.string())), [hashed(state[i][0]) for i in ids], [hashed(state[i][1]) for i in ids], ids]
    return pa.table([pa.array(column, field.type) for column, field in zip(columns, PUBLISHED, strict=True)], schema=PUBLISHED)


def scanned(rows: list[Row]) -> pa.Table:
    rejected = [row.state == REJECTED for row in rows]
    columns: list[Any] = [
        id_hashes(pa.array([row.id for row in rows], pa.string())),
        [None if bad else hashed(row.text) for row, bad in zip(rows, rejected, strict=True)],
        [None if bad else hashed(row.attr) for row, bad in zip(rows, rejected, strict=True)],
        [row.id for row in rows],
        [row.state for row in rows],
        [None if row.at is None else START + timedelta(minutes=row.at) for row in rows],
        [len(row.text) for row in rows],
        ["catalog.parquet"] * len(rows),
        list(range(len(rows))),
    ]
    return pa.table([pa.array(column, field.type) for column, field in zip(columns, SCANNED, strict=True)], schema=SCANNED)


def ids_of(ids: set[str]) -> pa.Table:
    return pa.table({ID_HASH: id_hashes(pa.array(sorted(ids), pa.string()))})


def winners(rows: list[Row]) -> dict[str, Row]:
    """The row that counts for each id, found the slow way."""

    def rank(row: Row) -> tuple[Any, ...]:
        content = (b"\xff", b"\xff") if row.state == REJECTED else (hashed(row.text), hashed(row.attr))
        return (row.at is not None, -(row.at or 0), row.state, *content)

    found: dict[str, Row] = {}
    for row in rows:
        if row.id not in found or rank(row) < rank(found[row.id]):
            found[row.id] = row
    return found


def naive(state: State, rows: list[Row], *, absent_goes: bool = True, present: set[str] | None = None) -> dict[str, str]:
    """The actions that a diff must find."""
    current = winners(rows)
    actions: dict[str, str] = {}
    for name in state.keys() | current.keys():
        row = current.get(name)
        gone = row is not None and row.state != LIVE
        if row is None:
            gone = absent_goes or (present is not None and name not in present)
        if gone and name in state:
            actions[name] = "delete"
        elif row is not None and row.state == LIVE:
            if name not in state:
                actions[name] = "add"
            elif row.text != state[name][0]:
                actions[name] = "text"
            elif row.attr != state[name][1]:
                actions[name] = "attr"
    return actions


@dataclass
class Found:
    """A difference, read back into Python."""

    difference: Difference
    actions: dict[str, str]
    contents: dict[str, tuple[bytes | None, bytes | None]]


def found(previous: Any, current: Any, **how: Any) -> Found:
    with tempfile.TemporaryDirectory() as folder:
        outcome, named = Path(folder) / "changes.parquet", Path(folder) / "named.parquet"
        difference = diff(previous, current, outcome=outcome, **how)
        with_rows(outcome, previous, current, outcome=named)
        table = pq.read_table(named)
        assert table.num_rows == pq.read_metadata(outcome).num_rows == sum(difference.actions.values())
        rows = table.to_pylist()
    as_bytes = [[getattr(row[name], "bytes", row[name]) for name in (TEXT_HASH, ATTR_HASH)] for row in rows]
    contents = {row[ID]: (pair[0], pair[1]) for row, pair in zip(rows, as_bytes, strict=True)}
    return Found(difference, {row[ID]: row[ACTION] for row in rows}, contents)


def applied(state: State, rows: list[Row], actions: dict[str, str]) -> State:
    """Carry a plan out on a dictionary."""
    after = dict(state)
    current = winners(rows)
    for name, action in actions.items():
        if action == "delete":
            del after[name]
        else:
            after[name] = (current[name].text, current[name].attr)
    return after


IDS = st.sampled_from([f"p{i}" for i in range(9)])
ROWS = st.lists(
    st.builds(
        Row,
        id=IDS,
        text=st.sampled_from("xyz"),
        attr=st.sampled_from("ab"),
        state=st.sampled_from([LIVE, LIVE, LIVE, TOMBSTONE, REJECTED]),
        at=st.sampled_from([None, 0, 1, 2]),
    ),
    max_size=14,
)
STATES = st.dictionaries(IDS, st.tuples(st.sampled_from("xyz"), st.sampled_from("ab")), max_size=9)
RUNS = settings(max_examples=15, deadline=None)


@given(STATES, ROWS, st.booleans(), st.none() | st.sets(IDS))
@RUNS
def test_diff_equals_its_naive_twin(state: State, rows: list[Row], absent_goes: bool, present: set[str] | None) -> None:
    how: dict[str, Any] = {"absent_goes": absent_goes and present is None}
    outcome = found(published(state), scanned(rows), present=None if present is None else ids_of(present), **how)
    assert outcome.actions == naive(state, rows, present=present, **how)
    seen = state.keys() | {row.id for row in rows}
    assert outcome.difference.unseen == len((present or set()) - seen)


@given(STATES, ROWS)
@RUNS
def test_applying_a_plan_gives_the_catalog_and_a_second_plan_is_empty(state: State, rows: list[Row]) -> None:
    actions = found(published(state), scanned(rows)).actions
    after = applied(state, rows, actions)
    assert after == {name: (row.text, row.attr) for name, row in winners(rows).items() if row.state == LIVE}
    assert found(published(after), scanned(rows)).actions == {}


@given(STATES)
@RUNS
def test_plan_of_equal_catalogs_is_empty(state: State) -> None:
    rows = [Row(name, text, attr) for name, (text, attr) in state.items()]
    outcome = found(published(state), scanned(rows))
    assert outcome.actions == {}
    assert outcome.difference.live == len(state)


@given(STATES, ROWS, st.randoms(use_true_random=False), st.integers(1, 5))
@RUNS
def test_row_order_block_size_and_repeats_change_nothing(state: State, rows: list[Row], chance: random.Random, size: int) -> None:
    plain = found(published(state), scanned(rows))
    mixed = rows + [row for row in rows if row.state != REJECTED and chance.random() < 0.3]
    chance.shuffle(mixed)
    blocks = pa.Table.from_batches(scanned(mixed).to_batches(max_chunksize=size), schema=SCANNED)
    again = found(published(state), blocks, options=DiffOptions(threads=1))
    assert (again.actions, again.contents) == (plain.actions, plain.contents)


@given(STATES, ROWS, st.integers(2, 5))
@settings(max_examples=12, deadline=None)
def test_partitions_give_the_same_outcome(state: State, rows: list[Row], partitions: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        sides = []
        for name, table in (("previous", published(state)), ("current", scanned(rows))):
            spool = Spool(work, name, table.schema, partitions=partitions)
            spool.add(table)
            sides.append(spool.close())
        parts = [diff([p], [c], outcome=work / f"part{i}.parquet") for i, (p, c) in enumerate(zip(*sides, strict=True))]
        whole = diff(published(state), scanned(rows), outcome=work / "whole.parquet")
        merged = combine(parts, outcome=work / "merged.parquet")
        assert pq.read_table(merged.changes).to_pylist() == pq.read_table(whole.changes).to_pylist()
        assert merged.conflicts.equals(whole.conflicts)
        assert replace(merged, changes=whole.changes, conflicts=whole.conflicts) == whole


@given(STATES, ROWS)
@RUNS
def test_every_row_is_counted_once(state: State, rows: list[Row]) -> None:
    outcome = found(published(state), scanned(rows)).difference
    rejected = sum(row.state == REJECTED for row in rows)
    assert len(rows) == outcome.live + outcome.tombstones + outcome.duplicates + outcome.conflicts.num_rows + rejected


def test_equally_new_rows_with_other_content_conflict_and_older_ones_are_duplicates() -> None:
    rows = [Row("p", "old", at=0), Row("p", "x", at=5), Row("p", "y", at=5), Row("p", "x", at=5), Row("q")]
    outcome = found(published({}), scanned(rows)).difference
    assert (outcome.live, outcome.duplicates, outcome.conflicts.num_rows) == (2, 2, 1)
    assert outcome.conflicts[ID].to_pylist() == ["p"]


def test_a_duplicate_is_found_whether_its_id_was_published_or_not() -> None:
    for state in ({}, {"p": ("t", "a")}, {"p": ("t", "a"), "gone": ("t", "a")}):
        assert found(published(state), scanned([Row("p"), Row("p"), Row("q")])).difference.duplicates == 1


def test_without_deletes_nothing_goes() -> None:
    state = {"kept": ("t", "a"), "tomb": ("t", "a")}
    assert found(published(state), scanned([Row("tomb", state=TOMBSTONE), Row("new")]), deletes=False).actions == {"new": "add"}


def test_identical_texts_are_counted_once_and_published_ones_not_at_all(tmp_path: Path) -> None:
    state = {"old": ("known", "a")}
    rows = [Row("old", "known"), Row("a", "one"), Row("b", "one"), Row("c", "known"), Row("d", "two!")]
    previous = published(state)
    outcome = diff(previous, scanned(rows), outcome=tmp_path / "changes.parquet")
    counts = count_texts(tmp_path / "changes.parquet", previous)
    assert (counts.rows, counts.texts, counts.reused, counts.text_bytes) == (4, 3, 1, len("one") + len("two!"))
    assert outcome.actions == {"add": 4, "text": 0, "attr": 0, "delete": 0}


def test_both_sides_empty_is_a_plan_too(tmp_path: Path) -> None:
    outcome = diff(PUBLISHED.empty_table(), SCANNED.empty_table(), outcome=tmp_path / "changes.parquet")
    assert (outcome.live, outcome.actions) == (0, {"add": 0, "text": 0, "attr": 0, "delete": 0})


def test_a_path_with_quotes_is_only_a_path(tmp_path: Path) -> None:
    odd = tmp_path / "o'brien; drop"
    odd.mkdir()
    pq.write_table(as_uuids(scanned([Row("p")])), odd / "c'.parquet")
    outcome = diff(PUBLISHED.empty_table(), [odd / "c'.parquet"], outcome=odd / "out'.parquet")
    assert outcome.actions["add"] == 1


# Nights with `--since`: rows arrive late and clocks are wrong, but within the lookback.


@dataclass
class Shop:
    """A catalog that lives for some nights. A change is stamped `skew` minutes off, and seen `late` minutes after."""

    chance: random.Random
    late: int
    skew: int
    rows: dict[str, Row]
    waiting: list[tuple[int, Row | str]]

    def live_through(self, begin: int, end: int) -> None:
        """Make the changes of one day."""
        for _ in range(self.chance.randrange(6)):
            made = self.chance.randrange(begin, end)
            stamp = made + self.chance.randrange(-self.skew, self.skew + 1)
            name = f"p{self.chance.randrange(8)}"
            seen = made + self.chance.randrange(self.late)
            row = Row(name, self.chance.choice("xyz"), self.chance.choice("ab"), self.chance.choice([LIVE, LIVE, TOMBSTONE]), stamp)
            self.waiting.append((seen, name if self.chance.random() < 0.2 else row))
        for seen, change in sorted((item for item in self.waiting if item[0] < end), key=lambda item: item[0]):
            self.waiting.remove((seen, change))
            self.rows.pop(change if isinstance(change, str) else change.id, None)
            if isinstance(change, Row):
                self.rows[change.id] = change


def nights(shop: Shop, *, lookback: int) -> Iterator[tuple[State, State]]:
    """Run `--since last` every night; yield the state that it reached and the one that a full plan reaches."""
    state: State = {}
    watermark: int | None = None
    for night in range(1, 7):
        now = night * 100
        shop.live_through(now - 100, now)
        since = None if watermark is None else watermark - lookback
        window = [row for row in shop.rows.values() if since is None or row.at is None or row.at >= since]
        present = {row.id for row in shop.rows.values() if row.state == LIVE}
        how: dict[str, Any] = {"absent_goes": True} if since is None else {"absent_goes": False, "present": ids_of(present)}
        outcome = found(published(state), scanned(window), **how)
        assert outcome.difference.unseen == 0
        state = applied(state, window, outcome.actions)
        watermark = now
        yield state, {row.id: (row.text, row.attr) for row in shop.rows.values() if row.state == LIVE}


@given(st.randoms(use_true_random=False))
@settings(max_examples=10, deadline=None)
def test_since_converges_to_the_full_plan_for_lateness_and_skew_within_the_lookback(chance: random.Random) -> None:
    for reached, wanted in nights(Shop(chance, late=40, skew=20, rows={}, waiting=[]), lookback=60):
        assert reached == wanted


def test_lateness_beyond_the_lookback_is_reported_as_unseen() -> None:
    previous = published({"p": ("t", "a")})
    outcome = found(previous, scanned([]), absent_goes=False, present=ids_of({"p", "late"}))
    assert (outcome.actions, outcome.difference.unseen) == ({}, 1)


@pytest.mark.parametrize("memory_mb", [64])
def test_a_join_larger_than_its_memory_spills_and_agrees(tmp_path: Path, memory_mb: int) -> None:
    count = 1_500_000
    hashes = pa.array([i.to_bytes(16, "big") for i in range(count)], HASH)
    side = pa.table({ID_HASH: hashes, TEXT_HASH: hashes, ATTR_HASH: hashes, ID: pa.repeat("x", count)})
    extra = {name: pa.nulls(count, SCANNED.field(name).type) for name in SCANNED.names if name not in side.column_names}
    current = pa.table({**{name: side[name] for name in side.column_names}, **extra, "state": pa.repeat(pa.scalar(0, pa.int8()), count)})
    for name, table in (("p", side.slice(1000)), ("c", current.select(SCANNED.names).slice(0, count - 500))):
        pq.write_table(as_uuids(table), tmp_path / f"{name}.parquet", use_dictionary=False)
    outcome = diff(
        [tmp_path / "p.parquet"], [tmp_path / "c.parquet"], outcome=tmp_path / "out.parquet", options=DiffOptions(memory_mb=memory_mb)
    )
    assert outcome.actions == {"add": 1000, "text": 0, "attr": 0, "delete": 500}
