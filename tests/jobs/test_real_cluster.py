"""A head and workers that are processes of their own, with a token: what a cluster does that one machine does not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest

from pipelines.capacity import Patience
from pipelines.embed import run_parts
from pipelines.errors import CatalogEmbedError
from pipelines.publish import current, open_manifest
from pipelines.storage import Store
from tests.cluster import ROOT, Loopback, Node, loopback
from tests.embedding import Floats, TableShard, WordEncoder, catalog, changes, dealt, setup, titles
from tests.shops import closing, configure, make_shop

PART = 10
EMBEDDER = {"embedder": 1.0}
PATIENT_S = 90.0


@dataclass(frozen=True)
class Placed:
    """Opens towers that leave a mark of the node that they are on, and take their time until there is a mark `fast`."""

    marks: Path
    text_s: float = 0.0

    def __call__(self, _: Path, **__: Any) -> Marking:
        import ray

        (self.marks / f"opened-{ray.get_runtime_context().get_node_id()}-{os.getpid()}").touch()
        return Marking(self)


class Marking(WordEncoder):
    """Writes down which texts it is asked for."""

    def __init__(self, placed: Placed) -> None:
        super().__init__()
        self._placed = placed

    def encode(self, texts: Sequence[str]) -> Floats:
        with (self._placed.marks / "calls").open("a") as file:
            file.writelines(f"{blake2b(text.encode(), digest_size=8).hexdigest()}\n" for text in texts if text != "a")
        if not (self._placed.marks / "fast").exists():
            time.sleep(self._placed.text_s * len(texts))
        return super().encode(texts)

    def encode_tokens(self, tokens: Any) -> Floats:
        (self._placed.marks / "ids-came").touch()
        return super().encode_tokens(tokens)


def say(name: str, **facts: Any) -> None:
    print(json.dumps({"name": name, "at": time.time(), **facts}), flush=True)


def drive() -> None:
    """Embed a catalog as a driver of a cluster, and say what happens."""
    from jobs.cluster import connected

    given = json.loads(sys.argv[1])
    root = Path(given["root"])
    shard = TableShard.of("s0", catalog(titles(given["rows"])))
    job = setup(root, [shard]).job
    job = replace(job, encoder_factory=Placed(root / "marks", given["text_s"]), threads=1, **given["job"])
    patience = Patience(limit_s=given["wait_s"], tell=lambda told: say("waits", **told.facts), lost=lambda why: say("lost", why=why))
    try:
        with connected(given["address"], wait_s=given["wait_s"]):
            for done in run_parts(dealt(changes([shard]), PART), job, patience=patience):
                assert done.object is not None
                say("part", number=done.number, sha256=done.object.sha256, rows=done.rows)
    except CatalogEmbedError as error:
        say("error", kind=type(error).__name__, message=str(error))


@dataclass
class Drive:
    """A driver that runs, and what it has said so far."""

    process: subprocess.Popen[str]
    root: Path
    said: list[dict[str, Any]]

    @classmethod
    def start(cls, cluster: Loopback, root: Path, *, rows: int, wait_s: float = PATIENT_S, text_s: float = 0.0, **job: Any) -> Drive:
        root.mkdir()
        given = {"root": str(root), "address": cluster.address, "rows": rows, "wait_s": wait_s, "text_s": text_s, "job": job}
        log = (root / "stderr").open("w")
        with log:
            process = cluster.start_python("from tests.jobs.test_real_cluster import drive; drive()", json.dumps(given), stderr=log)
        return cls(process, root, [])

    def until(self, name: str, count: int = 1) -> None:
        """Read on until something was said so often."""
        assert self.process.stdout is not None
        while len(self.named(name)) < count:
            line = self.process.stdout.readline()
            assert line, f"ended before {count} times {name}: {self.said[-3:]} {(self.root / 'stderr').read_text()[-3000:]}"
            with suppress(json.JSONDecodeError):
                self.said.append(json.loads(line))

    def end(self) -> None:
        """Read on to the end."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with suppress(json.JSONDecodeError):
                self.said.append(json.loads(line))
        assert self.process.wait(timeout=60) == 0, (self.root / "stderr").read_text()[-3000:]

    def named(self, name: str) -> list[dict[str, Any]]:
        return [item for item in self.said if item["name"] == name]

    def opened(self) -> set[str]:
        """Return the nodes on which a tower was opened."""
        return {path.name.split("-")[1] for path in (self.root / "marks").glob("opened-*")}

    def parts(self) -> dict[Path, int]:
        """Return the durable parts and when they were written."""
        found = (self.root / "store" / "vectors").rglob("*.parquet")
        return {path: path.stat().st_mtime_ns for path in found}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Loopback]:
    """A head without CPUs: no task runs on it."""
    with loopback() as found:
        yield found


@pytest.fixture
def bare(cluster: Loopback) -> Iterator[Loopback]:
    """The cluster, whose other nodes go after the test."""
    yield cluster
    for node in cluster.nodes[1:]:
        cluster.remove(node)


def wait_until(there: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENT_S
    while not there():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


@dataclass(frozen=True)
class Story:
    """A night on a cluster that first has no node for towers, then one, then two, of which the first dies."""

    drive: Drive
    rows: int
    before: Mapping[Path, int]
    told: Mapping[str, Any]
    nodes: tuple[str, ...]


@pytest.fixture(scope="module")
def story(cluster: Loopback, tmp_path_factory: pytest.TempPathFactory) -> Story:
    rows = 400
    feeder = cluster.start(cpus=1)
    drive = Drive.start(cluster, tmp_path_factory.mktemp("story") / "s", rows=rows, text_s=0.1, resources=EMBEDDER, tokenize="ahead")
    added: list[Node] = [feeder]
    try:
        drive.until("waits")
        added.append(first := cluster.start(cpus=0, resources=EMBEDDER))
        drive.until("part", 2)
        there = drive.opened()
        added.append(cluster.start(cpus=0, resources=EMBEDDER))
        wait_until(lambda: len(drive.opened()) > 1, "the node that came later was not used")
        drive.until("part", 4)
        before = drive.parts()
        cluster.remove(first)
        added.remove(first)
        (drive.root / "marks" / "fast").touch()
        drive.end()
    finally:
        drive.process.kill()
        for node in added:
            cluster.remove(node)
    return Story(drive, rows, before, drive.named("waits")[0], (*there, *(drive.opened() - there)))


def test_a_job_without_a_node_for_its_actors_says_what_is_wanted_and_what_is_there(story: Story) -> None:
    assert story.told["wanted"] == "1 CPU + 1 embedder"
    assert story.told["there"] == "[1 CPU], [nothing]"
    assert story.told["limit_s"] == PATIENT_S


def test_a_node_that_joins_while_the_job_runs_gets_an_actor(story: Story) -> None:
    assert len(story.nodes) == 2


def test_texts_are_tokenised_on_the_node_with_cpus_and_forwarded_on_those_with_the_resource(story: Story) -> None:
    # The nodes of the towers have no CPU, so that no task runs there, and the head and the feeder have no tower.
    assert (story.drive.root / "marks" / "ids-came").exists()
    assert story.drive.opened() == set(story.nodes)


def test_a_node_that_dies_costs_the_parts_that_it_was_making_and_nothing_else(story: Story) -> None:
    parts = story.drive.named("part")
    assert sorted(item["number"] for item in parts) == list(range(story.rows // PART))
    assert sum(item["rows"] for item in parts) == story.rows
    after = story.drive.parts()
    assert len(story.before) >= 4
    assert {path: after[path] for path in story.before} == story.before
    assert "begin again on the nodes that are left" in story.drive.named("lost")[0]["why"]
    made = Counter((story.drive.root / "marks" / "calls").read_text().split())
    assert len(made) == story.rows
    assert max(made.values()) <= 2
    assert sum(count == 1 for count in made.values()) >= len(story.before) * PART


def test_the_parts_of_the_disturbed_night_are_those_of_a_quiet_one(story: Story, bare: Loopback, tmp_path: Path) -> None:
    bare.start(cpus=2, resources=EMBEDDER)
    quiet = Drive.start(bare, tmp_path / "q", rows=story.rows, resources=EMBEDDER, tokenize="ahead")
    quiet.end()
    said = {item["number"]: item["sha256"] for item in quiet.named("part")}
    assert said == {item["number"]: item["sha256"] for item in story.drive.named("part")}


def test_a_job_gives_up_when_no_room_came_in_its_time(bare: Loopback, tmp_path: Path) -> None:
    bare.start(cpus=1)
    drive = Drive.start(bare, tmp_path / "w", rows=20, wait_s=5.0, resources={"embedder": 2.0})
    drive.end()
    (error,) = drive.named("error")
    assert error["kind"] == "EmbedError"
    assert "no room came up in 5 s: wanted is 1 CPU + 2 embedder, and there is" in error["message"]
    assert "run again to resume" in error["message"]


def test_a_node_with_other_code_is_refused_before_any_work(bare: Loopback, tmp_path: Path) -> None:
    for package in ("encoder", "pipelines", "jobs", "tests"):
        shutil.copytree(ROOT / package, tmp_path / "other" / package, ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "other" / "pipelines" / "errors.py").open("a") as file:
        file.write("\n# Another version.\n")
    bare.start(cpus=1, PYTHONPATH=str(tmp_path / "other"))
    config = make_shop(tmp_path / "shop", products=20)
    code, _, err = bare.command(config, "plan", "--ray-address", bare.address)
    assert code == 2, err
    assert "and this process catalog-embed" in err
    assert "Install the same version everywhere" in err


def test_one_two_and_four_worker_nodes_make_the_same_generation(bare: Loopback, tmp_path: Path) -> None:
    config = make_shop(tmp_path / "shop", products=80, embed={"part_rows": 12, "resources": EMBEDDER}, gates={"samples": 16})
    found = []
    for count in (1, 2, 4):
        while len(bare.nodes) < 1 + count:
            bare.start(cpus=1, resources=EMBEDDER)
        configure(config, store={"root": f"index-{count}"})
        code, _, err = bare.command(config, "run", "--ray-address", bare.address, "--now", closing(0).isoformat())
        assert code == 0, err[-3000:]
        store = Store.open(config.parent / f"index-{count}")
        entry = current(store, "prod")
        assert entry is not None
        manifest = open_manifest(store, entry)
        assert manifest.table is not None
        parts = sorted((item.rows, item.sha256) for item in manifest.parts)
        found.append((manifest.table.rows_digest, [item.sha256 for item in manifest.segments], parts))
    assert len(found[0][2]) > 4
    assert found[1] == found[0]
    assert found[2] == found[0]
