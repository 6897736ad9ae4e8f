"""`catalog-embed report` on a real shop: what it compares with, what it prints, and how it answers a mistake."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.publish import read_manifest
from tests.jobs.commands import ESCAPES, FIRST, HOSTILE, LIVE, SECOND, Command, commands, store_of

pytestmark = pytest.mark.usefixtures("ray_cluster")


def test_the_live_generation_is_compared_with_the_one_that_it_grew_from(look: Command, two_nights: Path) -> None:
    found = look("report")
    assert found.code == 0
    assert found.out.startswith(f"Report  {SECOND}  against {FIRST}  {LIVE} products")
    data = look("report", "--output", "json").json
    assert (data["generation"], data["parent"], data["live"], data["compared"]["generation"]) == (SECOND, FIRST, LIVE, FIRST)
    manifest = read_manifest(store_of(two_nights), SECOND)
    assert data["faiss"]["use"]["reason"] == manifest.indexes["faiss"].reason
    assert sum(data["bytes"].values()) == sum(item.size for item in manifest.objects)
    assert sum(segment["live"] for segment in data["faiss"]["segments"]) == LIVE == data["lance"]["rows"]
    assert data["planned"] == {"add": 1, "text": 1, "attr": data["planned"]["attr"], "delete": 1}
    assert (data["asked"], data["questions"], data["questions_total"]) == ("products", 128, LIVE)
    # A table and an index of so few products compare every vector.
    assert {mean["mean"] for mean in data["recall"].values()} == {data["parity"]["overlap"]["mean"]} == {1.0}
    reasons = {**data["compared"]["churn"]["came"], **data["compared"]["churn"]["went"]}
    assert reasons.keys() <= {"new", "text", "risen", "deleted", "outranked", "tied"}


def test_the_first_generation_has_nothing_before_it(look: Command) -> None:
    data = look("report", FIRST, "--output", "json").json
    assert (data["generation"], data["compared"]) == (FIRST, None)
    assert "no generation came before" in data["notes"][0]
    forward = look("report", FIRST, "--against", SECOND, "--output", "json").json
    assert forward["compared"]["generation"] == SECOND
    assert forward["compared"]["churn"]["overlap"]["queries"] == 128


def test_queries_of_a_file_are_asked_by_their_words(look: Command, tmp_path: Path) -> None:
    texts = ["waterproof jacket", "wooden table", ESCAPES.replace("\n", " ")]
    (tmp_path / "q.txt").write_text("\n".join([*texts, texts[0]]), encoding="utf-8")
    pq.write_table(pa.table({"query": texts}), tmp_path / "q.parquet")
    found = [look("report", "--queries", name, "--samples", 300, "--output", "json").json for name in ("q.txt", "q.parquet")]
    assert found[0] == found[1]
    assert (found[0]["asked"], found[0]["questions"], found[0]["border_recall"]) == ("texts", 3, {})


def test_hostile_products_stay_words_in_text_and_page(look: Command, tmp_path: Path) -> None:
    said = look("report", "--top", 1000, "--samples", 10_000, "--html", "report.html")
    assert said.code == 0
    shown = (tmp_path / "report.html").read_text(encoding="utf-8")
    for text in (said.out, shown):
        assert all(char.isprintable() or char == "\n" for char in text)
    assert "<script" not in shown
    assert shown.startswith("<!doctype html>")
    labels = look("report", "--top", 1000, "--samples", 10_000, "--output", "json").json["labels"]
    assert HOSTILE not in labels or "\x1b" in labels[HOSTILE]


def test_a_mistake_is_answered_with_what_to_do(look: Command, two_nights: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n", encoding="utf-8")
    for arguments, code, said in (
        (["g000099"], 1, "g000099 has no manifest"),
        (["--against", "g000099"], 1, "g000099 has no manifest"),
        (["--against", SECOND], 2, "cannot be compared with itself"),
        (["latest"], 2, "is no generation id"),
        (["--queries", "none.txt"], 2, "none.txt cannot be read"),
        (["--queries", "empty.txt"], 2, "holds no query"),
        (["--html", "no/such/folder.html"], 2, "cannot be written"),
    ):
        found = look("report", *arguments)
        assert (found.code, said in found.err, found.out) == (code, True, ""), (arguments, found)


def test_after_a_rollback_the_live_one_is_compared_with_what_was_left(
    two_nights: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(two_nights.parent, tmp_path / "own")
    command = commands(capfd, tmp_path / "own" / two_nights.name)
    assert command("rollback", "--reason", "bad prices").code == 0
    data = command("report", "--output", "json").json
    assert (data["generation"], data["compared"]["generation"]) == (FIRST, SECOND)


def test_before_anything_is_published_it_says_what_to_do(two_nights: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(two_nights.parent, tmp_path / "own", ignore=shutil.ignore_patterns("aliases"))
    found = commands(capfd, tmp_path / "own" / two_nights.name)("report")
    assert found.code == 1
    assert "names nothing yet. Run `catalog-embed run` first." in found.err
    shutil.rmtree(tmp_path / "own" / "index")
    found = commands(capfd, tmp_path / "own" / two_nights.name)("report")
    assert found.code == 1
    assert "no store" in found.err


def test_a_parent_that_was_collected_is_a_note(two_nights: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(two_nights.parent, tmp_path / "own")
    (tmp_path / "own" / "index" / "generations" / FIRST / "manifest.json").unlink()
    data = commands(capfd, tmp_path / "own" / two_nights.name)("report", "--output", "json").json
    assert data["compared"] is None
    assert data["notes"][0].startswith(f"not compared with {FIRST}: ")
    assert data["parity"] is not None
