"""The commands that learn, on a small real shop: from graded judgments to a tower that readers serve, and back again."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml

from encoder.registry import RECORD, read_card
from jobs.inspect import reader
from jobs.material import judgments_of, products_of
from jobs.nightly import fingerprint_of
from jobs.settings import load
from jobs.train import Lesson, train_tower
from pipelines.hashes import text_hashes
from pipelines.publish import current
from pipelines.schema import ID, TEXT_HASH
from pipelines.stores import lance
from tests.jobs.commands import HOSTILE, LIVE, SECOND, THIRD, Command, commands, store_of
from tests.shops import configure

pytestmark = pytest.mark.usefixtures("one_thread", "ray_cluster")

STEPS = 4
# So fast that a few steps move a tiny tower visibly.
STAGE = {
    "name": "pairs",
    "objective": {"parts": {"infonce": 1.0}, "tau": 0.05},
    "batch": {"queries": 16},
    "train": {"steps": STEPS, "lr": 0.003, "save_every": 2, "log_every": 1},
}
QUICK = ("--pool", 20, "--device", "cpu")


def copied(two_nights: Path, folder: Path) -> Path:
    """Return the configuration of a shop of one's own, with a quick recipe beside it."""
    shutil.copytree(two_nights.parent, folder)
    (folder / "quick.yaml").write_text(yaml.safe_dump({"seed": 1, "stages": [STAGE]}))
    return folder / "catalog-embed.yaml"


@pytest.fixture
def config(two_nights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return copied(two_nights, tmp_path / "own")


@pytest.fixture
def command(config: Path, capfd: pytest.CaptureFixture[str]) -> Command:
    return commands(capfd, config)


@pytest.fixture(scope="module")
def taught(two_nights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shop with a trained tower, `own/first`, for tests that only look."""
    config = copied(two_nights, tmp_path_factory.mktemp("taught") / "own")
    lesson = Lesson(recipe=str(config.parent / "quick.yaml"), target=config.parent / "first", pool=20, device="cpu")
    train_tower(load(config), lesson)
    return config


@pytest.fixture
def ask(taught: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.chdir(tmp_path)
    return commands(capfd, taught)


def record_of(tower: Path) -> Any:
    return json.loads((tower / RECORD).read_text())


def written(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(folder.rglob("*")) if path.is_file()}


def judged_of(config: Path) -> pa.Table:
    return pq.read_table(config.parent / "judgments.parquet")


def put(config: Path, **columns: Any) -> None:
    """Change columns of the judgments."""
    table = judged_of(config)
    for name, values in columns.items():
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(values))
    pq.write_table(table, config.parent / "judgments.parquet")


# Training.


def test_training_reads_the_very_texts_that_the_published_table_was_embedded_from(taught: Path) -> None:
    settings = load(taught)
    products = products_of(settings)
    with reader(settings) as followed:
        pin = followed.opened.manifest.table
        assert pin is not None
        rows = lance.take(
            store_of(taught).uri(pin.uri),
            version=pin.version,
            by=ID,
            values=products["product_id"].combine_chunks(),
            columns=[ID, TEXT_HASH],
            options={},
        )
    assert products.num_rows == rows.num_rows == LIVE
    read = dict(zip(products["product_id"].to_pylist(), text_hashes(products["text"].combine_chunks()).to_pylist(), strict=True))
    assert read == dict(zip(rows[ID].to_pylist(), rows[TEXT_HASH].to_pylist(), strict=True))


def test_a_record_says_where_a_tower_comes_from_and_what_it_is_worth(taught: Path) -> None:
    settings, tower = load(taught), taught.parent / "first"
    record = record_of(tower)
    assert record["fingerprint"] == fingerprint_of(settings, tower) != fingerprint_of(settings)
    assert record["base"] == read_card(taught.parent / "tower").fingerprint
    assert (record["recipe"]["name"], record["recipe"]["seed"], record["stages"][0]["steps"]) == ("quick", 1, STEPS)
    (project,) = record["data"]["projects"]
    assert (project["products"], project["judgments"]) == (LIVE, judged_of(taught).num_rows)
    assert project["licence"] == "made up with the sample catalog"
    assert project["template_digest"] == settings.template.digest
    assert all(len(project[name]) == 64 for name in ("texts_sha256", "judgments_sha256"))
    assert sum(record["data"]["split"][side]["judgments"] for side in ("train", "dev", "test")) == judged_of(taught).num_rows
    assert record["data"]["split"]["by"] == {"dev": 0.1, "test": 0.1, "seed": 1}
    cells = [cell for cell in record["test"]["cells"] if (cell["system"], cell["stratum"]) == ("pairs", "")]
    assert {"ndcg@10", "recall_E@10", "auc_E+S|C+I"} <= {cell["metric"] for cell in cells}
    assert all(cell["estimate"]["low"] <= cell["estimate"]["mean"] <= cell["estimate"]["high"] for cell in cells)
    assert sorted(record["test"]["systems"]) == ["base", "base+bm25", "bm25", "pairs", "pairs+bm25"]
    for name in ("dev/eval.txt", "test/per_query.parquet", "pairs-metrics.jsonl", "pairs-curves.svg"):
        assert (tower / name).is_file()


def test_a_second_training_to_the_same_folder_is_refused_and_nothing_is_lost(ask: Command, taught: Path) -> None:
    before = written(taught.parent)
    again = ask("train", taught.parent / "quick.yaml", "--out", taught.parent / "first", *QUICK)
    assert again.code == 2
    assert "is there already, and a tower never changes" in again.err
    assert written(taught.parent) == before


def test_a_training_that_was_stopped_goes_on_to_the_same_fingerprint(config: Path, taught: Path) -> None:
    def stop(_: str, line: Any) -> None:
        if line["step"] == 3:
            raise KeyboardInterrupt

    lesson = Lesson(recipe=str(config.parent / "quick.yaml"), target=config.parent / "first", pool=20, device="cpu")
    with pytest.raises(KeyboardInterrupt):
        train_tower(load(config), lesson, tell=stop)
    assert not lesson.target.exists()
    steps: list[int] = []
    found = train_tower(load(config), lesson, tell=lambda _, line: steps.append(line["step"]))
    assert steps == [4]
    assert found.card.fingerprint == record_of(taught.parent / "first")["fingerprint"]
    anew = train_tower(load(config), replace(lesson, target=config.parent / "second", seed=2))
    assert anew.card.fingerprint != found.card.fingerprint


def test_a_base_that_was_trained_here_keeps_its_unseen_queries_unseen(config: Path, taught: Path) -> None:
    first = taught.parent / "first"
    lesson = Lesson(
        recipe=str(config.parent / "quick.yaml"), target=config.parent / "next", base=first, seed=9, steps=1, pool=0, device="cpu"
    )
    found = train_tower(load(config), lesson)
    assert found.record["data"]["split"] == record_of(first)["data"]["split"]
    assert (found.record["recipe"]["seed"], found.record["base"]) == (9, read_card(first).fingerprint)


def test_more_projects_add_their_products_and_mined_documents_still_find_theirs(command: Command, config: Path) -> None:
    assert command("mine", "--out", "mined", "--top", 10).code == 0
    shutil.copytree(config.parent, config.parent.with_name("other"))
    other = config.parent.with_name("other") / "catalog-embed.yaml"
    circle = STAGE | {"name": "hard", "batch": {"queries": 8, "documents": 4, "mined": True}, "train": {"steps": 1, "lr": 0.001}}
    Path("hard.yaml").write_text(yaml.safe_dump({"stages": [circle]}))
    found = command("train", "hard.yaml", "--out", "t", "--data", other, "--mined", "mined/mined.parquet", *QUICK, "--output", "json")
    assert found.code == 0, found.err
    assert [item["products"] for item in found.json["data"]["projects"]] == [LIVE, LIVE]
    (stage,) = found.json["stages"]
    assert stage["mined"] > 0
    assert stage["missing"]["products"] == 0, "the ids of mined documents are those of the first project"
    configure(other, judgments={"grades": ["bad", "good"], "positive": "good"})
    refused = command("train", "hard.yaml", "--out", "u", "--data", other, "--mined", "mined/mined.parquet", *QUICK)
    assert (refused.code, "one scale is learned at a time" in refused.err) == (2, True)


def test_other_judgments_in_one_work_folder_are_mined_anew(config: Path) -> None:
    hard = STAGE | {"name": "hard", "batch": {"queries": 8, "documents": 4, "mined": True}, "train": {"steps": 2, "lr": 0.003}}
    (config.parent / "hard.yaml").write_text(yaml.safe_dump({"stages": [hard]}))

    def trained(name: str, work: str) -> str:
        lesson = Lesson(
            recipe=str(config.parent / "hard.yaml"), target=config.parent / name, work=config.parent / work, pool=0, device="cpu"
        )
        return train_tower(load(config), lesson).card.fingerprint

    first = trained("first", "work")
    # What is no longer judged is now mined.
    fewer = judged_of(config)
    pq.write_table(fewer.filter(pc.not_equal(fewer["grade"], "I")), config.parent / "judgments.parquet")
    second = trained("second", "work")
    assert second != first
    assert second == trained("third", "elsewhere"), "what was mined by the grades of before is not taken for today's"


# From the tower to the readers, and back.


def test_a_trained_tower_is_compared_published_served_and_taken_back(command: Command, config: Path) -> None:
    trained = command("train", "own/quick.yaml", "--out", "new", *QUICK, "--output", "json")
    assert trained.code == 0, trained.err
    compared = command("eval", "own/tower", "new", "--resamples", 200, "--device", "cpu", "--out", "board", "--output", "json")
    assert compared.code == 0, compared.err
    board = compared.json["board"]
    assert (board["baseline"], sorted(board["systems"])) == ("tower", ["bm25", "new", "new+bm25", "tower", "tower+bm25"])
    cells = [cell for cell in board["cells"] if (cell["system"], cell["stratum"]) == ("new", "")]
    assert all(
        0 <= cell["p_holm"] <= 1 and cell["difference"]["low"] <= cell["difference"]["high"]
        for cell in cells
        if cell["difference"]["count"]
    )
    assert json.loads(Path("board/eval.json").read_text()) == board
    test = command("eval", "own/tower", "new", "--side", "test", "--pool", 20, "--resamples", 50, "--output", "json").json
    assert test["board"]["queries"] == record_of(Path("new"))["data"]["split"]["test"]["queries"]
    assert set(compared.json["calibration_error"]) <= {"bm25", "tower", "new"}
    assert all(0 <= row["relevant"] <= 1 for row in compared.json["calibration_error"].values())

    old = fingerprint_of(load(config))
    built = command("backfill", "--tower", "new", "--output", "json")
    assert built.code == 0, built.err
    assert built.json["generation"] == THIRD
    if (entry := current(store_of(config), "prod")) is None or entry.generation != THIRD:
        assert command("publish", THIRD).code == 0
    with reader(load(config)) as served:
        assert (served.generation, served.opened.manifest.tower) == (THIRD, trained.json["fingerprint"])
        assert served.search("red lamp", 5).num_rows == 5
    listed = {item["fingerprint"]: item for item in command("towers", "--output", "json").json}
    assert (listed[trained.json["fingerprint"]]["live"], listed[old]["live"]) == (True, False)
    assert listed[trained.json["fingerprint"]]["trained"]["recipe"] == "quick", "the record went to the store with the tower"
    few = ("--min-pairs", 10, "--min-outcomes", 1, "--output", "json")
    sides = record_of(Path("new"))["data"]["split"]
    unseen = command("calibrate", *few).json["calibration"]["strata"][0]
    assert unseen["queries"] == sides["dev"]["queries"] + sides["test"]["queries"], "it knows the answers to the others"
    everything = command("calibrate", *few, "--all-queries").json["calibration"]["strata"][0]
    assert everything["queries"] == unseen["queries"] + sides["train"]["queries"]
    assert command("rollback").code == 0
    with reader(load(config)) as served:
        assert (served.generation, served.opened.manifest.tower) == (SECOND, old)


def test_a_side_needs_towers_that_were_split_alike(ask: Command, taught: Path, tmp_path: Path) -> None:
    untrained = ask("eval", taught.parent / "tower", "--side", "test")
    assert (untrained.code, "there is no split to take a side of" in untrained.err) == (2, True)
    shutil.copytree(taught.parent / "first", tmp_path / "second")
    record = record_of(tmp_path / "second")
    record["data"]["split"]["by"]["seed"] = 7
    (tmp_path / "second" / RECORD).write_text(json.dumps(record))
    differing = ask("eval", taught.parent / "first", tmp_path / "second", "--side", "dev")
    assert (differing.code, "no side is unseen by all" in differing.err) == (2, True)
    shutil.copytree(taught.parent / "first", tmp_path / "bm25")
    named = ask("eval", tmp_path / "bm25", "--pool", 0, "--resamples", 10, "--output", "json").json["board"]
    assert len(named["systems"]) == 3, "a tower in a folder called bm25 stands beside the words, not in their place"


@pytest.mark.parametrize("said", ["nope", "[1]", '{"recipe": 3}', '{"recipe": {"name": "x"}, "data": {}}'])
def test_a_record_that_cannot_be_understood_is_told_in_words(ask: Command, taught: Path, tmp_path: Path, said: str) -> None:
    shutil.copytree(taught.parent / "first", tmp_path / "odd")
    (tmp_path / "odd" / RECORD).write_text(said)
    for arguments in (["towers", "odd"], ["eval", "odd", "--side", "test"]):
        found = ask(*arguments)
        assert found.code in {1, 2}
        assert f"odd/{RECORD} is not" in found.err
        assert "not foreseen" not in found.err


# Mining and judging.


def test_mining_for_another_tower_is_refused_before_anything_is_read(ask: Command, taught: Path) -> None:
    refused = ask("mine", "--out", "mined", "--tower", taught.parent / "first", "--judgments", "nowhere.parquet")
    assert refused.code == 2
    assert f"The index was made by the tower {fingerprint_of(load(taught))[:12]}" in refused.err
    assert "nowhere" not in refused.err


def test_what_is_mined_and_judged_is_what_the_next_stage_learns_from(command: Command) -> None:
    mined = command("mine", "--out", "mined", "--top", 20, "--output", "json").json
    assert mined["counts"]["candidates"] == 20 * mined["counts"]["queries"]
    assert (mined["counts"]["unknown"] > 0, mined["counts"]["hard_negative"] > 0) == (True, True)
    judge = command("train-judge", "--out", "judge", "--steps", 2, "--device", "cpu", "--output", "json")
    assert (judge.code, judge.json["steps"]) == (0, 2)
    assert command("train-judge", "--out", "judge", "--steps", 2).code in {1, 2}, "a judge never changes"
    asked = ("judge", "mined/unknown.parquet", "--judge", "judge", "--deepest", 2, "--device", "cpu", "--cache", "said.sqlite")
    first = command(*asked, "--out", "judged.parquet", "--output", "json")
    assert first.code == 0, first.err
    assert command(*asked, "--out", "again.parquet").code == 0
    assert pq.read_table("again.parquet").equals(pq.read_table("judged.parquet"))
    again = command("mine", "--out", "mined-2", "--top", 20, "--judged", "judged.parquet", "--output", "json").json
    settled = {name: again["counts"][name] - mined["counts"][name] for name in again["counts"]}
    assert settled != dict.fromkeys(settled, 0), "verdicts decided nothing"
    learned = command(
        "train", "refine", "--stage", "circle", "--steps", 2, "--mined", "mined-2/mined.parquet", "--out", "t", *QUICK, "--output", "json"
    )
    assert learned.code == 0, learned.err
    (stage,) = learned.json["stages"]
    assert (stage["stage"], stage["mined"] > 0, len(stage["targets"])) == ("circle", True, 4)
    agreed = command("judge", "--agreement", "--judge", "judge", "--most", 50, "--device", "cpu", "--output", "json")
    assert (agreed.code, agreed.json["pairs"]) == (0, 50)


def test_a_judged_product_that_left_the_catalog_makes_no_second_query_of_its_query(command: Command, config: Path) -> None:
    before = command("mine", "--out", "before", "--top", 5, "--output", "json").json["counts"]
    put(config, sku=[f"gone-{row}" if row % 7 == 0 else sku for row, sku in enumerate(judged_of(config)["sku"].to_pylist())])
    after = command("mine", "--out", "after", "--top", 5, "--output", "json").json["counts"]
    assert after["queries"] == before["queries"]
    assert set(pq.read_table("after/candidates.parquet")["locale"].to_pylist()) == {"de", "en", "fr"}
    measured = command("eval", "--pool", 0, "--resamples", 10, "--output", "json").json
    assert measured["missing"] == len(range(0, judged_of(config).num_rows, 7))


# Audits, calibration, written queries, the list of towers.


def test_an_audit_finds_what_shoppers_contradict_and_its_export_is_safe_for_spreadsheets(command: Command, config: Path) -> None:
    rows = judged_of(config).to_pylist()
    first = rows[0]["query_id"]
    of_first = [row for row in rows if row["query_id"] == first]
    hated, loved = of_first[0], next(row for row in of_first if row["grade"] == "I")
    queries = pq.read_table(config.parent / "queries.parquet")
    texts = [
        '=HYPERLINK("http://x")' if name == first else text
        for name, text in zip(queries["query_id"].to_pylist(), queries["query"].to_pylist(), strict=True)
    ]
    pq.write_table(queries.set_column(1, "query", pa.array(texts)), config.parent / "queries.parquet")
    lines = [(row["query_id"], row["sku"], 1000, 900 if row is loved else 0 if row is hated else 100, 0) for row in of_first]
    with Path("engagement.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("query_id", "product_id", "impressions", "clicks", "purchases"), *lines])
    found = command("audit", "engagement.csv", "--out", "odd.csv", "--output", "json")
    assert found.code == 0, found.err
    assert found.json["counts"]["labelled"] == len(of_first)
    with Path("odd.csv").open(newline="") as file:
        told = list(csv.DictReader(file))
    assert {row["product_id"] for row in told} >= {loved["sku"]}
    assert all(row["query"].startswith("'=") for row in told)
    pq.write_table(
        pa.Table.from_pylist(
            [dict(zip(("query_id", "product_id", "impressions", "clicks", "purchases"), line, strict=True)) for line in lines]
        ),
        "engagement.parquet",
    )
    assert command("audit", "engagement.parquet", "--out", "odd.jsonl", "--output", "json").json["counts"] == found.json["counts"]


def test_each_calibration_is_a_version_and_the_newest_one_holds_as_it_was_written(command: Command, config: Path) -> None:
    assert command("calibrate", "--show").code == 1
    few = ("--min-pairs", 50, "--min-outcomes", 5, "--output", "json")
    first = command("calibrate", *few).json
    put(config, grade=["I" if grade == "C" else grade for grade in judged_of(config)["grade"].to_pylist()])
    second = command("calibrate", *few).json
    keys = [first["key"], second["key"]]
    assert [Path(key).name[:8] for key in keys] == ["00000001", "00000002"]
    shown = command("calibrate", "--show", "--output", "json").json
    assert (shown["key"], shown["calibration"]) == (second["key"], second["calibration"])
    answers = command("search", "red lamp", "--min-relevance", 0, "--output", "json").json
    assert len(answers) == 10
    limit = max(answer["p_relevant"] for answer in answers)
    kept = command("search", "red lamp", "--min-relevance", limit, "--output", "json").json
    assert [answer["id"] for answer in kept] == [answer["id"] for answer in answers if answer["p_relevant"] >= limit]
    assert second["calibration"] != first["calibration"]
    assert "does not hold" not in command("calibrate", "--show").out, "a file does not know what its generation lacked"
    path = config.parent / "index" / second["key"]
    path.write_bytes(path.read_bytes().replace(b"0.1", b"0.9", 1))
    tampered = command("calibrate", "--show")
    assert (tampered.code, "was changed after it was written" in tampered.err) == (2, True)


def test_queries_are_written_for_a_shop_that_has_none_and_serve_as_judgments(command: Command) -> None:
    found = command("write-queries", "written.parquet", "--products", 60, "--output", "json")
    assert (found.code, found.json["grades"]) == (0, "derived")
    assert pq.read_table("written.parquet").num_rows == found.json["judgments"] > found.json["queries"] > 0
    again = command("write-queries", "again.parquet", "--products", 60)
    assert (again.code, Path("again.parquet").read_bytes()) == (0, Path("written.parquet").read_bytes())
    assert command("write-queries", "other.parquet", "--products", 60, "--seed", 5).code == 0
    assert Path("other.parquet").read_bytes() != Path("written.parquet").read_bytes()
    lacking = command("write-queries", "x.parquet", "--category", "colour")
    assert (lacking.code, "no column `colour`" in lacking.err) == (2, True)


def test_written_queries_measure_a_tower_without_a_mapping_of_columns(command: Command, config: Path) -> None:
    configure(config, judgments={"path": "../written.parquet", "queries": None})
    data = yaml.safe_load(config.read_text())
    del data["judgments"]["columns"]
    config.write_text(yaml.safe_dump(data, sort_keys=False))
    assert command("write-queries", "written.parquet").code == 0
    assert command("eval", "--pool", 0, "--resamples", 10).code == 0


def test_towers_lists_what_is_known_of_each(ask: Command, taught: Path) -> None:
    first = taught.parent / "first"
    listed = {item["fingerprint"]: item for item in ask("towers", first, taught.parent / "tower", "--output", "json").json}
    trained = listed[record_of(first)["fingerprint"]]["trained"]
    assert (trained["recipe"], trained["stage"], trained["licence"]) == ("quick", "pairs", "made up with the sample catalog")
    assert trained["base"] == record_of(first)["base"]
    live = listed[fingerprint_of(load(taught))]
    assert (live["trained"], live["live"], live["generations"]) == (None, True, ["g000001", "g000002"])
    assert "LIVE" in ask("towers").out


# Hostile input.

COMMANDS = (
    ("train", "{own}/quick.yaml", "--out", "t", *QUICK),
    ("eval", "--resamples", 10, "--pool", 0),
    ("mine", "--out", "m", "--top", 5),
    ("train-judge", "--out", "j", "--steps", 1),
    ("calibrate",),
)
FILES = {
    "absent.parquet": None,
    "empty.csv": "",
    "header.csv": "query_id,query,sku,grade\n",
    "columns.csv": "a,b\n1,2\n",
    "grades.csv": "query_id,query,sku,grade\nq,lamp,CE-00000001,\x1b[31mX\n",
    "strangers.csv": "query_id,query,sku,grade\nq,lamp,=cmd()\x1b[2J,E\n",
    "nulls.csv": "query_id,query,sku,grade\nq,,CE-00000001,E\n",
    "odd.json": "{}",
}


def refused(command: Command, *arguments: object, say: str = "") -> None:
    """Expect one line that says what to do, and nothing that steers a terminal."""
    found = command(*arguments)
    assert found.code in {1, 2}, (arguments, found.out)
    assert "not foreseen" not in found.err, found.err
    assert "\x1b" not in found.out + found.err
    (line,) = [line for line in found.err.splitlines() if line.casefold().startswith("error")]
    assert say in line, line
    assert found.err.strip().endswith(line), "something came behind the error"


@pytest.mark.parametrize("name", FILES)
def test_judgments_that_cannot_be_used_are_refused_by_every_command(ask: Command, taught: Path, name: str, tmp_path: Path) -> None:
    text = FILES[name]
    if text is not None:
        Path(name).write_text(text)
    for arguments in COMMANDS:
        refused(ask, *(str(item).format(own=taught.parent) for item in arguments), "--judgments", name, say=name)
    Path("engagement.csv").write_text("query_id,product_id,impressions,clicks,purchases\nq,p,9,1,0\n")
    refused(ask, "audit", "engagement.csv", "--out", "a.csv", "--judgments", name, say=name)
    assert not any((tmp_path / left).exists() for left in ("t", "j", "a.csv"))


@pytest.mark.parametrize(
    ("arguments", "say"),
    [
        (["train", "roaar", "--out", "t"], "Did you mean `roar`?"),
        (["train", "roar", "--out", "t", "--stage", "oods"], "no stage oods"),
        (["train", "roar", "--out", "t", "--steps", 0], "--steps"),
        (["train", "roar", "--out", "t", "--workers", 0], "--workers"),
        (["train", "roar", "--out", "t", "--seed", -1], "--seed"),
        (["train", "roar", "--out", "t", "--base", "nowhere"], "nowhere"),
        (["train", "roar", "--out", "t", "--data", "nowhere.yaml"], "nowhere.yaml"),
        (["train", "roar", "--out", "/proc/nowhere/t"], "/proc/nowhere"),
        (["train", "roar", "--out", "t", "--work", "/proc/nowhere/t"], "/proc/nowhere"),
        (["train", "roar", "--out", "t", "--mined", "{own}/judgments.parquet"], "contrastive, odds"),
        (["train", "refine", "--out", "t", "--mined", "{own}/judgments.parquet"], "lacks"),
        (["train", "refine", "--out", "t", "--judged", "{own}/judgments.parquet"], "lacks"),
        (["train", "refine", "--out", "t", "--mined", "nowhere.parquet"], "nowhere.parquet is no file"),
        (["mine", "--out", "m", "--judged", "{own}/queries.parquet"], "lacks"),
        (["mine", "--out", "/proc/nowhere/m"], "/proc/nowhere"),
        (["eval", "nowhere"], "nowhere"),
        (["eval", "{own}/tower", "{own}/tower"], "Name each once"),
        (["eval", "--out", "/proc/nowhere/e"], "/proc/nowhere"),
        (["judge"], "give PAIRS"),
        (["judge", "--agreement"], "name one judge"),
        (["judge", "{own}/judgments.parquet", "--out", "o", "--judge", "{own}/tower"], "lacks"),
        (["judge", "nowhere.parquet", "--out", "o", "--judge", "{own}/tower"], "nowhere.parquet is no file"),
        (["train-judge", "--out", "{own}/tower"], "exists"),
        (["audit", "nowhere.csv", "--out", "a.csv"], "nowhere.csv is no file"),
        (["audit", "{own}/judgments.parquet", "--out", "a.csv"], "lacks product_id"),
        (["audit", "nowhere.csv", "--out", "a.txt"], "a.txt"),
        (["calibrate", "g999999"], "g999999"),
        (["search", "shoes", "--min-relevance", "nan"], "--min-relevance"),
        (["write-queries", "w.parquet", "--template", "{{brnd}}"], "brnd"),
        (["write-queries", "w.parquet", "--seq2seq", "nowhere"], "nowhere"),
        (["write-queries", "w.parquet", "--prompt", "x"], "--prompt"),
        (["towers", "nowhere"], "nowhere"),
    ],
    ids=lambda value: " ".join(map(str, value))[:60] if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_refused_in_one_line(ask: Command, taught: Path, arguments: list[object], say: str, tmp_path: Path) -> None:
    refused(ask, *(str(item).format(own=taught.parent) for item in arguments), say=say.format(own=taught.parent))
    assert not (tmp_path / "t").exists()


def test_hostile_names_from_catalog_and_configuration_steer_no_terminal(command: Command, config: Path) -> None:
    queries = pq.read_table(config.parent / "queries.parquet")
    locale = {row["product_id"]: row["locale"] for row in products_of(load(config)).to_pylist()}[HOSTILE]
    known = queries.filter(pc.equal(queries["locale"], locale))["query_id"][0].as_py()
    own = pa.table({"query_id": [known], "sku": [HOSTILE], "grade": ["E"]}, schema=judged_of(config).schema)
    pq.write_table(pa.concat_tables([judged_of(config), own]), config.parent / "judgments.parquet")
    configure(config, judgments={"vertical": "brand", "licence": "\x1b[31m=1+1"})
    (config.parent / "quick.yaml").write_text(yaml.safe_dump({"name": "\x1b[2Jquick", "stages": [STAGE]}))
    assert any("owned" in name for name in products_of(load(config))["vertical"].to_pylist()), "no name is hostile"
    for arguments in (
        ("train", "own/quick.yaml", "--out", "t", *QUICK, "--steps", 1),
        ("towers", "t"),
        ("eval", "--pool", 0, "--resamples", 10),
        ("calibrate",),
        ("calibrate", "--show"),
    ):
        found = command(*arguments)
        assert found.code == 0, found.err
        assert "\x1b" not in found.out + found.err, arguments
        assert "\u202e" not in found.out + found.err, arguments


def test_a_query_with_products_of_two_languages_is_refused_before_anything_is_trained(command: Command, config: Path) -> None:
    locales = {row["product_id"]: row["locale"] for row in products_of(load(config)).to_pylist()}
    names = judged_of(config)["sku"].to_pylist()
    other = next(name for name, locale in locales.items() if locale != locales[names[0]])
    put(config, sku=[other, *names[1:]])
    for arguments in COMMANDS:
        refused(command, *(str(item).format(own="own") for item in arguments), say="1 query ids have products of more than one locale")
    assert not Path("t").exists()


def test_judgments_take_the_locales_of_their_products_and_of_their_query(taught: Path) -> None:
    settings = load(taught)
    products = products_of(settings)
    graded = judgments_of(settings, products)
    locales = dict(zip(products["product_id"].to_pylist(), products["locale"].to_pylist(), strict=True))
    assert [locales[name] for name in graded["product_id"].to_pylist()] == graded["locale"].to_pylist()
    assert np.unique(graded["locale"].to_pylist()).tolist() == ["de", "en", "fr"]
    assert pc.count_distinct(graded["query_id"]).as_py() == graded.group_by(["query_id", "locale"]).aggregate([]).num_rows
