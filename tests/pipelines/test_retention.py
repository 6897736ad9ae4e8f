"""Collection takes what nobody needs and nothing else: whatever the log, the pins, the leases, and wherever it is killed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.disk import NO_FAULTS, Faults
from pipelines.errors import InputError, ManifestError, NotFound, PlanError, StoreError
from pipelines.layout import byte_size
from pipelines.leases import acquire
from pipelines.manifest import Manifest, TablePin
from pipelines.publish import current, history, next_generation, open_manifest, publish, rollback, write_generation
from pipelines.reader_pins import pin_reader, release_reader
from pipelines.retention import (
    GcPlan,
    Removed,
    RetentionOptions,
    TableSweep,
    apply_gc,
    gc_text,
    pin,
    pins,
    plan_gc,
    unpin,
)
from pipelines.storage import Store
from tests.conftest import S3Server
from tests.faults import Recorder, Strike, strikes, under
from tests.generations import START, listed, sample_manifest

# Far enough ahead that everything a test writes is old, unless the test makes it young.
NOW = datetime.now(UTC) + timedelta(days=30)
YOUNG = NOW - timedelta(hours=1)
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108 - a folder of random name is made in it
KEEP_TWO = RetentionOptions(keep=2)


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return Store.open(tmp_path / "root")
    server: S3Server = request.getfixturevalue("s3")
    return Store.open(f"s3://{server.bucket()}/index", options=server.options)


@pytest.fixture
def quick() -> Iterator[Path]:
    """A folder in memory where the machine has one: thousands of fsyncs of a busy disk take minutes."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


@pytest.fixture
def disk(quick: Path) -> Store:
    return Store.open(quick / "root")


def built(store: Store, number: int, *, segments: Iterable[str] = (), table: str | None = None, parent: str | None = None) -> Manifest:
    """Write a generation with a part of its own and segments that others may share."""
    name, run_id = f"g{number:06d}", f"run-{number}"
    part = store.put(f"vectors/{run_id}/part-00000.parquet", f"vectors of {name}".encode())
    shared = [store.put(f"segments/{segment}/index.faiss", f"index {segment}".encode()) for segment in sorted(set(segments))]
    manifest = sample_manifest(
        name,
        run_id=run_id,
        parent=parent,
        parts=(listed(part),),
        segments=tuple(listed(ref, role="faiss", rows=None) for ref in shared),
        table=TablePin(uri=f"tables/{table}.lance", version=number, tag=name) if table else None,
    )
    store.put(f"runs/{run_id}/events.jsonl", b"{}\n")
    return write_generation(store, manifest, {"gates.json": b"{}\n"})


def live(store: Store, number: int, *, alias: str = "prod", **options: Any) -> Manifest:
    """Build a generation and publish it."""
    manifest = built(store, number, **options)
    moved(store, number, alias=alias)
    return manifest


def moved(store: Store, number: int, *, alias: str = "prod") -> None:
    head = current(store, alias)
    name = f"g{number:06d}"
    if head and any(entry.generation == name for entry in history(store, alias)):
        rollback(store, alias=alias, to=name, run_id=f"person-{head.seq}", reason="test", clock=lambda: NOW - timedelta(days=9))
    else:
        publish(store, alias=alias, generation=name, expected_seq=head.seq if head else 0, run_id=f"run-{number}", clock=lambda: START)


def nothing_to_clean(key: str, sweep: TableSweep) -> int:
    return 0


def collected(store: Store, options: RetentionOptions = KEEP_TWO, *, now: datetime = NOW) -> Removed:
    return apply_gc(store, plan_gc(store, now=now, options=options), sweep_table=nothing_to_clean, clock=lambda: now)


def whole(store: Store, generation: str) -> None:
    """Do what a reader of this generation does, with every byte checked."""
    manifest = Manifest.from_json(store.get(f"generations/{generation}/manifest.json"))
    for item in manifest.objects:
        store.verify(item)


def keys(store: Store) -> set[str]:
    return {info.key for info in store.list()}


def made_young(store: Store, *prefixes: str) -> None:
    for info in store.list():
        if info.key.startswith(prefixes):
            os.utime(store.uri(info.key), (YOUNG.timestamp(), YOUNG.timestamp()))


def needed(store: Store) -> set[str]:
    """The generations that a plan with two to keep would not drop."""
    return {*plan_gc(store, now=NOW, options=KEEP_TWO).keep}


# What stays and what goes.


def test_the_store_says_when_an_object_was_written(store: Store) -> None:
    before = datetime.now(UTC) - timedelta(seconds=2)
    store.put("a/b", b"x")
    found = [*store.list("a"), store.head("a/b")]
    for info in found:
        assert info is not None
        assert info.modified is not None
        assert before <= info.modified <= datetime.now(UTC) + timedelta(seconds=2)


def test_the_newest_generations_of_an_alias_stay_and_older_ones_go_with_what_only_they_need(store: Store) -> None:
    for number, segments in ((1, ["s1", "s2"]), (2, ["s2", "s3"]), (3, ["s3"])):
        live(store, number, segments=segments)
    plan = plan_gc(store, now=NOW, options=KEEP_TWO)
    assert plan.keep == {"g000002": ("one of the last 2 of `prod`",), "g000003": ("live on `prod`",)}
    assert plan.drop == ("g000001",)
    gone = {
        "generations/g000001/gates.json",
        "generations/g000001/manifest.json",
        "runs/run-1/events.jsonl",
        "segments/s1/index.faiss",
        "vectors/run-1/part-00000.parquet",
    }
    assert {key for key, _ in plan.objects} == gone
    before = keys(store)
    removed = collected(store)
    assert keys(store) == before - gone | {"generations/g000001/removed.json"}
    assert (removed.generations, removed.objects, removed.bytes) == (1, 5, plan.bytes)
    whole(store, "g000002")
    whole(store, "g000003")
    assert collected(store).objects == 0


def test_a_plan_removes_nothing(store: Store) -> None:
    for number in range(1, 5):
        live(store, number)
    before = {(info.key, info.size) for info in store.list()}
    assert plan_gc(store, now=NOW, options=KEEP_TWO).objects
    assert {(info.key, info.size) for info in store.list()} == before


def test_a_rollback_target_within_keep_survives_and_works(disk: Store) -> None:
    for number in range(1, 6):
        live(disk, number, segments=[f"s{number}"])
    collected(disk)
    entry = rollback(disk, alias="prod", run_id="person", reason="bad night", clock=lambda: NOW, verify="full")
    assert entry.generation == "g000004"
    with pytest.raises(NotFound, match="never finished, or was removed"):
        rollback(disk, alias="prod", to="g000003", run_id="person-2", reason="worse", clock=lambda: NOW)


def test_distinct_generations_are_counted_not_entries(disk: Store) -> None:
    for number in (1, 2, 3):
        live(disk, number)
    for number in (2, 3, 2, 3, 2):
        moved(disk, number)
    assert needed(disk) == {"g000002", "g000003"}
    assert {*plan_gc(disk, now=NOW, options=RetentionOptions(keep=1)).keep} == {"g000002"}


def test_every_alias_keeps_its_own_and_a_held_one_says_so(disk: Store) -> None:
    live(disk, 1, alias="staging")
    for number in (2, 3, 4):
        live(disk, number)
    rollback(disk, alias="prod", run_id="person", reason="hold it", clock=lambda: START, hold=True)
    keep = plan_gc(disk, now=NOW, options=RetentionOptions(keep=1)).keep
    assert keep == {"g000001": ("live on `staging`",), "g000003": ("held on `prod`",)}


def test_a_pin_keeps_a_generation_until_it_is_unpinned(store: Store) -> None:
    for number in (1, 2, 3):
        live(store, number, segments=[f"s{number}"])
    one = pin(store, "g000001", reason="the A/B test of autumn", by="ana", clock=lambda: NOW)
    assert pins(store) == {"g000001": one}
    assert plan_gc(store, now=NOW, options=KEEP_TWO).keep["g000001"] == ("pinned by ana",)
    assert collected(store).objects == 0
    unpin(store, "g000001")
    unpin(store, "g000001")
    assert collected(store).generations == 1
    with pytest.raises(NotFound, match="never finished, or was collected"):
        pin(store, "g000001", reason="too late", by="ana", clock=lambda: NOW)
    assert pins(store) == {}


def test_a_reader_keeps_its_generation_while_its_lease_lasts(store: Store) -> None:
    for number in (1, 2, 3):
        live(store, number)
    key = pin_reader(store, "g000001", ttl=timedelta(hours=1), name="search", clock=lambda: NOW)
    assert collected(store).objects == 0
    assert plan_gc(store, now=NOW + timedelta(hours=2), options=KEEP_TWO).drop == ("g000001",)
    release_reader(store, key)
    assert collected(store).generations == 1
    pin_reader(store, "g000001", ttl=timedelta(hours=1), name="late", clock=lambda: NOW)
    assert collected(store).objects == 0, "a reader that came too late keeps nobody from collecting"


def test_nothing_younger_than_the_grace_period_is_touched(store: Store) -> None:
    for number in (1, 2, 3):
        live(store, number)
    store.put("segments/orphan/index.faiss", b"x")
    soon = datetime.now(UTC) + timedelta(days=1)
    plan = plan_gc(store, now=soon, options=KEEP_TWO)
    assert (plan.drop, plan.objects) == ((), ())
    assert plan.keep["g000001"] == ("young",)


def test_a_young_candidate_keeps_itself_and_its_parent(disk: Store) -> None:
    for number in (1, 2, 3):
        live(disk, number)
    built(disk, 4, parent="g000001")
    made_young(disk, "generations/g000004", "vectors/run-4")
    keep = plan_gc(disk, now=NOW, options=KEEP_TWO).keep
    assert keep["g000004"] == ("young",)
    assert keep["g000001"] == ("parent of the candidate g000004",)
    made_old = NOW + timedelta(days=3)
    assert plan_gc(disk, now=made_old, options=KEEP_TWO).drop == ("g000001", "g000004")


def test_a_run_that_holds_a_lease_keeps_its_folders_its_base_and_all_it_wrote(disk: Store) -> None:
    for number in (1, 2, 3):
        live(disk, number)
    lease = acquire(disk, "table", run_id="run-9", ttl=timedelta(hours=1), clock=lambda: YOUNG)
    disk.put("vectors/run-9/part-00000.parquet", b"of an attempt that died long ago")
    disk.put("runs/run-9/state.json", b"{}")
    disk.put("runs/run-8/state.json", b"{}")
    disk.put("tables/new.lance/data/x.lance", b"x")
    moved(disk, 2)  # a rollback while the run builds on g000003; its entry is nine days old
    plan = plan_gc(disk, now=NOW - timedelta(minutes=5), options=RetentionOptions(keep=1))
    assert plan.keep == {"g000002": ("live on `prod`",)}
    assert {key for key, _ in plan.objects} >= {"runs/run-8/state.json"}
    assert not any("run-9" in key or key.startswith("tables/") for key, _ in plan.objects)
    lease.release()
    gone = {key for key, _ in plan_gc(disk, now=NOW, options=RetentionOptions(keep=1)).objects}
    assert gone >= {"vectors/run-9/part-00000.parquet", "runs/run-9/state.json", "tables/new.lance/data/x.lance"}


def test_what_was_live_when_a_running_run_began_stays(disk: Store) -> None:
    for number in (1, 2, 3):
        live(disk, number)
    acquire(disk, "table", run_id="run-9", ttl=timedelta(days=20), clock=lambda: NOW - timedelta(days=10))
    moved(disk, 2)  # nine days ago: the run began on g000003
    keep = plan_gc(disk, now=NOW, options=RetentionOptions(keep=1)).keep
    assert keep == {"g000002": ("live on `prod`",), "g000003": ("live on `prod` since a run began that is still writing",)}


def test_a_lease_older_than_the_grace_period_keeps_what_was_written_since_it_began(disk: Store) -> None:
    live(disk, 1)
    began = datetime.now(UTC) - timedelta(hours=1)
    disk.put("segments/new/index.faiss", b"written by a run that takes a month")
    acquire(disk, "table", run_id="run-9", ttl=timedelta(days=60), clock=lambda: began)
    assert plan_gc(disk, now=NOW, options=KEEP_TWO).objects == ()


def test_a_hundred_aborted_runs_leave_no_orphan_bytes(disk: Store) -> None:
    live(disk, 1)
    for number in range(2, 102):
        disk.put(f"vectors/run-{number}/part-00000.parquet", b"v" * 100)
        disk.put(f"segments/s{number}/index.faiss", b"s" * 100)
        disk.put(f"runs/run-{number}/state.json", b"{}")
        if number % 2:
            disk.put(f"generations/g{number:06d}/gates.json", b"{}")
        else:
            built(disk, number, segments=[f"s{number}"])  # finished, refused by a gate
    removed = collected(disk)
    assert removed.generations == 50
    after = plan_gc(disk, now=NOW + timedelta(days=300), options=KEEP_TWO)
    assert (after.objects, after.bytes) == ((), 0)
    left = keys(disk)
    assert {key for key in left if not key.endswith("/removed.json") and not key.startswith(("aliases/", "leases/"))} == {
        "generations/g000001/gates.json",
        "generations/g000001/manifest.json",
        "runs/run-1/events.jsonl",
        "vectors/run-1/part-00000.parquet",
    }
    whole(disk, "g000001")


def test_a_number_is_not_given_twice_after_its_generation_was_collected(disk: Store) -> None:
    live(disk, 1)
    built(disk, 2)
    disk.put("generations/g000003/gates.json", b"{}")
    collected(disk)
    assert next_generation(disk) == "g000004"


def test_temporary_files_of_dead_writers_are_swept(disk: Store) -> None:
    live(disk, 1)
    dead = Path(disk.uri("vectors/run-1")) / ".tmp-dead"
    dead.write_bytes(b"half")
    os.utime(dead, (START.timestamp(), START.timestamp()))
    assert collected(disk).temporaries == 1


def test_aliases_leases_pins_and_foreign_files_stay(disk: Store) -> None:
    for number in (1, 2, 3, 4):
        live(disk, number)
    acquire(disk, "table", run_id="r", ttl=timedelta(hours=1), clock=lambda: START)
    foreign = Path(disk.uri("segments")) / "notes of ana\x1b[2J.txt"
    foreign.parent.mkdir()
    foreign.write_text("do not lose")
    plan = plan_gc(disk, now=NOW, options=KEEP_TWO)
    collected(disk)
    assert plan.foreign == ("segments/notes of ana\x1b[2J.txt",)
    assert foreign.exists()
    assert "  stays   segments/notes of ana\\x1b[2J.txt, which catalog-embed did not write\n" in gc_text(plan)
    assert len(history(disk, "prod")) == 4
    assert "leases/table/00000001.json" in keys(disk)


def test_the_quarantine_of_a_kept_run_stays_although_no_manifest_lists_it(disk: Store) -> None:
    for number in (1, 2, 3):
        live(disk, number)
        disk.put(f"vectors/run-{number}/quarantine.parquet", b"rows")
        disk.put(f"vectors/run-{number}/part-99999.parquet", b"of a dead attempt")
    gone = {key for key, _ in plan_gc(disk, now=NOW, options=KEEP_TWO).objects}
    assert {key for key in gone if "quarantine" in key} == {"vectors/run-1/quarantine.parquet"}
    assert {key for key in gone if "99999" in key} == {f"vectors/run-{number}/part-99999.parquet" for number in (1, 2, 3)}


# Tables and towers.


def test_tables_in_use_are_swept_by_version_and_unused_ones_go_whole(disk: Store) -> None:
    live(disk, 1, table="old")
    for number in (2, 3, 4):
        live(disk, number, table="new")
    for table in ("old", "new", "newer"):
        for file in ("_versions/1.manifest", "data/aa.lance"):
            disk.put(f"tables/{table}.lance/{file}", b"x")
    made_young(disk, "tables/newer.lance/data")
    plan = plan_gc(disk, now=NOW, options=KEEP_TWO)
    assert {key for key, _ in plan.objects if key.startswith("tables/")} == {
        "tables/old.lance/_versions/1.manifest",
        "tables/old.lance/data/aa.lance",
    }
    kept = {"g000003": 3, "g000004": 4}
    cutoff = NOW - timedelta(days=2)
    assert plan.tables == {"tables/new.lance": TableSweep(kept=kept, dropped=("g000002",), cutoff=cutoff, strays=True)}
    calls: list[tuple[str, TableSweep]] = []

    def sweep(key: str, sweep: TableSweep) -> int:
        assert disk.head("generations/g000002/manifest.json") is None, "a version goes after the manifest that named it"
        calls.append((key, sweep))
        return 3

    assert apply_gc(disk, plan, sweep_table=sweep, clock=lambda: NOW).table_versions == 3
    assert calls == [*plan.tables.items()]


def test_stray_tags_are_left_alone_while_a_run_writes(disk: Store) -> None:
    live(disk, 1, table="new")
    acquire(disk, "table", run_id="r", ttl=timedelta(hours=1), clock=lambda: NOW)
    assert not plan_gc(disk, now=NOW, options=KEEP_TWO).tables["tables/new.lance"].strays


def test_towers_stay_unless_asked_for_and_those_in_use_always(disk: Store) -> None:
    live(disk, 1)
    for tower in ("3fa1c9", "3fa1c9ffee", "77aa00"):
        disk.put(f"towers/{tower}/model.safetensors", b"weights")
    assert plan_gc(disk, now=NOW, options=KEEP_TWO).objects == ()
    asked = plan_gc(disk, now=NOW, options=replace(KEEP_TWO, towers=True))
    assert [key for key, _ in asked.objects] == ["towers/77aa00/model.safetensors"]


# Whatever cannot be known stops the collection.


@pytest.mark.parametrize("data", [b"", b"{", b'{"format_version":99}'])
@pytest.mark.parametrize("generation", ["g000001", "g000003"])
def test_a_manifest_that_cannot_be_read_stops_everything(disk: Store, generation: str, data: bytes) -> None:
    for number in (1, 2, 3):
        live(disk, number)
    disk.put(f"generations/{generation}/manifest.json", data)
    before = keys(disk)
    with pytest.raises(ManifestError, match=f"{generation}/manifest.json"):
        collected(disk)
    assert keys(disk) == before


def test_a_manifest_that_was_changed_or_lost_stops_everything(disk: Store) -> None:
    for number in (1, 2, 3):
        live(disk, number)
    path = Path(disk.uri("generations/g000002/manifest.json"))
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"live":2', b'"live":3'))
    with pytest.raises(ManifestError, match="g000002 is one of the last 2 of `prod`, but its manifest was changed"):
        collected(disk)
    path.unlink()
    with pytest.raises(ManifestError, match="g000002 is one of the last 2 of `prod`, but has no manifest"):
        collected(disk)
    path.write_bytes(data)
    assert collected(disk).generations == 1


def test_a_longer_memory_than_before_finds_what_is_left(disk: Store) -> None:
    for number in range(1, 6):
        live(disk, number)
    collected(disk)
    assert {*plan_gc(disk, now=NOW, options=RetentionOptions(keep=5)).keep} == {"g000004", "g000005"}


# The store moves while the collection runs.


def between(store: Store, act: Callable[[], object]) -> GcPlan:
    for number in (1, 2, 3):
        live(store, number, segments=[f"s{number}"])
    plan = plan_gc(store, now=NOW, options=KEEP_TWO)
    act()
    return plan


MOVES: dict[str, tuple[Callable[[Store], object], str]] = {
    "publish": (lambda store: live(store, 4), "g000004 was written"),
    "candidate": (lambda store: built(store, 4), "g000004 was written"),
    "rollback": (lambda store: moved(store, 1), r"alias `prod` moved, g000001 is live on `prod`"),
    "pin": (lambda store: pin(store, "g000001", reason="r", by="ana", clock=lambda: NOW), "g000001 is pinned by ana"),
    "reader": (
        lambda store: pin_reader(store, "g000001", ttl=timedelta(hours=1), name="x", clock=lambda: NOW),
        "g000001 is open in a reader",
    ),
    "run": (lambda store: acquire(store, "t", run_id="run-1", ttl=timedelta(hours=1), clock=lambda: NOW), "run run-1 began to write"),
}


@pytest.mark.parametrize("name", MOVES)
def test_a_store_that_moved_since_the_plan_stops_the_collection_before_anything_goes(disk: Store, name: str) -> None:
    act, message = MOVES[name]
    plan = between(disk, partial(act, disk))
    before = keys(disk)
    with pytest.raises(PlanError, match=message):
        apply_gc(disk, plan, sweep_table=nothing_to_clean, clock=lambda: NOW)
    assert keys(disk) == before


class _At:
    """Acts once when a point is reached."""

    def __init__(self, point: str, act: Callable[[], object]) -> None:
        self._point, self._act = point, act

    def reach(self, point: str) -> None:
        if point == self._point:
            self._act()


@pytest.mark.parametrize("name", ["rollback", "pin", "reader"])
def test_who_comes_for_a_generation_just_before_its_objects_go_gets_it_back(disk: Store, name: str) -> None:
    # Each looked at the manifest in the last moment in which it was there.
    plan = between(disk, lambda: None)
    head = current(disk, "prod")
    assert head is not None
    first = history(disk, "prod")[0]

    def act() -> None:
        if name == "rollback":
            disk.put_if_absent("aliases/prod/00000004.json", replace(first, seq=4, parent_seq=3, action="rollback").to_json())
        elif name == "pin":
            disk.put("pins/g000001.json", pinned)
        else:
            MOVES["reader"][0](disk)

    pin(disk, "g000001", reason="r", by="ana", clock=lambda: NOW)
    pinned = disk.get("pins/g000001.json")
    unpin(disk, "g000001")
    racing = Store.open(disk.root, faults=_At("gc.after_manifests", act))
    with pytest.raises(PlanError, match="Nothing that is needed went"):
        apply_gc(racing, plan, sweep_table=nothing_to_clean, clock=lambda: NOW)
    whole(disk, "g000001")
    assert "g000001" in needed(disk)


def test_two_collections_at_once_finish_the_same_work(disk: Store) -> None:
    for number in range(1, 6):
        live(disk, number, segments=[f"s{number}"])
    plan = plan_gc(disk, now=NOW, options=KEEP_TWO)
    racing = Store.open(disk.root, faults=_At("gc.after_manifests", lambda: collected(disk)))
    apply_gc(racing, plan, sweep_table=nothing_to_clean, clock=lambda: NOW)
    assert plan_gc(disk, now=NOW, options=KEEP_TWO).objects == ()
    for generation in ("g000004", "g000005"):
        whole(disk, generation)


# Crashes.


def test_after_every_crash_of_a_collection_what_is_kept_is_whole_and_a_rerun_finishes(
    quick: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = Store.open(quick / "base")
    for number, segments in ((1, ["s1", "s2"]), (2, ["s1", "s3"]), (3, ["s2", "s3"]), (4, ["s2", "s4"])):
        live(base, number, segments=segments)
    base.put("vectors/dead/part-00000.parquet", b"orphan")

    def fresh(name: str, faults: Faults = NO_FAULTS) -> Store:
        return Store.open(shutil.copytree(base.root, quick / name), faults=faults)

    recorder = Recorder()
    counted = fresh("counted", recorder)
    collected(counted)
    finished = keys(counted)
    trials, failures = 0, []
    for nth, mode in strikes(recorder.points):
        trials += 1
        store = fresh("trial", Strike(nth, mode))
        status = under(mode, partial(collected, store), failures=(StoreError,))
        survivor = Store.open(store.root)
        head = current(survivor, "prod")
        assert head is not None
        open_manifest(survivor, head)
        for generation in ("g000003", "g000004"):
            whole(survivor, generation)
        for info in survivor.list("generations"):
            if info.key.endswith("/manifest.json"):
                whole(survivor, info.key.split("/")[1])  # a manifest that is there is never that of half a generation
        collected(survivor)
        if status not in ((-9,) if mode == "kill" else (0, 3)) or keys(survivor) != finished:
            failures.append((recorder.points[nth], mode, status))
        shutil.rmtree(store.root)
    with capsys.disabled():
        print(f"\ncollection crashes: {trials - len(failures)}/{trials} left every kept generation whole and were finished by a re-run")
    assert failures == []
    assert trials > 80


# Any world.


@st.composite
def worlds(draw: st.DrawFn) -> dict[str, Any]:
    count = draw(st.integers(1, 7))
    numbers = st.integers(1, count)
    return {
        "segments": [draw(st.sets(st.sampled_from("abcdef"), max_size=3)) for _ in range(count)],
        "moves": draw(st.lists(st.tuples(st.sampled_from(["prod", "staging"]), numbers), max_size=8)),
        "pins": draw(st.sets(numbers, max_size=1)),
        "readers": draw(st.sets(numbers, max_size=1)),
        "expired": draw(st.sets(numbers, max_size=2)),
        "young": draw(st.sets(numbers, max_size=1)),
        "keep": draw(st.integers(1, 3)),
    }


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(worlds())
def test_nothing_needed_is_ever_removed_and_nothing_else_is_kept(world: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY) as root:
        store = Store.open(root)
        names = {number: f"g{number:06d}" for number in range(1, len(world["segments"]) + 1)}
        for number, segments in enumerate(world["segments"], start=1):
            built(store, number, segments=segments, parent=names.get(number - 2))
        logs: dict[str, list[int]] = {}
        for alias, number in world["moves"]:
            moved(store, number, alias=alias)
            logs.setdefault(alias, []).append(number)
        for number in world["pins"]:
            pin(store, names[number], reason="r", by="b", clock=lambda: NOW)
        for number in world["readers"]:
            pin_reader(store, names[number], ttl=timedelta(hours=1), name="r", clock=lambda: NOW)
        for number in world["expired"]:
            pin_reader(store, names[number], ttl=timedelta(hours=1), name="r", clock=lambda: START)
        made_young(store, *(f"generations/{names[number]}/manifest.json" for number in world["young"]), "!")
        # The oracle: newest distinct numbers of each log, and whatever is held by hand or young, with a candidate's parent.
        wanted = {*world["pins"], *world["readers"], *world["young"]}
        for log in logs.values():
            wanted |= {*[*dict.fromkeys(reversed(log))][: world["keep"]]}
        published = {number for log in logs.values() for number in log}
        wanted |= {number - 2 for number in world["young"] if number not in published and number > 2}
        plan = plan_gc(store, now=NOW, options=RetentionOptions(keep=world["keep"]))
        assert {*plan.keep} == {names[number] for number in wanted}
        heads = {alias: current(store, alias) for alias in logs}
        apply_gc(store, plan, sweep_table=nothing_to_clean, clock=lambda: NOW)
        for number in wanted:
            whole(store, names[number])
        assert {alias: current(store, alias) for alias in logs} == heads
        segments = {segment for number in wanted for segment in world["segments"][number - 1]}
        assert {info.key.split("/")[1] for info in store.list("segments")} == segments
        assert {info.key.split("/")[1] for info in store.list("vectors")} == {f"run-{number}" for number in wanted}


# Words.


def test_a_plan_reads_well(disk: Store) -> None:
    for number in (1, 2, 3):
        live(disk, number, segments=["s"], table="t")
    plan = plan_gc(disk, now=NOW, options=KEEP_TWO)
    text = gc_text(plan)
    assert text.splitlines()[:4] == [
        "Collection  2 generations stay, 1 go: 4 objects, " + byte_size(plan.bytes),
        "  keep    g000002  one of the last 2 of `prod`",
        "  keep    g000003  live on `prod`",
        "  remove  g000001  2026-11-04 02:10 UTC",
    ]
    assert "  remove  vectors/      1 object, 18 B\n" in text
    assert "  clean   tables/t.lance  versions 2, 3 stay\n" in text


def test_a_plan_is_json(disk: Store) -> None:
    for number in (1, 2, 3):
        live(disk, number, table="t")
    tree = plan_gc(disk, now=NOW, options=KEEP_TWO).to_json()
    assert tree["drop"] == ["g000001"]
    assert tree["keep"] == {"g000002": ["one of the last 2 of `prod`"], "g000003": ["live on `prod`"]}
    assert tree["tables"] == {"tables/t.lance": {"kept": {"g000002": 2, "g000003": 3}, "dropped": ["g000001"]}}
    assert sum(item["size"] for item in tree["objects"]) == tree["bytes"]


@pytest.mark.parametrize("options", [{"keep": 0}, {"grace": timedelta(minutes=5)}])
def test_options_that_would_remove_what_is_needed_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        RetentionOptions(**options)
