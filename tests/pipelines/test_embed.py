"""The embed stage: a bad row costs itself and nothing else, and what was paid for is never paid for again."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from encoder.errors import TowerError
from pipelines.careful import FAILED, KILLED, MAX_ATTEMPTS, NOT_FINITE, Attempt, Note, WorkerBroken, check_alive, embed_texts
from pipelines.embed import EmbedJob, PartWork
from pipelines.errors import AlreadyExists, CorruptObject, EmbedError, InputError, PlanError, SourceMoved
from pipelines.planned_rows import fetch
from pipelines.schema import ACTION, ATTR, ID, ID_HASH, QUARANTINE, REASON, ROW, TEXT_HASH, VECTOR
from pipelines.storage import Store
from tests.embedding import (
    DIMS,
    POISON,
    PREPARER,
    Floats,
    TableShard,
    WordEncoder,
    catalog,
    changes,
    dealt,
    forwarded,
    gone,
    matrix,
    setup,
    spelled,
    titles,
    word_vectors,
)
from tests.towers import tiny_tower

# Rows of the run in which workers are killed.
MANY_ROWS = 100_000


def texts_of(rows: pa.Table) -> list[str]:
    """Render what `catalog` made, in the order of ids."""
    rows = rows.sort_by(ID)
    return [f"{title} by {brand}" for title, brand in zip(rows["title"].to_pylist(), rows["brand"].to_pylist(), strict=True)]


# Careful embedding, without Ray.


class Died(BaseException):
    """Stands for a worker that is gone."""


class Mortal(WordEncoder):
    """Dies of some texts."""

    def __init__(self, deadly: set[str]) -> None:
        super().__init__()
        self.deadly = deadly
        self.calls: list[int] = []

    def encode(self, texts: Sequence[str]) -> Floats:
        self.calls.append(len(texts))
        if self.deadly & set(texts):
            raise Died
        return super().encode(texts)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_whatever_texts_kill_the_worker_exactly_they_are_given_up(tmp_path: Path, seed: int, ahead: bool) -> None:
    draws = random.Random(seed)
    texts = [f"text {number}" for number in range(draws.choice([1, 2, 7, 50, 333]))]
    deadly = set(draws.sample(texts, min(len(texts), seed % 4)))
    note = Note(Store.open(tmp_path), "runs/r1/attempts/part-00000.json")
    for _ in range(MAX_ATTEMPTS):
        attempt = note.begin(key="k", session="s")
        try:
            batch = spelled(texts) if ahead else texts
            found = embed_texts(Mortal(deadly), batch, dims=DIMS, limit=100, note=note, attempt=attempt)
        except Died:
            continue
        break
    assert found.failed == {index: KILLED for index, text in enumerate(texts) if text in deadly}
    good = [index for index in range(len(texts)) if index not in found.failed]
    np.testing.assert_array_equal(found.vectors[good], word_vectors([texts[index] for index in good]).reshape(-1, DIMS))


def test_a_part_that_nothing_happens_to_is_embedded_in_one_call_with_one_note(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    note, encoder = Note(store, "runs/r1/attempts/part-00000.json"), Mortal(set())
    attempt = note.begin(key="k", session="s")
    embed_texts(encoder, [f"text {number}" for number in range(500)], dims=DIMS, limit=100, note=note, attempt=attempt)
    assert encoder.calls == [500]
    note.end()
    assert not list(store.list("runs"))


def test_too_many_deaths_on_one_part_stop_the_run_but_not_the_next(tmp_path: Path) -> None:
    note = Note(Store.open(tmp_path), "runs/r1/attempts/part-00000.json")
    for number in range(1, MAX_ATTEMPTS + 1):
        assert note.begin(key="k", session="s").number == number
    with pytest.raises(EmbedError, match="out-of-memory"):
        note.begin(key="k", session="s")
    assert note.begin(key="k", session="another run") == Attempt(key="k", session="another run", careful=True)
    assert note.begin(key="other rows", session="s") == Attempt(key="other rows", session="s")


class Faulty(WordEncoder):
    """Raises on some texts, and gives no number for others; `poisons` says after which text every call raises."""

    def __init__(self, *, bad: set[str] = frozenset(), nan: set[str] = frozenset(), poison: str = "") -> None:  # type: ignore[assignment]
        super().__init__()
        self.bad, self.nan, self.poison, self.broken = bad, nan, poison, False

    def encode(self, texts: Sequence[str]) -> Floats:
        self.broken |= self.poison in texts
        if self.broken or self.bad & set(texts):
            raise RuntimeError("no")
        vectors = super().encode(texts)
        vectors[[text in self.nan for text in texts]] = np.inf
        return vectors


def embed_alone(tmp_path: Path, encoder: WordEncoder, texts: list[str], limit: int = 100, *, ahead: bool = False) -> dict[int, str]:
    note = Note(Store.open(tmp_path), "runs/r1/attempts/part-00000.json")
    found = embed_texts(
        encoder, spelled(texts) if ahead else texts, dims=DIMS, limit=limit, note=note, attempt=note.begin(key="k", session="s")
    )
    good = [index for index in range(len(texts)) if index not in found.failed]
    np.testing.assert_array_equal(found.vectors[good], word_vectors([texts[index] for index in good]))
    return dict(found.failed)


@pytest.mark.parametrize("ahead", [False, True])
def test_texts_that_raise_or_give_no_number_are_found_among_the_others(tmp_path: Path, ahead: bool) -> None:
    texts = [f"text {number}" for number in range(100)]
    failed = embed_alone(tmp_path, Faulty(bad={"text 3", "text 77"}, nan={"text 76", "text 99"}), texts, ahead=ahead)
    assert failed == {3: FAILED, 77: FAILED, 76: NOT_FINITE, 99: NOT_FINITE}


@pytest.mark.parametrize("length", [1e-30, 1e30])
def test_vectors_whose_squares_are_no_float32_are_as_good_as_others(tmp_path: Path, length: float) -> None:
    class Scaled(WordEncoder):
        def encode(self, texts: Sequence[str]) -> Floats:
            return super().encode(texts) * np.float32(length)

    note = Note(Store.open(tmp_path), "runs/r1/attempts/part-00000.json")
    found = embed_texts(Scaled(), ["red", "blue"], dims=DIMS, limit=9, note=note, attempt=note.begin(key="k", session="s"))
    assert not found.failed
    np.testing.assert_array_equal(found.vectors, word_vectors(["red", "blue"]) * np.float32(length))


def test_a_tower_that_fails_on_everything_stops_instead_of_emptying_the_catalog(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(500)]
    with pytest.raises(EmbedError, match="101 texts"):
        embed_alone(tmp_path, Faulty(nan=set(texts)), texts)
    with pytest.raises(EmbedError, match="the tower fails on the text"):
        check_alive(Faulty(bad={"a"}), dims=DIMS)
    with pytest.raises(EmbedError, match="no finite vector"):
        check_alive(Faulty(nan={"a"}), dims=DIMS)
    with pytest.raises(EmbedError, match=f"of {DIMS + 1} numbers"):
        check_alive(WordEncoder(), dims=DIMS + 1)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_process_in_which_every_call_fails_is_given_up_and_no_text(tmp_path: Path, ahead: bool) -> None:
    with pytest.raises(WorkerBroken):
        embed_alone(tmp_path, Faulty(poison="text 7"), [f"text {number}" for number in range(20)], ahead=ahead)


# Planned rows, without Ray.


def opened(*shards: TableShard) -> Callable[[str], TableShard | None]:
    return {shard.name: shard for shard in shards}.get


def test_planned_rows_come_back_in_the_order_of_the_plan() -> None:
    shards = [TableShard.of("s0", catalog(titles(120))), TableShard.of("s1", catalog(titles(90), first=120))]
    planned = changes(shards)
    planned = planned.take(pa.array(random.Random(1).sample(range(planned.num_rows), 77)))
    rows, texts = fetch(planned, opened(*shards), PREPARER)
    for name in (ID, ID_HASH, TEXT_HASH):
        assert rows.column(name).to_pylist() == planned.column(name).to_pylist()
    assert rows["price"].to_pylist() == [float(int(name[1:]) % 90) for name in rows["id"].to_pylist()]
    assert texts[0].as_py().endswith(f" by {rows['brand'][0].as_py()}")


def test_rows_that_moved_within_their_shard_are_found_and_changed_ones_are_refused() -> None:
    rows = catalog(titles(200))
    planned = changes([TableShard.of("s0", rows)]).slice(20, 50)
    shuffled = TableShard.of("s0", rows.take(pa.array(random.Random(2).sample(range(200), 200))))
    assert fetch(planned, opened(shuffled), PREPARER)[0].column(ID).equals(planned.column(ID))
    changed = rows.set_column(1, "title", pa.array(["new" if number == 33 else title for number, title in enumerate(titles(200))]))
    with pytest.raises(SourceMoved, match="1 planned rows of s0 are gone or changed"):
        fetch(planned, opened(TableShard.of("s0", changed)), PREPARER)
    with pytest.raises(SourceMoved, match="it has no s0"):
        fetch(planned, opened(), PREPARER)


def test_only_the_wanted_rows_are_normalised() -> None:
    rows = catalog(titles(500))
    shard = TableShard.of("s0", rows)
    planned = changes([shard]).filter(pc.is_in(pa.array(range(500)), pa.array([3, 60, 61, 499])))
    seen = []

    class Counting:
        def rendered(self, batch: pa.RecordBatch, *, shard: str) -> tuple[pa.Table, pa.StringArray]:
            seen.append(batch.num_rows)
            return PREPARER.rendered(batch, shard=shard)

    fetch(planned, opened(shard), Counting())  # type: ignore[arg-type]
    assert seen == [1, 2, 1]


# Parts, without Ray.


def test_a_part_is_its_content_and_another_content_is_refused(tmp_path: Path) -> None:
    shard = TableShard.of("s0", catalog(titles(40)))
    log = setup(tmp_path, [shard]).job.log
    rows = changes([shard])
    work, turned = (PartWork(number=0, kind="attr", rows=table) for table in (rows, rows.take(pa.array(range(39, -1, -1)))))
    key = log.content_key(work)
    assert key == log.content_key(turned) != log.content_key(replace(work, rows=rows.slice(1)))
    assert key != replace(log, fingerprint="other").content_key(work) != replace(log, vector="float16").content_key(work)
    table = pa.table(
        {name: rows.column(name) if name in rows.schema.names else pa.nulls(40, log.columns.field(name).type) for name in log.columns.names}
    )
    done = log.finish(work, table, rejected=QUARANTINE.empty_table(), key=key)
    again = log.finish(turned, table.take(pa.array(range(39, -1, -1))), rejected=QUARANTINE.empty_table(), key=key)
    assert (done.object, done.skipped) == (again.object, False)
    assert log.existing(work, key=key) == replace(done, skipped=True)
    with pytest.raises(AlreadyExists, match="start a new run"):
        log.existing(replace(work, rows=rows.slice(1)), key=log.content_key(replace(work, rows=rows.slice(1))))
    path = Path(log.store.uri(log.place(0)))
    data = bytearray(path.read_bytes())
    data[300] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptObject):
        log.existing(work, key=key)


def test_job_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    job = setup(tmp_path, []).job
    for wrong in (
        {"vector": "int8"},
        {"actors": 0},
        {"threads": 0},
        {"token_budget": 0},
        {"gpus_per_actor": -1.0},
        {"gpus_per_actor": 1.5},
        {"tokenize": "now"},
    ):
        with pytest.raises(InputError):
            replace(job, **wrong)


# On Ray.


@pytest.mark.usefixtures("ray_cluster")
def test_of_100_k_rows_exactly_those_are_lost_that_raise_give_no_number_or_kill(tmp_path: Path) -> None:
    part = MANY_ROWS // 10
    places = {
        part // 3: "raise",
        part + 7: "nan",
        2 * part + 1: "zero",
        3 * part + part // 2: "kill",
        5 * part + 50: "stuck",
        7 * part: "once",
    }
    rows = catalog(titles(MANY_ROWS, poison=places))
    shards = [TableShard.of(f"s{number}", rows.slice(number * 4 * part, 4 * part), 8192) for number in range(3)]
    env = setup(tmp_path, shards)
    done = env.run(dealt(changes(shards), part))
    rejected = pa.concat_tables([item.rejected for item in done])
    found = {int(row[ID][1:]): row[REASON] for row in rejected.to_pylist()}
    assert found == {
        place: {"raise": FAILED, "nan": NOT_FINITE, "zero": NOT_FINITE}.get(kind, KILLED)
        for place, kind in places.items()
        if kind != "once"
    }
    assert all(
        bytes(row["excerpt"]).decode().count(POISON) == 1 and row["stage"] == "embed" and row[ROW] < 4 * part
        for row in rejected.to_pylist()
    )
    assert [item.attempts for item in done] == [1, 1, 1, 5, 1, 5, 1, 2, 1, 1]
    table = env.read(done)
    assert table.num_rows == MANY_ROWS - 5 == sum(item.rows for item in done)
    texts = [text for number, text in enumerate(texts_of(rows)) if number not in found]
    np.testing.assert_array_equal(matrix(table), word_vectors(texts))
    assert pa.concat_tables([item.lost for item in done]).column(ID).to_pylist() == rejected.column(ID).to_pylist()
    assert not list(env.store.list("runs/r1/attempts"))

    before = forwarded(tmp_path)
    again = env.run(dealt(changes(shards), part))
    assert all(item.skipped for item in again)
    assert forwarded(tmp_path) == before
    assert [(item.object, item.rejected.to_pylist(), item.lost) for item in again] == [
        (item.object, item.rejected.to_pylist(), item.lost) for item in done
    ]


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("vector", ["float32", "float16"])
def test_vectors_are_those_of_the_tower_and_each_text_is_forwarded_once(tmp_path: Path, vector: str) -> None:
    from encoder.inference import Encoder

    words = titles(300)
    rows = catalog([words[number % 140] for number in range(300)])
    shard = TableShard.of("s0", rows)
    env = setup(tmp_path, [shard], vector=vector, real=True, small=500)
    planned = changes([shard])
    # All rows of one text in one part, as the planner deals them.
    done = env.run([PartWork(number=0, kind="embed", rows=planned)])
    texts = texts_of(rows)
    assert done[0].texts == len(set(texts)) == 140
    assert forwarded(tmp_path) == len(set(texts))
    assert done[0].halvings > 0
    table = env.read(done)
    assert table.schema.field(VECTOR).type == env.job.log.columns.field(VECTOR).type
    direct = Encoder(env.tower, tower=env.job.tower)
    expected = direct.encode(texts)
    assert (matrix(table) * expected).sum(axis=1).min() > (0.9999 if vector == "float32" else 0.999)
    assert done[0].tokens > 0
    if vector == "float16":
        return
    # Another order of rows, another run: the same bytes.
    turned = PartWork(number=0, kind="embed", rows=planned.take(pa.array(random.Random(3).sample(range(300), 300))))
    again = env.run([turned], run_id="r2")
    assert again[0].object is not None
    assert done[0].object is not None
    assert again[0].object.sha256 == done[0].object.sha256


def without_unknown(tower: Path) -> Path:
    """Return the tower with a tokenizer that raises on a letter that it does not know."""
    for name, change in (
        ("tokenizer.json", {"model": {"unk_token": "[NONE]"}}),
        ("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"}),
    ):
        tree = json.loads((tower / name).read_text())
        for key, value in change.items():
            tree[key] = tree[key] | value if isinstance(value, dict) else value
        (tower / name).write_text(json.dumps(tree))
    return tower


@pytest.mark.usefixtures("ray_cluster")
def test_ids_made_ahead_give_the_same_parts_also_of_texts_that_the_tower_or_its_tokenizer_raises_on(tmp_path: Path) -> None:
    words = titles(600, poison={260: "raise", 490: "nan"})
    words[17] += " 漢字"
    shard = TableShard.of("s0", catalog(words))
    env = setup(tmp_path, [shard], tower=without_unknown(tiny_tower(tmp_path / "tower", dims=DIMS)), real=True)
    work = dealt(changes([shard]), 200)
    plain = env.run(work, tokenize="auto")
    assert not (tmp_path / "marks" / "ids-came").exists()
    ahead = env.run(work, tokenize="ahead", run_id="r2")
    assert (tmp_path / "marks" / "ids-came").exists()
    assert [item.object and item.object.sha256 for item in ahead] == [item.object and item.object.sha256 for item in plain]
    assert [item.rejected for item in ahead] == [item.rejected for item in plain]
    rejected = pa.concat_tables([item.rejected for item in ahead]).sort_by(ID).to_pylist()
    assert [(row[ID], row[REASON]) for row in rejected] == [("p000017", FAILED), ("p000260", FAILED), ("p000490", NOT_FINITE)]
    assert [bytes(row["excerpt"]).decode() for row in rejected] == [f"{words[n]} by brand {n % 7}" for n in (17, 260, 490)]
    assert [(item.texts, item.tokens > 0) for item in ahead] == [(200, True)] * 3


@pytest.mark.usefixtures("ray_cluster")
def test_a_tower_whose_tokenizer_cannot_be_read_ahead_comes_out_as_itself(tmp_path: Path) -> None:
    shard = TableShard.of("s0", catalog(titles(20)))
    env = setup(tmp_path, [shard])
    with pytest.raises(TowerError, match=r"^expected the tower 0000, found [0-9a-f]{64}\. Install the tower of that name\.$"):
        env.run(dealt(changes([shard]), 20), tokenize="ahead", fingerprint="0000")


_ON_GPUS = """
import sys
from pathlib import Path
import ray
from tests.embedding import *
ray.init(num_cpus=4, num_gpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR", object_store_memory=128 << 20)
shard = TableShard.of("s0", catalog(titles(300)))
env = setup(Path(sys.argv[1]), [shard], together=2)
print("ROWS", sum(done.rows for done in env.run(dealt(changes([shard]), 50), gpus_per_actor=0.5)))
"""


def test_two_actors_share_a_gpu_and_are_handed_ids(tmp_path: Path) -> None:
    """The GPU is one that Ray is told of; the encoder of the test stays on the CPU."""
    root = Path(__file__).parents[2]
    found = subprocess.run(
        [sys.executable, "-c", _ON_GPUS, str(tmp_path)], cwd=root, check=False, capture_output=True, text=True, timeout=120
    )
    assert "ROWS 300" in found.stdout, found.stderr[-2000:]
    assert [path.read_text() for path in (tmp_path / "marks").glob("opened-*")] == ["cuda", "cuda"]
    assert (tmp_path / "marks" / "ids-came").exists()


@pytest.mark.usefixtures("ray_cluster")
def test_work_without_texts_opens_no_tower(tmp_path: Path) -> None:
    shard = TableShard.of("s0", catalog(titles(90)))
    env = setup(tmp_path, [shard])
    planned = changes([shard])
    known = pa.table({TEXT_HASH: planned.column(TEXT_HASH).slice(0, 30), VECTOR: vectors(30)})
    attr = planned.slice(30, 30).set_column(2, ACTION, pa.repeat(ATTR, 30))
    work = [
        PartWork(number=0, kind="copy", rows=planned.slice(0, 30), vectors=known),
        PartWork(number=1, kind="attr", rows=attr),
        PartWork(number=2, kind="delete", rows=gone(planned.slice(60))),
        PartWork(number=3, kind="embed", rows=planned.slice(0, 0)),
    ]
    done = env.run(iter(work))
    assert [(item.number, item.rows, item.texts, item.lost.num_rows) for item in done] == [(0, 30, 0, 0), (1, 30, 0, 0), (2, 30, 0, 0)]
    table = env.read(done)
    np.testing.assert_array_equal(matrix(table.slice(0, 30)), word_vectors([f"v{number}" for number in range(30)]))
    assert table.column(VECTOR).slice(30).null_count == 60
    assert table["price"].to_pylist() == [float(number % 90) for number in range(60)] + [None] * 30
    assert table[ACTION].to_pylist() == ["add"] * 30 + ["attr"] * 30 + ["delete"] * 30
    assert not list((tmp_path / "marks").iterdir())
    assert all(item.skipped for item in env.run(iter(work)))
    with pytest.raises(PlanError, match="1 of 31 texts"):
        env.run([PartWork(number=9, kind="copy", rows=planned.slice(0, 31), vectors=known)])
    moved = TableShard.of("s0", catalog(titles(91)[1:]))
    with pytest.raises(SourceMoved, match=r"Plan again\.$"):
        env.run([PartWork(number=9, kind="attr", rows=attr)], shards=[moved])


def vectors(count: int) -> pa.Array:
    flat = pa.array(word_vectors([f"v{number}" for number in range(count)]).ravel())
    return pa.FixedSizeListArray.from_arrays(flat, DIMS)


@pytest.mark.usefixtures("ray_cluster")
def test_a_bad_tower_comes_out_as_itself_and_a_tower_that_fails_everywhere_stops_the_run(tmp_path: Path) -> None:
    rows = catalog(titles(40, poison={11: "tower"}))
    shard = TableShard.of("s0", rows)
    env = setup(tmp_path, [shard], every=True)
    planned = changes([shard])
    with pytest.raises(TowerError, match=r"the tower is not as it was$"):
        env.run(dealt(planned, 20))
    with pytest.raises(EmbedError, match="none of 20 rows can be embedded"):
        env.run(dealt(planned.slice(20), 20))


_DRIVER = """
import os, signal, sys
from pathlib import Path
import ray
from tests.embedding import *
from tests.pipelines.test_embed import job_of
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR", object_store_memory=128 << 20)
from pipelines.embed import run_parts
job, work = job_of(Path(sys.argv[1]))
for count, done in enumerate(run_parts(work, job), start=1):
    if count == 3:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def job_of(root: Path) -> tuple[EmbedJob, list[PartWork]]:
    """Return the same work for two processes."""
    shard = TableShard.of("s0", catalog(titles(600, poison={5: "raise"})))
    return setup(root, [shard]).job, dealt(changes([shard]), 60)


@pytest.mark.usefixtures("ray_cluster")
def test_a_killed_driver_on_one_cpu_leaves_parts_that_the_next_run_takes_over(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    dead = subprocess.run(
        [sys.executable, "-c", _DRIVER, str(tmp_path)], cwd=root, check=False, capture_output=True, text=True, timeout=120
    )
    assert dead.returncode == -signal.SIGKILL, dead.stderr[-2000:]
    (tmp_path / "marks").rename(tmp_path / "marks of the dead run")
    (tmp_path / "tower").rename(tmp_path / "tower of the dead run")
    env = setup(tmp_path, [])
    job, work = env.job, dealt(changes([shard := TableShard.of("s0", catalog(titles(600, poison={5: "raise"})))]), 60)
    done = env.run(work, shards=[shard])
    skipped = [item.number for item in done if item.skipped]
    assert len(skipped) >= 3
    assert forwarded(tmp_path) == sum(item.texts for item in done) + (0 if 0 in skipped else 60)
    assert sum(item.rows for item in done) == 599
    clean = env.run(work, shards=[shard], run_id="clean")
    assert [item.object and item.object.sha256 for item in done] == [item.object and item.object.sha256 for item in clean]
    assert job.run_id == "r1"
