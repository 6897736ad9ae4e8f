"""Leases: one holder of any number of racers, takeovers only from the dead, and no return of the overtaken."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from pipelines import leases
from pipelines.errors import InputError, LeaseHeld, ManifestError, NotFound, StoreError
from pipelines.leases import (
    CLOCK_SKEW,
    Lease,
    LeaseEntry,
    acquire,
    break_lease,
    held,
    live_leases,
)
from pipelines.reader_pins import pin_reader, read_pins, release_reader, renew_reader
from pipelines.storage import Store
from tests.conftest import S3Server
from tests.faults import Recorder, Strike, StrikeAt, in_child, strikes, under
from tests.generations import START

TTL = timedelta(minutes=15)


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.at = START

    def __call__(self) -> datetime:
        return self.at

    def pass_(self, **span: float) -> None:
        self.at += timedelta(**span)


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return Store.open(tmp_path / "root")
    server: S3Server = request.getfixturevalue("s3")
    return Store.open(f"s3://{server.bucket()}/index", options=server.options)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def taken(store: Store, clock: Callable[[], datetime], run_id: str = "run-1", **options: Any) -> Lease:
    return acquire(store, "table", run_id=run_id, ttl=options.pop("ttl", TTL), clock=clock, **options)


def entries(store: Store) -> list[str]:
    return [info.key.rpartition("/")[2] for info in store.list("leases/table")]


def from_another_host(store: Store, lease: Lease, **changes: Any) -> None:
    """Make a lease look like that of a process elsewhere."""
    entry = replace(lease.entry, host="node-7", machine="ab" * 16, pid=1, **changes)
    store.put(f"leases/table/{entry.seq:08d}.json", entry.to_json())


def test_a_lease_is_taken_checked_and_released(store: Store, clock: Clock) -> None:
    lease = taken(store, clock)
    lease.check()
    assert (lease.entry.seq, lease.entry.until) == (1, START + TTL)
    assert live_leases(store, clock()) == {"table": lease.entry}
    lease.release()
    lease.release()
    assert live_leases(store, clock()) == {}
    with pytest.raises(LeaseHeld, match="was released"):
        lease.check()
    assert taken(store, clock, "run-2").entry.seq == 2


def test_a_held_lease_names_its_holder_its_end_and_what_to_do(store: Store, clock: Clock) -> None:
    taken(store, clock)
    with pytest.raises(LeaseHeld) as caught:
        taken(store, clock, "run-2")
    host = f"{socket.gethostname()}:{os.getpid()}"
    assert str(caught.value) == (
        f"lease `table` is held by run run-1 ({host}) since 2026-11-04T02:10:00+00:00. Wait for that run to finish; "
        "if it is dead, the lease expires at 2026-11-04T02:30:00+00:00, or end it now with `catalog-embed run --break-lease`."
    )
    assert caught.value.exit_code == 11
    assert acquire(store, "other", run_id="run-2", ttl=TTL, clock=clock).entry.seq == 1


def test_the_own_run_id_is_no_key_to_a_lease_of_a_live_process(store: Store, clock: Clock) -> None:
    taken(store, clock)
    with pytest.raises(LeaseHeld):
        taken(store, clock, "run-1")


def test_another_host_takes_over_only_after_the_end_and_the_skew(store: Store, clock: Clock) -> None:
    from_another_host(store, taken(store, clock))
    for seconds in (0, TTL.total_seconds(), (TTL + CLOCK_SKEW).total_seconds() - 1):
        clock.at = START + timedelta(seconds=seconds)
        assert live_leases(store, clock()) != {}
        with pytest.raises(LeaseHeld, match=r"held by run run-1 \(node-7:1\)"):
            taken(store, clock, "run-2")
    clock.at = START + TTL + CLOCK_SKEW
    assert live_leases(store, clock()) == {}
    assert taken(store, clock, "run-2").entry.seq == 2


def test_the_holder_stops_at_its_own_end_so_that_no_skew_below_the_margin_gives_two_holders(store: Store, clock: Clock) -> None:
    lease = taken(store, clock)
    from_another_host(store, lease)
    ahead = Clock()  # five minutes ahead of the holder
    for minutes in range(30):
        clock.at = START + timedelta(minutes=minutes)
        ahead.at = clock.at + CLOCK_SKEW - timedelta(seconds=1)
        holders = 0
        for attempt in (lease.check, partial(taken, store, ahead, "run-2")):
            try:
                attempt()
                holders += 1
            except LeaseHeld:
                pass
        assert holders <= 1


def test_renewal_keeps_a_lease_for_as_long_as_it_is_renewed(store: Store, clock: Clock) -> None:
    lease = taken(store, clock)
    for _ in range(10):
        clock.pass_(minutes=10)
        lease.renew()
        lease.check()
        with pytest.raises(LeaseHeld):
            taken(store, clock, "run-2")
    assert entries(store) == ["00000001.json"]


def test_a_paused_holder_that_was_overtaken_loses_every_check_and_changes_nothing(store: Store, clock: Clock) -> None:
    sleeper = taken(store, clock)
    clock.pass_(hours=1)
    winner = taken(store, clock, "run-2")
    for act in (sleeper.check, sleeper.renew):
        with pytest.raises(LeaseHeld, match=r"run-1 held number 1, but run run-2 .* took over with number 2.*may not publish"):
            act()
    sleeper.release()
    winner.check()
    assert live_leases(store, clock()) == {"table": winner.entry}


def test_a_holder_that_slept_past_its_end_may_not_publish_even_where_nobody_took_over(store: Store, clock: Clock) -> None:
    lease = taken(store, clock)
    clock.pass_(minutes=15)
    with pytest.raises(LeaseHeld, match="ended at 2026-11-04T02:25:00"):
        lease.check()


def test_breaking_overrules_the_holder_without_touching_its_entry(store: Store, clock: Clock) -> None:
    lease = taken(store, clock)
    before = store.get("leases/table/00000001.json")
    assert break_lease(store, "table", run_id="person", clock=clock) == lease.entry
    assert store.get("leases/table/00000001.json") == before
    with pytest.raises(LeaseHeld, match=r"run person .* took over with number 2"):
        lease.check()
    assert break_lease(store, "table", run_id="person", clock=clock) is None
    assert break_lease(store, "nothing", run_id="person", clock=clock) is None
    taken(store, clock, "run-2").check()


def test_a_damaged_entry_stops_everybody_until_it_is_overruled(store: Store, clock: Clock) -> None:
    store.put("leases/table/00000001.json", b"{")
    with pytest.raises(ManifestError, match="--break-lease"):
        taken(store, clock)
    with pytest.raises(ManifestError, match="--break-lease"):
        live_leases(store, clock())
    assert break_lease(store, "table", run_id="person", clock=clock) is not None
    assert taken(store, clock).entry.seq == 3


def test_old_entries_are_pruned_and_one_who_slept_meanwhile_does_not_win_a_pruned_number(store: Store, clock: Clock) -> None:
    for number in range(20):
        taken(store, clock, f"run-{number}").release()
    assert entries(store) == [f"{number:08d}.json" for number in range(13, 21)]
    # The sleeper looked when number 1 was the highest, and creates number 2 now.
    last = taken(store, clock, "run-x")
    last.release()
    seen, highest = iter([1]), leases._highest

    def stale(store: Store, name: str) -> int:
        return next(seen, None) or highest(store, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leases, "_highest", stale)
        with pytest.raises(LeaseHeld, match=r"run-x .* took over with number 21"):
            taken(store, clock, "sleeper")
    taken(store, clock, "run-y").check()


@pytest.mark.parametrize("name", ["", "readers", "../x", "A", "a/b", "-x", "x" * 64])
def test_a_name_that_is_no_name_is_refused(tmp_path: Path, clock: Clock, name: str) -> None:
    with pytest.raises(InputError, match="no name of a lease"):
        acquire(Store.open(tmp_path), name, run_id="r", ttl=TTL, clock=clock)
    assert list(tmp_path.iterdir()) == []


def test_a_clock_without_zone_and_a_lease_without_length_are_refused(tmp_path: Path, clock: Clock) -> None:
    with pytest.raises(InputError, match="without a time zone"):
        taken(Store.open(tmp_path), lambda: datetime(2026, 1, 1))  # noqa: DTZ001 - what the test is about
    with pytest.raises(InputError, match="longer than nothing"):
        taken(Store.open(tmp_path), clock, ttl=timedelta(0))


# Processes that race and die.


def _race(root: str, racer: int, rounds: int, barrier: Barrier, results: Any) -> None:
    store, won = Store.open(root), []
    for number in range(rounds):
        barrier.wait(timeout=60)
        lease = None
        try:
            lease = taken(store, lambda: START, f"{racer}-{number}")
            lease.check()
            won.append(number)
        except LeaseHeld:
            pass
        barrier.wait(timeout=60)
        if lease:
            lease.release()
    results.put(won)


def test_of_eight_racing_processes_exactly_one_gets_the_lease_in_each_of_30_rounds(tmp_path: Path) -> None:
    racers, rounds = 8, 30
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(racers), context.Queue()
    processes = [context.Process(target=_race, args=(str(tmp_path), racer, rounds, barrier, results)) for racer in range(racers)]
    for process in processes:
        process.start()
    won = Counter(number for _ in processes for number in results.get(timeout=60))
    for process in processes:
        process.join(timeout=60)
    assert won == Counter(range(rounds))


def test_a_killed_holder_is_succeeded_at_once_on_its_own_machine(tmp_path: Path, clock: Clock) -> None:
    store = Store.open(tmp_path)

    def die() -> None:
        taken(store, clock)
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(die) == -signal.SIGKILL
    assert live_leases(store, clock()) == {}, "its own machine sees that it is dead"
    assert taken(store, clock, "run-2").entry.seq == 2


def test_a_killed_holder_that_nobody_reaped_yet_is_dead(tmp_path: Path, clock: Clock) -> None:
    store = Store.open(tmp_path)
    child = os.fork()
    if child == 0:
        taken(store, clock)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    try:
        assert taken(store, clock, "run-2").entry.seq == 2
    finally:
        os.waitpid(child, 0)


def test_a_process_that_got_the_number_of_a_dead_one_is_not_taken_for_it(tmp_path: Path, clock: Clock) -> None:
    store = Store.open(tmp_path)
    lease = taken(store, clock)
    earlier = replace(lease.entry, started=lease.entry.started - 1)
    store.put("leases/table/00000001.json", earlier.to_json())
    assert taken(store, clock, "run-2").entry.seq == 2


def test_what_is_not_known_about_a_process_is_waited_for(tmp_path: Path, clock: Clock) -> None:
    store = Store.open(tmp_path)
    lease = taken(store, clock)
    for unknown in ({"machine": ""}, {"started": 0}, {"pid": 2**40}):
        store.put("leases/table/00000001.json", replace(lease.entry, **unknown).to_json())
        with pytest.raises(LeaseHeld):
            taken(store, clock, "run-2")


def test_a_stopped_process_that_is_overtaken_exits_instead_of_publishing(tmp_path: Path) -> None:
    script = (
        "import sys, time; from datetime import UTC, datetime, timedelta\n"
        "from pipelines.errors import LeaseHeld; from pipelines.leases import held; from pipelines.storage import Store\n"
        "try:\n"
        "    with held(Store.open(sys.argv[1]), 'table', run_id='run-1', ttl=timedelta(seconds=1), clock=lambda: datetime.now(UTC)) as lease:\n"
        "        print('held', flush=True); sys.stdin.readline(); time.sleep(0.5); lease.check()\n"
        "except LeaseHeld as error:\n    sys.exit(error.exit_code)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    store, now = Store.open(tmp_path), lambda: datetime.now(UTC)
    os.kill(child.pid, signal.SIGSTOP)
    with pytest.raises(LeaseHeld):
        taken(store, now, "run-2", skew=timedelta(0))
    time.sleep(1.2)
    winner = taken(store, now, "run-2", skew=timedelta(0))
    os.kill(child.pid, signal.SIGCONT)
    child.communicate("go on\n", timeout=20)
    assert child.returncode == 11
    winner.check()


def work(store: Store, clock: Clock) -> None:
    lease = taken(store, clock)
    lease.renew()
    lease.check()
    lease.release()


def test_after_every_crash_of_a_holder_the_next_run_gets_the_lease_on_the_same_machine(tmp_path: Path, clock: Clock) -> None:
    base = Store.open(tmp_path / "base")
    for number in range(8):  # so that pruning is among the crashes
        taken(base, clock, f"run-{number}").release()
    recorder = Recorder()
    work(Store.open(shutil.copytree(base.root, tmp_path / "counted"), faults=recorder), clock)
    trials = 0
    for nth, mode in strikes(recorder.points):
        trials += 1
        root = shutil.copytree(base.root, tmp_path / "trial")
        status = under(mode, partial(work, Store.open(root, faults=Strike(nth, mode)), clock), failures=(StoreError,))
        assert status in ((-9,) if mode == "kill" else (0, 3))
        survivor = Store.open(root)
        if mode != "kill" and live_leases(survivor, clock()):
            clock.pass_(minutes=21)  # a live process whose release failed holds on until the end
        taken(survivor, clock, "next").check()
        shutil.rmtree(root)
    assert trials > 80


def test_an_answer_lost_after_the_create_is_success(tmp_path: Path, clock: Clock) -> None:
    failing = Store.open(tmp_path, faults=StrikeAt("unlink:leases:before", "EIO"))
    assert taken(failing, clock).entry.seq == 1
    with pytest.raises(LeaseHeld):
        taken(Store.open(tmp_path), clock, "run-2")


# The heartbeat.


def real() -> datetime:
    return datetime.now(UTC)


SHORT = timedelta(seconds=1.5)


def test_a_block_keeps_its_lease_longer_than_its_time_and_gives_it_back(store: Store) -> None:
    with held(store, "table", run_id="run-1", ttl=SHORT, clock=real, skew=timedelta(0)) as lease:
        for _ in range(4):
            time.sleep(0.6)
            lease.check()
            with pytest.raises(LeaseHeld):
                taken(store, real, "run-2", skew=timedelta(0))
    assert live_leases(store, real()) == {}
    assert not any(thread.name == "lease-table" for thread in threading.enumerate())


def test_a_block_that_fails_gives_its_lease_back_and_fails_as_it_did(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    with pytest.raises(KeyError, match="the block's own"), held(store, "table", run_id="run-1", ttl=TTL, clock=real):
        raise KeyError("the block's own")
    assert live_leases(store, real()) == {}


class Breakable:
    """Faults that a test switches on and off."""

    broken = False

    def reach(self, point: str) -> None:
        if self.broken and point.startswith("write:leases"):
            raise OSError(5, "Input/output error", point)


def test_a_renewal_that_failed_is_made_up_by_the_next_check(tmp_path: Path) -> None:
    faults = Breakable()
    with held(Store.open(tmp_path, faults=faults), "table", run_id="run-1", ttl=timedelta(seconds=3), clock=real) as lease:
        first, faults.broken = lease.entry.until, True
        time.sleep(1.3)
        with pytest.raises(StoreError, match="EIO"):
            lease.check()
        faults.broken = False
        lease.check()
        assert lease.entry.until > first


def test_a_store_that_stays_away_ends_the_lease_and_check_says_why(tmp_path: Path) -> None:
    faults = Breakable()
    with held(Store.open(tmp_path, faults=faults), "table", run_id="run-1", ttl=SHORT, clock=real) as lease:
        faults.broken = True
        time.sleep(1.7)
        with pytest.raises(LeaseHeld, match=r"may not publish\. The last renewal failed: .*EIO"):
            lease.check()


def test_a_heartbeat_that_was_overtaken_stops_and_stays_lost(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    with held(store, "table", run_id="run-1", ttl=SHORT, clock=real) as lease:
        break_lease(store, "table", run_id="person", clock=real)
        time.sleep(0.8)
        with pytest.raises(LeaseHeld, match="took over"):
            lease.check()
        assert lease.entry.until <= lease.entry.acquired_at + SHORT
    assert [LeaseEntry.from_json(store.get(f"leases/table/{name}"), where=name).run_id for name in entries(store)] == ["run-1", "person"]


# Readers.


def test_a_reader_keeps_its_generation_until_it_lets_go_or_its_time_is_over(store: Store, clock: Clock) -> None:
    first = pin_reader(store, "g000001", ttl=TTL, name="search-7", clock=clock)
    second = pin_reader(store, "g000001", ttl=TTL, name="search-7", clock=clock)
    pin_reader(store, "g000002", ttl=TTL, name="eval", clock=clock)
    assert first != second
    assert read_pins(store, clock()) == {"g000001", "g000002"}
    release_reader(store, first)
    assert read_pins(store, clock()) == {"g000001", "g000002"}
    clock.pass_(minutes=14)
    renew_reader(store, second, ttl=TTL, clock=clock)
    clock.pass_(minutes=6)
    assert read_pins(store, clock()) == {"g000001"}
    clock.pass_(minutes=14)
    assert read_pins(store, clock()) == frozenset()
    assert live_leases(store, clock()) == {}


def test_pins_of_dead_readers_are_cleared_by_the_next_reader(store: Store, clock: Clock) -> None:
    for _ in range(3):
        pin_reader(store, "g000001", ttl=TTL, name="crashes", clock=clock)
    clock.pass_(days=2)
    key = pin_reader(store, "g000001", ttl=TTL, name="search", clock=clock)
    assert [info.key for info in store.list("leases")] == [key]


def test_a_pin_that_is_gone_is_not_renewed_and_no_other_key_is_touched(store: Store, clock: Clock) -> None:
    key = pin_reader(store, "g000001", ttl=TTL, name="search", clock=clock)
    release_reader(store, key)
    with pytest.raises(NotFound):
        renew_reader(store, key, ttl=TTL, clock=clock)
    with pytest.raises(InputError, match="no pin of a reader"):
        release_reader(store, "aliases/prod/00000001.json")
    with pytest.raises(ManifestError, match="no generation id"):
        pin_reader(store, "../aliases", ttl=TTL, name="x", clock=clock)
