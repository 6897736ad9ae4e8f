from __future__ import annotations

import re
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.contracts import ObjectRef
from pipelines.errors import AlreadyExists, CorruptObject, InputError, ManifestError, NotFound, StoreError
from pipelines.manifest import Manifest
from pipelines.publish import LogEntry, current, history, next_generation, open_manifest, publish, rollback, write_generation
from pipelines.storage import Store
from tests.conftest import S3Server
from tests.generations import START, chain, listed, move, published, sample_manifest, written


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return Store.open(tmp_path / "root")
    server: S3Server = request.getfixturevalue("s3")
    return Store.open(f"s3://{server.bucket()}/index", options=server.options)


def back(store: Store, *, run_id: str = "person-1", **options: Any) -> LogEntry:
    return rollback(store, alias="prod", run_id=run_id, reason="bad recall", clock=lambda: START, **options)


def live(store: Store, alias: str = "prod") -> str:
    head = current(store, alias)
    assert head is not None
    return head.generation


# One behaviour, every implementation.


def test_an_alias_without_entries_is_empty(store: Store) -> None:
    assert current(store, "prod") is None
    assert history(store, "prod") == ()


def test_publish_makes_a_generation_live_and_leaves_its_entry(store: Store) -> None:
    entry = published(store, "g000001", expected_seq=0)
    assert current(store, "prod") == entry
    assert (entry.seq, entry.parent_seq, entry.action, entry.at, entry.hold) == (1, 0, "publish", START, False)
    assert [info.key for info in store.list("aliases")] == ["aliases/prod/00000001.json"]
    manifest = open_manifest(store, entry)
    assert manifest.generation == "g000001"
    for item in manifest.objects:
        store.verify(item)
    assert [item.key for item in manifest.attachments] == ["generations/g000001/gates.json"]


def test_aliases_are_independent(store: Store) -> None:
    published(store, "g000001", expected_seq=0)
    published(store, "g000002", expected_seq=0, alias="staging")
    assert (live(store), live(store, "staging")) == ("g000001", "g000002")
    move(store, "g000002", expected_seq=1)
    assert live(store) == "g000002"


def test_a_stale_run_cannot_publish_and_learns_who_won(store: Store) -> None:
    chain(store, 2)
    written(store, "g000003", run_id="stale")
    with pytest.raises(
        AlreadyExists,
        match=r"entry 2 was created by run run-2 for g000002 at 2026-11-04T02:10:00.*The publish of g000003 started from entry 1",
    ):
        move(store, "g000003", expected_seq=1, run_id="stale")
    assert live(store) == "g000002"
    assert len(history(store, "prod")) == 2


def test_publishing_ahead_of_the_log_is_refused(store: Store) -> None:
    written(store, "g000001")
    with pytest.raises(StoreError, match="ends at entry 0, but the run started from 3"):
        move(store, "g000001", expected_seq=3)
    assert history(store, "prod") == ()


def test_a_rerun_finds_its_own_entry_whatever_happened_since(store: Store) -> None:
    first = published(store, "g000001", expected_seq=0)
    assert move(store, "g000001", expected_seq=0, run_id="run-1") == first
    assert move(store, "g000001", expected_seq=1, run_id="run-1") == first
    chain_head = published(store, "g000002", expected_seq=1, run_id="run-2")
    assert move(store, "g000001", expected_seq=2, run_id="run-1") == first  # not published a second time, over g000002
    assert current(store, "prod") == chain_head


def test_an_unwritten_generation_is_not_published(store: Store) -> None:
    with pytest.raises(NotFound, match=r"g000009 has no manifest .* never finished"):
        move(store, "g000009", expected_seq=0)
    assert current(store, "prod") is None


def test_missing_and_cut_objects_are_all_reported_and_forbid_publish(store: Store) -> None:
    parts = [listed(store.put(f"vectors/r/p{number}", b"12345678")) for number in range(8)]
    write_generation(store, sample_manifest(parts=tuple(parts)), {})
    for number in range(6):
        store.delete(f"vectors/r/p{number}")
    store.put("vectors/r/p7", b"1234")
    with pytest.raises(CorruptObject, match=r"vectors/r/p0 is missing; .*; and 2 more"):
        move(store, "g000001", expected_seq=0)
    for number in range(6):
        store.put(f"vectors/r/p{number}", b"12345678")
    with pytest.raises(CorruptObject, match="vectors/r/p7 has 4 bytes instead of 8"):
        move(store, "g000001", expected_seq=0)
    assert current(store, "prod") is None


def test_full_verification_finds_what_sizes_cannot(store: Store) -> None:
    part = store.put("vectors/r/p0", b"12345678")
    write_generation(store, sample_manifest(parts=(listed(part),)), {})
    store.put("vectors/r/p0", b"12345679")
    with pytest.raises(CorruptObject, match="expected sha256"):
        move(store, "g000001", expected_seq=0, verify="full")
    assert current(store, "prod") is None


def test_a_generation_with_a_failed_gate_is_not_published(store: Store) -> None:
    write_generation(store, sample_manifest(gates={"recall_at_10": "failed", "churn": "failed", "nan": "passed"}), {})
    with pytest.raises(ManifestError, match=r"gates failed \(churn, recall_at_10\)"):
        move(store, "g000001", expected_seq=0)
    assert current(store, "prod") is None


def test_rollback_goes_to_the_generation_before_and_again_to_the_one_before_that(store: Store) -> None:
    chain(store, 3)
    entry = back(store, run_id="a")
    assert (entry.seq, entry.generation, entry.action, entry.reason) == (4, "g000002", "rollback", "bad recall")
    assert back(store, run_id="b").generation == "g000001"
    with pytest.raises(NotFound, match="no generation was live before g000001"):
        back(store, run_id="c")
    assert [item.generation for item in history(store, "prod")] == ["g000001", "g000002", "g000003", "g000002", "g000001"]


def test_rollback_after_a_publish_over_a_rollback_goes_to_what_was_live_then(store: Store) -> None:
    chain(store, 2)
    back(store, run_id="a", to="g000001")
    published(store, "g000003", expected_seq=3, run_id="run-3")
    assert back(store, run_id="b").generation == "g000001"


def test_a_repeated_rollback_of_one_run_moves_once(store: Store) -> None:
    chain(store, 3)
    assert back(store) == back(store)
    assert live(store) == "g000002"


def test_rollback_asks_whether_readers_could_open_the_generation(store: Store) -> None:
    published(store, "g000001", expected_seq=0)
    published(store, "g000002", expected_seq=1)
    seen: list[str] = []

    def refuse(manifest: Manifest) -> None:
        seen.append(manifest.generation)
        raise ManifestError("too old for these readers")

    with pytest.raises(ManifestError, match="too old for these readers"):
        back(store, check=refuse)
    assert (seen, live(store)) == (["g000001"], "g000002")


def test_rollback_refuses_unknown_and_damaged_generations(store: Store) -> None:
    chain(store, 3)
    written(store, "g000007")
    for unknown in ("g000007", "g000099"):
        with pytest.raises(NotFound, match=f"alias `prod` never named {unknown}"):
            back(store, to=unknown)
    store.delete("vectors/run-1/part-g000001.parquet")
    with pytest.raises(CorruptObject, match="g000001 is damaged"):
        back(store, to="g000001")
    manifest = store.get("generations/g000002/manifest.json")
    store.put("generations/g000002/manifest.json", manifest.replace(b"warned", b"passed"))
    with pytest.raises(CorruptObject, match=r"g000002/manifest\.json: expected sha256 .* It was changed after it was published"):
        back(store)
    with pytest.raises(ManifestError):
        back(store, to="../g000001")
    assert live(store) == "g000003"
    with pytest.raises(NotFound, match="nothing to roll back to"):
        rollback(store, alias="empty", run_id="r", reason="", clock=lambda: START)


def test_a_held_alias_takes_rollbacks_but_no_publish_until_released(store: Store) -> None:
    chain(store, 3)
    assert back(store, run_id="a", hold=True).hold
    written(store, "g000004", run_id="run-4")
    with pytest.raises(InputError, match=r"held on g000002 since entry 4 \(bad recall\). g000004 stays unpublished"):
        move(store, "g000004", expected_seq=4, run_id="run-4")
    assert back(store, run_id="b").hold, "a rollback does not release the hold"
    assert not move(store, "g000004", expected_seq=5, run_id="run-4", release_hold=True).hold
    assert live(store) == "g000004"


def test_a_manifest_that_was_swapped_or_cut_is_never_opened(store: Store) -> None:
    chain(store, 2)
    head = current(store, "prod")
    assert head is not None
    good = store.get("generations/g000002/manifest.json")
    for damaged in (store.get("generations/g000001/manifest.json"), good[:-1], good.replace(b'"live":2', b'"live":3')):
        store.put("generations/g000002/manifest.json", damaged)
        with pytest.raises(CorruptObject, match="expected sha256"):
            open_manifest(store, head)
    store.put("generations/g000002/manifest.json", store.get("generations/g000001/manifest.json"))
    with pytest.raises(ManifestError, match=r"holds the manifest of g000001"):
        move(store, "g000002", expected_seq=2, run_id="again")


def test_a_damaged_or_missing_log_entry_is_named(store: Store) -> None:
    chain(store, 3)
    key = "aliases/prod/00000002.json"
    entry = store.get(key)
    for damaged, words in (
        (entry[:-20], "not readable as JSON"),
        (entry.replace(b'"seq":2', b'"seq":3'), "entry 3 follows 1"),
        (b"{}", "format_version"),
    ):
        store.put(key, damaged)
        with pytest.raises(ManifestError, match=f"{re.escape(key)}.*{words}"):
            history(store, "prod")
    store.put(key, store.get("aliases/prod/00000001.json"))
    with pytest.raises(ManifestError, match="holds entry 1"):
        history(store, "prod")
    store.delete(key)
    with pytest.raises(NotFound, match="alias `prod`: entry 2 is missing"):
        history(store, "prod")
    assert live(store) == "g000003"


def test_strangers_in_the_folders_do_not_disturb(store: Store) -> None:
    chain(store, 2)
    for key in (
        "aliases/prod/README",
        "aliases/prod/9.json",
        "aliases/prod/old/00000009.json",
        "generations/README",
        "generations/old/x",
    ):
        store.put(key, b"?")
    assert live(store) == "g000002"
    assert next_generation(store) == "g000003"


def test_the_next_generation_is_beyond_unfinished_ones(store: Store) -> None:
    assert next_generation(store) == "g000001"
    store.put("generations/g000041/gates.json", b"{}")
    assert next_generation(store) == "g000042"


def test_writing_a_generation_twice_is_writing_it_once(store: Store) -> None:
    manifest = sample_manifest()
    first = write_generation(store, manifest, {"gates.json": b"{}", "report.html": b"<p>"})
    later = replace(manifest, created_at=START + timedelta(hours=1))
    assert write_generation(store, later, {"gates.json": b"{}", "report.html": b"<p>other"}) == first
    assert store.get("generations/g000001/report.html") == b"<p>"


def test_a_generation_id_belongs_to_the_first_that_wrote_under_it(store: Store) -> None:
    write_generation(store, sample_manifest(), {"gates.json": b"{}"})
    for other in (sample_manifest(run_id="run-2"), sample_manifest(tower="000000")):
        with pytest.raises(AlreadyExists, match=r"already written by run run-1\. Take the next generation id"):
            write_generation(store, other, {"gates.json": b"{}"})
    store.put("generations/g000002/gates.json", b"of a dead attempt")
    with pytest.raises(AlreadyExists, match=r"another attempt's bytes\. Take the next generation id"):
        write_generation(store, sample_manifest("g000002"), {"gates.json": b"{}"})
    assert store.head("generations/g000002/manifest.json") is None


def test_what_could_not_be_read_back_is_not_written(store: Store) -> None:
    for broken in (sample_manifest(tower="a/b"), sample_manifest(parts=(listed(ObjectRef(key="k", size=-1, sha256="0" * 64)),))):
        with pytest.raises(ManifestError):
            write_generation(store, broken, {})
    with pytest.raises(InputError, match="manifest's own name"):
        write_generation(store, sample_manifest(), {"manifest.json": b"{}"})
    with pytest.raises(InputError, match="no segment of a key"):
        write_generation(store, sample_manifest(), {"../../x": b"{}"})
    assert next_generation(store) == "g000001"
    written(store, "g000001")
    with pytest.raises(ManifestError, match="exceed the limit"):
        move(store, "g000001", expected_seq=0, reason="x" * 100_000)
    assert current(store, "prod") is None


def test_a_clock_without_a_zone_is_refused(store: Store) -> None:
    written(store, "g000001")
    with pytest.raises(InputError, match="without a time zone"):
        publish(store, alias="prod", generation="g000001", expected_seq=0, run_id="r", clock=lambda: START.replace(tzinfo=None))
    chain(store, 2)
    with pytest.raises(InputError, match="without a time zone"):
        rollback(store, alias="prod", run_id="r", reason="", clock=lambda: START.replace(tzinfo=None))


@pytest.mark.parametrize("alias", ["", "Prod", "1prod", "prod/x", "../prod", "prod.", "a" * 64, "prod\n", "-p"])
def test_an_alias_name_that_is_none_is_refused(tmp_path: Path, alias: str) -> None:
    with pytest.raises(InputError, match="is no alias name"):
        current(Store.open(tmp_path), alias)


texts = st.text(max_size=20)


@given(
    entry=st.builds(
        LogEntry,
        seq=st.just(7),
        parent_seq=st.just(6),
        generation=st.just("g000001"),
        manifest_sha256=st.just("0" * 64),
        action=st.sampled_from(["publish", "rollback"]),
        run_id=texts,
        nonce=texts,
        reason=texts,
        hold=st.booleans(),
        at=st.just(START),
    )
)
def test_log_entries_round_trip_exactly(entry: LogEntry) -> None:
    data = entry.to_json()
    assert LogEntry.from_json(data) == entry
    assert LogEntry.from_json(data).to_json() == data
