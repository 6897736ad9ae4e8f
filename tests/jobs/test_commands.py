"""The commands around the run, on real shops: what they print, how they exit, and what hostile input does not do."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import releasing
from jobs.cli.group import cli
from jobs.nightly import fingerprint_of
from jobs.settings import load
from pipelines.generation import lease_name
from pipelines.leases import LeaseEntry, acquire
from pipelines.publish import current, history, read_manifest
from pipelines.sample.nights import changes
from pipelines.sample.spec import SampleSpec
from pipelines.stores import lance
from tests.jobs.commands import ESCAPES, FIRST, HOSTILE, LIVE, PRODUCTS, SECOND, TEXTLESS, THIRD, Command, commands, store_of
from tests.shops import closing, configure, make_shop, read_catalog, write_catalog

pytestmark = pytest.mark.usefixtures("ray_cluster")

SPEC = SampleSpec(products=PRODUCTS)
GONE, CHANGED, PRICED, NEW = "CE-00000197", "CE-00000274", "CE-00000022", "CE-00000300"


@pytest.fixture
def config(two_nights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A shop of one's own."""
    shutil.copytree(two_nights.parent, tmp_path / "own")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "own" / "catalog-embed.yaml"


@pytest.fixture
def command(config: Path, capfd: pytest.CaptureFixture[str]) -> Command:
    """Commands on it."""
    return commands(capfd, config)


def live(config: Path) -> str:
    entry = current(store_of(config), "prod")
    assert entry is not None
    return entry.generation


# Looking.


def test_status_says_what_is_live_and_how_far_behind(look: Command) -> None:
    found = look("status")
    assert found.code == 0
    assert found.out.startswith(f"prod  {SECOND}  entry 2\n")
    assert f"{LIVE} products" in found.out
    data = look("status", "--output", "json").json
    assert (data["generation"], data["seq"], data["held"], data["live"]) == (SECOND, 2, False, LIVE)
    assert datetime.fromisoformat(data["watermark"]) == closing(1)
    assert data["last_run"]["outcome"] == "published"
    assert look("status", "--output", "jsonl").out.count("\n") == 1


def test_a_lag_beyond_the_limit_exits_1(look: Command) -> None:
    assert (look("status", "--max-lag", "26h").code, look("status", "--max-lag", "5000w").code) == (1, 0)
    assert "STALE" in look("status", "--max-lag", "26h").out
    wrong = look("status", "--max-lag", "a while")
    assert (wrong.code, wrong.out) == (2, "")


def test_runs_and_generations_are_listed_oldest_first(look: Command) -> None:
    listed = look("generations", "--output", "json").json
    assert [(item["generation"], item["standing"]) for item in listed] == [(FIRST, "published before"), (SECOND, "live")]
    assert [line.split()[0] for line in look("generations").out.splitlines()] == [FIRST, SECOND]
    ran = look("runs", "--output", "json").json
    assert [item["generation"] for item in ran] == [FIRST, SECOND]
    lines = look("runs", "--output", "jsonl").out.splitlines()
    assert [json.loads(line)["run_id"] for line in lines] == [item["run_id"] for item in ran] == sorted(item["run_id"] for item in ran)
    (last,) = look("runs", "-n", 1).out.splitlines()
    assert f"{FIRST} -> {SECOND}" in last


def test_diff_tells_the_truth_about_a_night(look: Command) -> None:
    truth = changes(SPEC, night=1).to_pydict()
    wanted: dict[str, set[str]] = {"add": set(), "text": set(), "attr": set(), "delete": set()}
    for name, action in zip(truth["sku"], truth["action"], strict=True):
        wanted[action].add(name)
    found = look("diff", FIRST, SECOND, "--sample", 100, "--output", "json").json
    assert {action: set(ids) for action, ids in found["ids"].items()} == wanted
    assert found["actions"] == {action: len(ids) for action, ids in wanted.items()}
    back = look("diff", SECOND, FIRST, "--sample", 100, "--output", "json").json["ids"]
    assert (set(back["add"]), set(back["delete"])) == (wanted["delete"], wanted["add"])
    assert look("diff", SECOND, SECOND, "--output", "json").json["actions"] == {"add": 0, "text": 0, "attr": 0, "delete": 0}
    assert look("diff", FIRST, SECOND).out.splitlines()[-1].split() == ["-", "only", "in", "the", "first", "1", GONE]


def explained(look: Command, product: str) -> dict[str, list[str]]:
    found = look("explain", product, "--output", "json")
    assert found.code == 0, found.err
    steps: dict[str, list[str]] = {}
    for item in found.json:
        steps.setdefault(item["step"], []).append(item["found"])
    return steps


def test_explain_follows_a_live_product_to_every_place(look: Command) -> None:
    steps = explained(look, CHANGED)
    (now,) = steps["text hash now"]
    assert now in steps["table"][0]
    assert [line.split(": ")[1].split(",")[0] for line in steps["part"]] == ["text", "add"]
    assert now in steps["part"][0]
    assert len(steps["segment"]) == 2
    assert sum("hidden by a tombstone" in line for line in steps["segment"]) == 1
    assert "note" not in steps
    assert [line.split(": ")[1].split(",")[0] for line in explained(look, PRICED)["part"]] == ["attr", "add"]


def test_explain_follows_a_deleted_an_unknown_and_a_quarantined_product(look: Command) -> None:
    gone = explained(look, GONE)
    assert gone["source"] == ["no live row has this id"]
    assert gone["table"][0].endswith("has no such product")
    assert [line.split(": ")[1].split(",")[0] for line in gone["part"]] == ["delete", "add"]
    assert "hidden by a tombstone" in gone["segment"][0]
    unknown = explained(look, "nobody")
    assert not unknown.keys() & {"part", "segment", "quarantine", "text now"}
    quarantined = explained(look, TEXTLESS)
    assert all("no_text" in line for line in quarantined["quarantine"])
    assert quarantined["quarantine"]
    assert "part" not in quarantined


def test_explain_tells_a_product_that_changed_or_came_since(command: Command, config: Path) -> None:
    rows = read_catalog(config)
    write_catalog(config, _renamed(rows, {NEW: "NEW-1"}, {CHANGED: "another title"}))
    assert "changed since" in explained(command, CHANGED)["note"][0]
    assert "backfill --reason missing" in explained(command, "NEW-1")["note"][0]
    (config.parent / "catalog" / "part-00000.parquet").unlink()
    steps = explained(command, CHANGED)
    assert "cannot be read now" in steps["source"][0]
    assert steps["table"]


def _renamed(rows: pa.Table, ids: dict[str, str], titles: dict[str, str]) -> pa.Table:
    data = rows.to_pylist()
    for row in data:
        row["title"] = titles.get(row["sku"], row["title"])
        row["sku"] = ids.get(row["sku"], row["sku"])
    return pa.Table.from_pylist(data, schema=rows.schema)


def test_catalog_text_and_arguments_cannot_move_the_cursor(look: Command) -> None:
    outputs = [
        look("explain", HOSTILE),
        look("explain", ESCAPES),
        look("search", ESCAPES),
        look("search", "x", "-k", LIVE, "--where", f"brand = '{ESCAPES.replace(chr(39), chr(39) * 2)}'"),
        look("search", "x", "--columns", ESCAPES),
        look("explain", HOSTILE, "--output", "json"),
        look("search", "x", "-k", LIVE, "--output", "jsonl"),
    ]
    for found in outputs:
        for char in ("\x1b", "\x07", "\u202e"):
            assert char not in found.out + found.err
    assert HOSTILE in look("search", "x", "-k", LIVE).out


def test_search_answers_as_text_json_and_lines(look: Command) -> None:
    found = look("search", "red leather shoes", "-k", 7, "--output", "json").json
    assert len(found) == 7
    assert {item["generation"] for item in found} == {SECOND}
    assert [item["score"] for item in found] == sorted((item["score"] for item in found), reverse=True)
    lines = look("search", "red leather shoes", "-k", 7, "--output", "jsonl", "--engine", "lance").out.splitlines()
    np_scores = [json.loads(line)["score"] for line in lines]
    assert np_scores == pytest.approx([item["score"] for item in found], abs=1e-5)
    assert [line.split()[1] for line in look("search", "red leather shoes", "-k", 7).out.splitlines()[1:]] == [item["id"] for item in found]
    exact = look("search", "red leather shoes", "-k", 7, "--exact", "--columns", "price", "--output", "json").json
    assert {frozenset(item) for item in exact} == {frozenset({"generation", "id", "score", "price"})}
    assert GONE in look("search", "x", "-k", LIVE, "--generation", FIRST).out
    assert GONE not in look("search", "x", "-k", LIVE).out


@pytest.mark.parametrize("engine", ["faiss", "lance"])
def test_a_filter_on_the_command_line_is_obeyed(look: Command, engine: str) -> None:
    found = look("search", "shoes", "-k", LIVE, "--where", "price < 50 and in_stock", "--engine", engine, "--output", "json").json
    assert found
    assert all(item["price"] < 50 and item["in_stock"] for item in found)
    assert look("search", "shoes", "--where", "brand = 'nobody'", "--engine", engine).out == f"{SECOND}  0 products\n"
    kept = look("search", "shoes", "-k", LIVE, "--where", "size = '42'", "--nulls", "keep", "--engine", engine, "--output", "json").json
    assert {item["size"] for item in kept} == {"42", None}
    alone = look("search", "shoes", "--nulls", "keep", "--engine", engine)
    assert (alone.code, alone.out) == (2, "")


@pytest.mark.parametrize("how", [["--engine", "faiss"], ["--engine", "lance"], ["--exact"]])
def test_few_products_of_a_group_are_shown(look: Command, how: list[str]) -> None:
    found = look("search", "shoes", "-k", LIVE, "--group-by", "brand", "--per-group", 2, "--output", "json", *how).json
    brands = Counter(item["brand"] for item in found if item["brand"] is not None)
    assert set(brands.values()) <= {1, 2}
    assert 2 in brands.values()
    assert len(look("search", "shoes", "-k", 5, "--group-by", "brand", *how).out.splitlines()) == 6
    for wrong in (["--group-by", "colour"], ["--per-group", 0], ["--per-group", 2]):
        refused = look("search", "shoes", *wrong, *how)
        assert (refused.code, refused.out) == (2, "")


@pytest.mark.parametrize(
    "where",
    [
        "",
        "price",
        "price < 'x'",
        "1=1",
        "true or true",
        "'; drop table x; --",
        "id in ()",
        "((((",
        'brand = "x"',
        "\x00",
        "price < 1e999",
        "(" * 5000,
    ],
)
def test_a_filter_that_is_none_is_wrong_usage(look: Command, where: str) -> None:
    found = look("search", "x", "--where", where)
    assert (found.code, found.out) == (2, "")
    assert found.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["publish", "../x"],
        ["publish", "g1"],
        ["publish", "g000001/../g000002"],
        ["publish", "g" + "9" * 400],
        ["validate", "/etc/passwd"],
        ["rollback", "--to", "prod"],
        ["diff", FIRST, "..%2f"],
        ["search", "x", "--generation", "latest"],
        ["export", "out", "--generation", "g٠٠٠٠٠١"],
        ["pin", "*"],
        ["unpin", "../aliases"],
    ],
)
def test_what_is_no_generation_id_is_wrong_usage(look: Command, arguments: list[str]) -> None:
    found = look(*arguments)
    assert (found.code, found.out) == (2, "")
    assert "is no generation id" in found.err


@pytest.mark.parametrize(
    "arguments",
    [["publish", "g000099"], ["validate", "g000099"], ["rollback", "--to", "g000099"], ["diff", FIRST, "g000099"], ["pin", "g000099"],
     ["search", "x", "--generation", "g000099"], ["export", "out", "--generation", "g000099"]],
)  # fmt: skip
def test_an_unknown_generation_is_an_error_that_names_it(look: Command, arguments: list[str]) -> None:
    found = look(*arguments)
    assert (found.code, found.out) == (1, "")
    assert "g000099" in found.err


def test_export_writes_one_clean_snapshot_into_an_empty_folder_only(look: Command, tmp_path: Path) -> None:
    found = look("export", "out", "--output", "json")
    assert (found.code, found.json["rows"]) == (0, LIVE)
    rows = pa.concat_tables([pq.read_table(path) for path in sorted((tmp_path / "out").glob("*.parquet"))])
    assert rows.num_rows == len(set(rows["id"].to_pylist())) == LIVE
    assert {"text_hash", "attr_hash", "locale", "price", "vector"} <= set(rows.schema.names)
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    refused = look("export", "out")
    assert refused.code == 2
    assert "is not empty" in refused.err
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    (tmp_path / "file").touch()
    assert look("export", "file").code == 2


def test_export_and_search_give_the_columns_that_the_index_has(command: Command, config: Path, tmp_path: Path) -> None:
    configure(config, document={"filters": {"brand": "string", "color": "string"}})
    assert command("export", "out").code == 0
    assert "weight_g" in pq.read_schema(tmp_path / "out" / "part-00000.parquet").names
    assert "weight_g" in command("search", "x", "--output", "json").json[0]


def test_validate_measures_again_and_names_what_is_damaged(command: Command, config: Path) -> None:
    good = command("validate", "--output", "json")
    assert good.code == 0, good.out
    assert good.json["generation"] == SECOND
    part = read_manifest(store_of(config), FIRST).parts[0].key
    path = config.parent / "index" / part
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    bad = command("validate", FIRST)
    assert bad.code == 10
    assert part in bad.out
    assert "checksums" in bad.out
    path.unlink()
    assert part in command("validate").out


def test_a_damaged_manifest_is_listed_as_damaged_and_hides_nothing(command: Command, config: Path) -> None:
    manifest = config.parent / "index" / "generations" / FIRST / "manifest.json"
    manifest.write_text(manifest.read_text()[:100])
    lines = command("generations").out.splitlines()
    assert [line.split()[0] for line in lines] == [FIRST, SECOND]
    assert "damaged" in lines[0]
    assert command("validate", FIRST).code == 1
    assert command("search", "x").code == 0


# Nothing there.


def test_commands_on_a_project_that_never_ran_say_what_to_do(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = make_shop(tmp_path / "shop", products=50)
    command = commands(capfd, config)
    for arguments in (["status"], ["runs"], ["generations"], ["search", "x"], ["explain", "x"], ["validate"], ["rollback"], ["gc"],
                      ["publish", FIRST], ["pin", FIRST], ["unpin", FIRST], ["diff", FIRST, SECOND], ["export", tmp_path / "out"]):  # fmt: skip
        found = command(*arguments)
        assert (found.code, found.out) == (1, ""), arguments
        assert "catalog-embed run" in found.err
    for reason in ("missing", "failed", "all"):
        assert command("backfill", "--reason", reason).code == 2
    assert not (tmp_path / "shop" / "index" / "generations").exists()
    assert not (tmp_path / "out").exists()


def test_candidates_are_published_in_their_order(command: Command, config: Path) -> None:
    shutil.rmtree(config.parent / "index" / "aliases")
    assert "nothing is published yet" in command("status").out
    assert command("status", "--max-lag", "9w").code == 1
    assert [line.split()[-1] for line in command("generations").out.splitlines()] == ["candidate", "candidate"]
    assert command("search", "x").code == command("rollback").code == command("validate").code == 1
    stale = command("publish", SECOND)
    assert stale.code == 1
    assert f"was built on {FIRST}" in stale.err
    assert command("publish", FIRST).out == f"{FIRST} is live as entry 1\n"
    assert command("publish", SECOND, "--output", "json").json["seq"] == 2
    assert command("search", "x").code == 0


# Moving the alias.


def test_rollback_goes_back_once_and_no_further_than_there_is(command: Command, config: Path) -> None:
    assert command("rollback", "--reason", "bad titles").out == f"{FIRST} is live as entry 3\n"
    assert f"{FIRST}  1 product\n" in command("search", "x", "-k", 1).out
    again = command("rollback")
    assert again.code == 1
    assert "no generation was live before" in again.err
    assert live(config) == FIRST
    returned = command("publish", SECOND)
    assert returned.out == f"{SECOND} is live as entry 4\n"
    assert [entry.reason for entry in history(store_of(config), "prod")] == ["", "", "bad titles", ""]


def test_publishing_what_is_live_changes_nothing(command: Command, config: Path) -> None:
    assert command("publish", SECOND).out == f"{SECOND} is live as entry 2\n"
    assert len(history(store_of(config), "prod")) == 2


def test_a_run_on_a_held_alias_builds_says_so_and_publishes_nothing(command: Command, config: Path) -> None:
    assert command("rollback", "--hold", "--reason", "wrong prices").out == f"{FIRST} is live as entry 3, held\n"
    assert f"{FIRST}  entry 3  HELD: wrong prices" in command("status").out
    found = command("run", "--now", closing(1).isoformat())
    assert found.code == 0, found.err
    assert f"HELD      prod is held on {FIRST} (wrong prices)" in found.out
    assert f"`catalog-embed publish {THIRD} --release-hold`" in found.out
    assert live(config) == FIRST
    assert "built, held" in command("runs").out
    assert [line.split("  ")[-1] for line in command("generations").out.splitlines()] == ["live, held", "published before", "candidate"]
    refused = command("publish", THIRD)
    assert refused.code == 2
    assert "is held on" in refused.err
    assert command("publish", THIRD, "--release-hold").out == f"{THIRD} is live as entry 4\n"
    assert command("diff", SECOND, THIRD, "--output", "json").json["actions"] == {"add": 0, "text": 0, "attr": 0, "delete": 0}
    assert "HELD" not in command("status").out


def test_a_hold_ends_without_moving_the_alias(command: Command, config: Path) -> None:
    command("rollback", "--hold")
    assert command("publish", FIRST).out == f"{FIRST} is live as entry 3, held\n"
    assert command("publish", FIRST, "--release-hold").out == f"{FIRST} is live as entry 4\n"
    assert not history(store_of(config), "prod")[-1].hold


def test_a_night_after_a_rollback_pays_for_no_text_again(command: Command, config: Path) -> None:
    command("rollback")
    found = command("run", "--now", closing(1).isoformat(), "--output", "json")
    assert (found.code, found.json["outcome"], found.json["actual"]["texts"]) == (0, "published", 0)
    assert command("diff", SECOND, THIRD, "--output", "json").json["actions"] == {"add": 0, "text": 0, "attr": 0, "delete": 0}
    returned = command("publish", SECOND)
    assert returned.code == 1
    assert f"`catalog-embed rollback --to {SECOND}`" in returned.err
    assert command("rollback", "--to", SECOND).code == 0
    assert command("validate", THIRD).code == 0


def test_a_night_without_changes_is_in_step(command: Command) -> None:
    assert command("run", "--now", closing(3).isoformat()).code == 0
    data = command("status", "--output", "json").json
    now = datetime.now(tz=UTC)
    assert data["lag_s"] == pytest.approx((now - closing(3)).total_seconds(), abs=60)
    assert datetime.fromisoformat(data["watermark"]) == closing(1)
    # A part of the catalog proves nothing about the rest of it.
    assert command("backfill", "--reason", "missing", "--now", closing(9).isoformat()).code == 0
    assert command("run", "--since", closing(7).isoformat(), "--now", closing(8).isoformat()).code == 0
    assert command("status", "--output", "json").json["lag_s"] == pytest.approx(data["lag_s"], abs=60)


# Cleaning up.


def test_gc_shows_first_then_removes_and_what_is_needed_still_works(
    command: Command, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command("rollback")
    assert command("run", "--now", closing(1).isoformat()).code == 0
    assert live(config) == THIRD
    later = datetime.now(tz=UTC) + timedelta(days=30)
    monkeypatch.setattr(releasing, "_now", lambda: later)
    before = {info.key for info in store_of(config).list()}
    shown = command("gc", "--keep", 2, "--output", "json")
    assert (shown.code, shown.json["drop"], shown.json["applied"]) == (0, [SECOND], False)
    assert f"remove  {SECOND}" in command("gc", "--keep", 2, "--dry-run").out
    assert {info.key for info in store_of(config).list()} == before
    command("pin", SECOND, "--reason", "for the audit")
    assert "pinned by" in command("generations").out
    assert command("gc", "--keep", 2, "--output", "json").json["drop"] == []
    assert command("unpin", SECOND).out == f"{SECOND} is pinned no longer\n"
    assert command("unpin", SECOND).out == f"{SECOND} was not pinned\n"
    done = command("gc", "--keep", 2, "--apply")
    assert (done.code, "removed 1 generations" in done.out) == (0, True)
    after = {info.key for info in store_of(config).list()}
    assert {key.rpartition("/")[2] for key in after - before} == {"removed.json"}
    assert f"generations/{SECOND}/manifest.json" in before - after
    for engine in ("faiss", "lance"):
        assert command("search", "red shoes", "--engine", engine).code == 0
    assert command("validate").code == 0
    assert command("rollback").out.startswith(FIRST)
    assert command("search", "red shoes").out.startswith(FIRST)
    assert command("validate").code == 0
    assert command("gc", "--apply", "--dry-run").code == 2
    assert command("gc", "--keep", 0).code == 2


def test_tags_that_dead_runs_left_on_a_table_are_found_once_they_are_old(config: Path) -> None:
    pin = read_manifest(store_of(config), SECOND).table
    assert pin is not None
    uri = store_of(config).uri(pin.uri)
    lance.move_tag(uri, tag=THIRD, version=pin.version, options={})
    stray = partial(lance.stray_tags, uri, keep={FIRST, SECOND}, options={})
    assert stray(older_than=timedelta(hours=1)) == ()
    assert stray(older_than=timedelta(0)) == (THIRD,)


class Person(io.StringIO):
    """A terminal with somebody at it."""

    def isatty(self) -> bool:
        return True


def test_a_person_is_asked_before_something_goes_and_a_scheduler_is_not(
    command: Command, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {"n\n": 1, "y\n": 0}
    for answer, code in answers.items():
        monkeypatch.setattr("sys.stdin", Person(answer))
        found = command("gc", "--apply")
        assert (found.code, "Remove this?" in found.err) == (code, True)
    monkeypatch.setattr("sys.stdin", Person("n\n"))
    assert command("gc", "--apply", "--yes").code == 0
    assert command("run", "--break-lease").code == 1


def test_a_lease_of_another_machine_stops_a_run_and_can_be_broken(command: Command, config: Path) -> None:
    store, name = store_of(config), lease_name(fingerprint_of(load(config)))
    lease = acquire(store, name, run_id="elsewhere", ttl=timedelta(minutes=10), clock=lambda: datetime.now(tz=UTC))
    assert isinstance(lease.entry, LeaseEntry)
    foreign = replace(lease.entry, host="other", machine="f" * 32)
    store.put(f"leases/{name}/{lease.entry.seq:08d}.json", foreign.to_json())
    stopped = command("run")
    assert stopped.code == 11
    assert "run elsewhere (other:" in stopped.err
    assert "--break-lease" in stopped.err
    assert "elsewhere" in command("status").out
    freed = command("run", "--break-lease")
    assert freed.code == 0, freed.err
    assert "ended the lease of run elsewhere (other:" in freed.err
    assert "no run held the lease" in command("run", "--break-lease").err
    assert socket.gethostname() not in command("status").out


# Plans that are kept.


def test_apply_publishes_exactly_the_plan_that_was_saved(command: Command, config: Path) -> None:
    command("rollback")
    saved = command("plan", "--out", "saved", "--now", closing(1).isoformat(), "--output", "json")
    assert saved.code == 0, saved.err
    found = command("apply", "saved", "--output", "json")
    assert found.code == 0, found.err
    assert (found.json["command"], found.json["outcome"], found.json["generation"]) == ("apply", "published", THIRD)
    assert found.json["planned"] == {
        "add": 1,
        "text": 1,
        "attr": 5,
        "delete": 1,
        "texts": 2,
        "reused": 0,
        "tokens": saved.json["embedding"]["tokens"],
    }
    manifest = read_manifest(store_of(config), THIRD)
    assert manifest.window.until == closing(1)
    assert command("diff", SECOND, THIRD, "--output", "json").json["actions"] == {"add": 0, "text": 0, "attr": 0, "delete": 0}
    again = command("apply", "saved")
    assert again.code == 1
    assert f"the published generation ({FIRST} -> {THIRD})" in again.err


def test_apply_refuses_what_no_longer_fits(command: Command, config: Path) -> None:
    command("rollback")
    assert command("plan", "--out", "saved", "--now", closing(1).isoformat()).code == 0
    path = config.parent / "catalog" / "part-00000.parquet"
    whole = path.read_bytes()
    write_catalog(config, read_catalog(config).slice(1))
    moved = command("apply", "saved")
    assert moved.code == 1
    assert "the catalog changed since the plan was made" in moved.err
    path.write_bytes(whole)
    os.utime(path, ns=(0, 0))
    assert "the catalog changed" in command("apply", "saved").err
    settings = config.read_text()
    configure(config, publish={"alias": "staging"})
    assert "the alias" in command("apply", "saved").err
    config.write_text(settings)
    configure(config, document={"template": "{{ title }}"})
    assert "the template" in command("apply", "saved").err
    config.write_text(settings)
    assert live(config) == FIRST


Damage = Callable[[Path], Any]
DAMAGES: dict[str, tuple[Damage, str]] = {
    "a file is missing": (lambda saved: (saved / "quarantine.parquet").unlink(), "quarantine.parquet is missing"),
    "changes are cut": (
        lambda saved: (saved / "changes.parquet").write_bytes((saved / "changes.parquet").read_bytes()[:-7]),
        "changed since",
    ),
    "changes are another's": (lambda saved: shutil.copyfile(saved / "quarantine.parquet", saved / "changes.parquet"), "changed since"),
    "no JSON": (lambda saved: (saved / "plan.json").write_text("{"), "not readable as JSON"),
    "deep JSON": (lambda saved: (saved / "plan.json").write_text("[" * 100_000), "not readable as JSON"),
    "another thing": (lambda saved: (saved / "plan.json").write_text("[]"), "not a plan of this version"),
    "not UTF-8": (lambda saved: (saved / "plan.json").write_bytes(b"\xff\xfe"), "not readable as JSON"),
    "a list of no files": (
        lambda saved: (saved / "plan.json").write_text(json.dumps(json.loads((saved / "plan.json").read_text()) | {"files": []})),
        "changed since",
    ),
}


def test_apply_refuses_a_damaged_or_foreign_folder(command: Command, config: Path, tmp_path: Path) -> None:
    command("rollback")
    assert command("plan", "--out", "saved", "--now", closing(1).isoformat()).code == 0
    for name, (damage, message) in DAMAGES.items():
        folder = tmp_path / name
        shutil.copytree(tmp_path / "saved", folder)
        damage(folder)
        found = command("apply", folder)
        assert found.code in (1, 2), name
        assert message in found.err, name
    (tmp_path / "empty").mkdir()
    assert command("apply", "empty").code == 2
    assert command("apply", "nowhere").code == 2
    assert live(config) == FIRST


# The command line itself.


def test_options_come_from_the_environment_for_every_command(look: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CATALOG_EMBED_STATUS_OUTPUT", "json")
    monkeypatch.setenv("CATALOG_EMBED_SEARCH_TOP", "3")
    assert look("status").json["generation"] == SECOND
    assert look("search", "x").out.startswith(f"{SECOND}  3 products")
    monkeypatch.setenv("CATALOG_EMBED_SEARCH_TOP", "0")
    assert look("search", "x").code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--break-lease", "status"], "`--break-lease` is an option of `run` and stands before the subcommand `status`"),
        (["--dry-run", "gc"], "`--dry-run` is an option of `run`"),
        (["--keep", "3"], "`catalog-embed gc --keep ...`"),
        (["search"], "Missing argument"),
        (["search", ""], "the query is empty"),
        (["search", "x", "-k", "0"], "Invalid value"),
        (["backfill"], "needs to know of what"),
        (["backfill", "--where", "price < 3", "--ids", "a"], "say two things"),
        (["backfill", "--reason", "all", "--tower", "."], "give --tower alone"),
        (["backfill", "--ids", " , "], "names no product"),
        (["backfill", "--ids", "@nowhere"], "cannot read the file"),
        (["backfill", "--from", "someday"], "--since `someday` is not understood"),
        (["backfill", "--to", "someday"], "--to `someday` is not understood"),
        (["backfill", "--to", "beginning"], "is no moment"),
        (["backfill", "--from", "2026-01-05", "--to", "2026-01-04"], "the window is empty"),
        (["backfill", "--where", "colour = 'red'"], "unknown column"),
        (["backfill", "--tower", "."], "modules.json"),
    ],
)
def test_wrong_usage_exits_2_with_advice(look: Command, arguments: list[str], message: str) -> None:
    found = look(*arguments)
    assert (found.code, found.out) == (2, ""), found.err
    assert message in found.err


def test_a_shell_completes_commands_and_options(look: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def completed(words: str) -> list[str]:
        monkeypatch.setenv("_CATALOG_EMBED_COMPLETE", "bash_complete")
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(len(words.split(" ")) - 1))
        found = look()
        monkeypatch.delenv("_CATALOG_EMBED_COMPLETE")
        assert found.code == 0
        return [line.split(",")[1] for line in found.out.splitlines()]

    assert {"search", "status"} <= set(completed("catalog-embed s"))
    assert {"--config", "--since"} <= set(completed("catalog-embed --"))
    assert "--engine" in completed("catalog-embed search --e")
    assert completed("catalog-embed backfill --reason f") == ["failed"]
    assert "_CATALOG_EMBED_COMPLETE" in (cli.help or "")
