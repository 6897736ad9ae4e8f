"""Runs that race, are overtaken, vanish, or never hear the answer: one winner, no lost publish, no reader that goes backwards."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from pipelines import storage
from pipelines.errors import AlreadyExists, CatalogEmbedError, StoreError
from pipelines.publish import current, history, open_manifest, publish, rollback, write_generation
from pipelines.storage import Store
from tests.conftest import S3Server
from tests.faults import Proxy, Recorder, StrikeAt, Vanished
from tests.generations import START, chain, move, published, sample_manifest, ticking, written

RACERS = 8


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return Store.open(tmp_path / "root")
    server: S3Server = request.getfixturevalue("s3")
    return Store.open(f"s3://{server.bucket()}/index", options=server.options)


@pytest.fixture
def proxied(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Store, Proxy]]:
    monkeypatch.setattr(storage, "_RETRY", {"max_retries": 3})  # what fails for good fails soon
    with Proxy(s3.endpoint).running() as proxy:
        yield Store.open(f"s3://{s3.bucket()}/p", options={**s3.options, "endpoint": proxy.endpoint}), proxy


# Answers that never arrive, through a real server and a proxy that hangs up.


@pytest.mark.parametrize("answers", [1, 100])
def test_an_answer_lost_after_the_commit_is_success(proxied: tuple[Store, Proxy], answers: int) -> None:
    # 1: the retry below us meets our own object (412). 100: the client gives up without an answer.
    store, proxy = proxied
    written(store, "g000001")
    proxy.rule, proxy.lose = "lose_answer", answers
    entry = move(store, "g000001", expected_seq=0)
    assert proxy.lost >= 1
    proxy.rule = "pass"
    assert history(store, "prod") == (entry,)


def test_a_write_that_never_arrives_is_an_error_and_the_rerun_publishes(proxied: tuple[Store, Proxy]) -> None:
    store, proxy = proxied
    written(store, "g000001")
    proxy.rule = "refuse"
    with pytest.raises(StoreError, match=r"cannot write .*aliases/prod/00000001\.json.*then run again") as caught:
        move(store, "g000001", expected_seq=0)
    assert not isinstance(caught.value, AlreadyExists)
    proxy.rule = "pass"
    assert current(store, "prod") is None
    entry = move(store, "g000001", expected_seq=0)
    assert history(store, "prod") == (entry,)


def test_a_run_overtaken_at_the_last_moment_loses(store: Store) -> None:
    written(store, "g000001")
    written(store, "g000002", run_id="run-2")
    overtaken = Store.open(store.root, options=store._reopen[1], faults=_Interloper(store))
    with pytest.raises(AlreadyExists, match="entry 1 was created by run run-2 for g000002"):
        move(overtaken, "g000001", expected_seq=0, run_id="run-1")
    assert [entry.run_id for entry in history(store, "prod")] == ["run-2"]


class _Interloper:
    """Publishes another generation just before the entry is created."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def reach(self, point: str) -> None:
        if point == "publish.before_alias":
            move(self._store, "g000002", expected_seq=0, run_id="run-2")


def test_generation_bytes_survive_lost_answers(proxied: tuple[Store, Proxy]) -> None:
    store, proxy = proxied
    proxy.rule, proxy.lose = "lose_answer", 2
    manifest = write_generation(store, sample_manifest(), {"gates.json": b"{}"})
    assert proxy.lost == 2
    assert [item.key for item in manifest.attachments] == ["generations/g000001/gates.json"]


def test_an_error_after_the_link_is_resolved_by_reading_and_made_durable(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    written(store, "g000001")
    failing = Store.open(tmp_path, faults=StrikeAt("unlink:aliases:before", "EIO"))
    entry = move(failing, "g000001", expected_seq=0)
    assert history(store, "prod") == (entry,)


def test_nothing_named_is_published_before_it_is_on_disk(tmp_path: Path) -> None:
    written(Store.open(tmp_path), "g000001")
    recorder = Recorder()
    move(Store.open(tmp_path, faults=recorder), "g000001", expected_seq=0)
    synced = [point for point in recorder.points if point.startswith("sync:") and point.endswith(":after")]
    assert synced == ["sync:vectors:after", "sync:generations:after", "sync:manifest:after"]
    assert (
        recorder.points.index("sync:manifest:after")
        < recorder.points.index("publish.before_alias")
        < recorder.points.index("link:aliases:before")
    )


def test_an_entry_found_by_a_rerun_is_made_durable_before_it_is_reported(tmp_path: Path) -> None:
    published(Store.open(tmp_path), "g000001", expected_seq=0)
    recorder = Recorder()
    move(Store.open(tmp_path, faults=recorder), "g000001", expected_seq=0, run_id="run-1")
    assert "sync:aliases:after" in recorder.points
    assert "link:aliases:before" not in recorder.points


# Races.


# Entries older than the manifests, so that nobody searches the log for an entry of its own.
LONG_AGO = START - timedelta(days=30)


def _race(root: str, racer: int, rounds: int, barrier: Barrier, results: Any) -> None:
    store, outcomes = Store.open(root), []
    for number in range(rounds):
        barrier.wait(timeout=60)
        try:
            publish(
                store, alias="prod", generation=f"g{racer + 1:06d}", expected_seq=number, run_id=f"{racer}-{number}", clock=lambda: LONG_AGO
            )
            outcomes.append("won")
        except AlreadyExists:
            outcomes.append("lost")
        except CatalogEmbedError as error:
            outcomes.append(repr(error))
    results.put(outcomes)


def test_of_eight_racing_processes_exactly_one_wins_each_of_200_rounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rounds, store = 200, Store.open(tmp_path)
    for racer in range(RACERS):
        written(store, f"g{racer + 1:06d}", run_id=f"w{racer}")
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(RACERS), context.Queue()
    racers = [context.Process(target=_race, args=(str(tmp_path), racer, rounds, barrier, results)) for racer in range(RACERS)]
    for process in racers:
        process.start()
    seen, reads = 0, 0
    while any(process.is_alive() for process in racers) and seen < rounds:
        head = current(store, "prod")
        if head is not None:
            assert head.seq >= seen, "a reader went backwards"
            assert open_manifest(store, head).generation == head.generation
            seen, reads = head.seq, reads + 1
        time.sleep(0.002)
    outcomes = [results.get(timeout=60) for _ in racers]
    for process in racers:
        process.join(timeout=60)
    per_round = [Counter(outcome[number] for outcome in outcomes) for number in range(rounds)]
    assert per_round == [Counter(won=1, lost=RACERS - 1)] * rounds
    assert [entry.seq for entry in history(store, "prod")] == list(range(1, rounds + 1))
    assert reads > 0
    with capsys.disabled():
        print(f"\npublish race: {rounds}/{rounds} rounds with one winner of {RACERS}; {reads} reads, none backwards")


def test_of_eight_racing_threads_exactly_one_wins_each_of_25_rounds_on_s3(s3: S3Server) -> None:
    rounds, root = 25, f"s3://{s3.bucket()}/index"
    stores = [Store.open(root, options=s3.options) for _ in range(RACERS)]
    for racer, store in enumerate(stores):
        written(store, f"g{racer + 1:06d}", run_id=f"w{racer}")
    barrier, outcomes = threading.Barrier(RACERS), [Counter[str]() for _ in range(rounds)]

    def race(racer: int) -> None:
        for number in range(rounds):
            barrier.wait(timeout=60)
            try:
                name = f"g{racer + 1:06d}"
                publish(
                    stores[racer], alias="prod", generation=name, expected_seq=number, run_id=f"{racer}-{number}", clock=lambda: LONG_AGO
                )
                outcomes[number]["won"] += 1
            except AlreadyExists:
                outcomes[number]["lost"] += 1

    threads = [threading.Thread(target=race, args=(racer,)) for racer in range(RACERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [Counter(won=1, lost=RACERS - 1)] * rounds
    assert len(history(stores[0], "prod")) == rounds


def test_fifty_rollbacks_under_readers_never_show_a_mixture(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    chain(store, 2)
    done, seen = threading.Event(), Counter[str]()

    def read() -> None:
        while not done.is_set():
            head = current(store, "prod")
            assert head is not None
            manifest = open_manifest(store, head)
            for item in manifest.objects:
                store.verify(item)
            seen[head.generation] += 1

    readers = [threading.Thread(target=read) for _ in range(4)]
    for reader in readers:
        reader.start()
    clock = ticking(step=timedelta(days=2))
    for number in range(50):
        to = f"g{number % 2 + 1:06d}"
        assert rollback(store, alias="prod", to=to, run_id=f"p-{number}", reason="drill", clock=clock).generation == to
    done.set()
    for reader in readers:
        reader.join()
    assert sum(seen.values()) > 4
    assert len(history(store, "prod")) == 52


def test_a_run_that_vanished_around_its_entry_is_finished_by_its_rerun(store: Store) -> None:
    chain(store, 1)
    written(store, "g000002", run_id="run-2")
    for point, entries in (("publish.before_alias", 1), ("publish.after_alias", 2)):
        dying = Store.open(store.root, options=store._reopen[1], faults=StrikeAt(point, "vanish"))
        with pytest.raises(Vanished):
            move(dying, "g000002", expected_seq=1, run_id="run-2")
        assert len(history(store, "prod")) == entries
    assert move(store, "g000002", expected_seq=1, run_id="run-2") == current(store, "prod")
    assert len(history(store, "prod")) == 2
