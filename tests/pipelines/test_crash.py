"""Every write boundary of a whole nightly run, times every way to stop there: readers are safe, and a re-run finishes."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest

from pipelines.disk import NO_FAULTS, TEMPORARY, Faults
from pipelines.errors import AlreadyExists, StoreError
from pipelines.manifest import Manifest
from pipelines.publish import LogEntry, current, history, next_generation, open_manifest, publish, rollback, write_generation
from pipelines.storage import Store
from tests.conftest import S3Server
from tests.faults import Recorder, Strike, Vanished, strikes, under
from tests.generations import START, listed, published, sample_manifest

OLD, NEW = "g000001", "g000002"
ATTACHMENTS = {"gates.json": b'{"recall_at_10":0.97}\n', "report.html": b"<p>two</p>"}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run that nobody disturbs leaves behind."""

    content: str
    moves: tuple[tuple[int, str, str, str], ...]


def nightly(store: Store, source: Path) -> None:
    """Write three objects and a generation, publish it, and roll back: everything that a run may write."""
    part = store.put("vectors/run-2/part-00000.parquet", b"vectors " * 40)
    index = store.put("segments/s2/index.faiss", source)
    try:
        ids = store.put_if_absent("segments/s2/ids.parquet", b"ids of s2")
    except AlreadyExists:
        ids = store.put("segments/s2/ids.parquet", b"ids of s2")
    manifest = sample_manifest(
        NEW,
        parent=OLD,
        run_id="run-2",
        parts=(listed(part),),
        segments=(listed(index, role="faiss", rows=None), listed(ids, role="ids", rows=3)),
    )
    write_generation(store, manifest, ATTACHMENTS)
    publish(store, alias="prod", generation=NEW, expected_seq=1, run_id="run-2", clock=lambda: START)
    rollback(store, alias="prod", run_id="person-1", reason="drill", clock=lambda: START)


def moves(entries: tuple[LogEntry, ...]) -> tuple[tuple[int, str, str, str], ...]:
    return tuple((entry.seq, entry.action, entry.generation, entry.run_id) for entry in entries)


def readable(store: Store) -> Manifest:
    """Do what a reader does, with every byte checked."""
    head = current(store, "prod")
    assert head is not None
    manifest = open_manifest(store, head)
    for item in manifest.objects:
        store.verify(item)
    return manifest


def outcome(store: Store) -> Outcome:
    entries = history(store, "prod")
    manifests = {entry.generation: open_manifest(store, entry) for entry in entries}
    for item in {item for manifest in manifests.values() for item in manifest.objects}:
        store.verify(item)
    return Outcome(content=manifests[NEW].content_digest, moves=moves(entries))


def recovered(store: Store, source: Path, undisturbed: Outcome) -> list[str]:
    """Return what is wrong after a crash: the alias before the re-run, or the store after it."""
    wrong = []
    if readable(store).generation not in (OLD, NEW):
        wrong.append("the alias names neither the old nor the new generation")
    nightly(store, source)
    if (found := outcome(store)) != undisturbed:
        wrong.append(f"the re-run left {found}")
    if any(TEMPORARY in info.key for info in store.list()):
        wrong.append("a temporary file is listed")
    return wrong


def base(root: Path) -> tuple[Path, Path]:
    """Return a store's folder with one published generation, and a file to store."""
    published(Store.open(root / "base"), OLD, expected_seq=0)
    source = root / "index.bin"
    source.write_bytes(bytes(range(256)) * 8)
    return root / "base", source


def test_every_crash_of_a_run_on_a_local_disk_recovers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, source = base(tmp_path)

    def fresh(name: str, faults: Faults = NO_FAULTS) -> Store:
        return Store.open(shutil.copytree(before, tmp_path / name), faults=faults)

    recorder = Recorder()
    counted = fresh("counted", recorder)
    nightly(counted, source)
    undisturbed = outcome(counted)
    assert undisturbed.moves == ((1, "publish", OLD, "run-1"), (2, "publish", NEW, "run-2"), (3, "rollback", OLD, "person-1"))
    failures, trials, statuses = [], 0, Counter[int]()
    for nth, mode in strikes(recorder.points):
        trials += 1
        store = fresh("trial", Strike(nth, mode))
        status = under(mode, partial(nightly, store, source), failures=(StoreError,))
        statuses[status] += 1
        survivor = Store.open(store.root)
        wrong = recovered(survivor, source, undisturbed)
        survivor.sweep_temporaries(older_than_s=0)
        if status not in ((-9,) if mode == "kill" else (0, 3)) or wrong or any(Path(store.root).rglob(f"{TEMPORARY}*")):
            failures.append((recorder.points[nth], mode, status, wrong))
        shutil.rmtree(store.root)
    with capsys.disabled():
        boundaries = sum(point.endswith(":before") for point in recorder.points)
        how = f"{statuses[-9]} killed, {statuses[3]} failed, {statuses[0]} got over it"
        print(f"\ncrash enumeration: {trials - len(failures)}/{trials} recovered ({boundaries} write boundaries on disk; {how})")
    assert failures == []
    assert trials > 350


def test_every_crash_of_a_run_on_s3_recovers(s3: S3Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, source = base(tmp_path)

    def fresh() -> Store:
        store = Store.open(f"s3://{s3.bucket()}/index", options=s3.options)
        published(store, OLD, expected_seq=0)
        return store

    def disturbed(store: Store, faults: Faults) -> Store:
        return Store.open(store.root, options=s3.options, faults=faults)

    recorder = Recorder()
    counted = fresh()
    nightly(disturbed(counted, recorder), source)
    undisturbed = outcome(counted)
    failures, trials = [], 0
    for nth, mode in strikes(recorder.points):
        if mode == "ENOSPC":
            continue  # a bucket is never full; EIO stands for the lost request (before) and the lost answer (after)
        trials += 1
        store = fresh()
        try:
            nightly(disturbed(store, Strike(nth, "vanish" if mode == "kill" else mode)), source)
            ended = "got over it"
        except (Vanished, StoreError) as error:
            ended = type(error).__name__
        wrong = recovered(store, source, undisturbed)
        if wrong or (ended == "got over it" and mode == "kill"):
            failures.append((recorder.points[nth], mode, ended, wrong))
    with capsys.disabled():
        boundaries = sum(point.endswith(":before") for point in recorder.points)
        print(f"\ncrash enumeration: {trials - len(failures)}/{trials} recovered ({boundaries} write boundaries on S3)")
    assert failures == []
    assert trials > 20


def test_a_rerun_that_renders_another_report_takes_the_next_generation(tmp_path: Path) -> None:
    before, _ = base(tmp_path)
    recorder = Recorder()
    store = Store.open(shutil.copytree(before, tmp_path / "counted"), faults=recorder)
    write_generation(store, sample_manifest(NEW, run_id="run-2"), ATTACHMENTS)
    for nth, mode in strikes(recorder.points):
        root = shutil.copytree(before, tmp_path / "trial")
        dying = Store.open(root, faults=Strike(nth, mode))
        assert under(mode, partial(write_generation, dying, sample_manifest(NEW, run_id="run-2"), ATTACHMENTS), failures=(StoreError,)) in (
            -9,
            0,
            3,
        )
        store = Store.open(root)
        fresh = next_generation(store)
        assert fresh in (NEW, "g000003")
        later = sample_manifest(fresh, run_id="run-2", created_at=START + timedelta(hours=1))
        write_generation(store, later, ATTACHMENTS | {"report.html": b"<p>other</p>"})
        publish(store, alias="prod", generation=fresh, expected_seq=1, run_id="run-2", clock=lambda: START)
        assert readable(store).generation == fresh
        shutil.rmtree(root)


def test_the_enumeration_can_fail(tmp_path: Path) -> None:
    # The control: a writer that puts bytes straight under their final name loses the alias, and the same check says so.
    before, source = base(tmp_path)
    store = Store.open(before)
    nightly(store, source)
    undisturbed = outcome(store)
    (before / "aliases/prod/00000003.json").write_bytes((before / "aliases/prod/00000003.json").read_bytes()[:30])
    with pytest.raises(Exception, match="not readable as JSON"):
        recovered(store, source, undisturbed)
    (before / "aliases/prod/00000003.json").unlink()
    (before / "segments/s2/ids.parquet").write_bytes(b"ids")
    with pytest.raises(StoreError, match="expected 9 bytes, found 3"):
        readable(store)
