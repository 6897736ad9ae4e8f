"""`python -m tests.encoder.test_recipes TOWER FOLDER` follows a recipe again and again, and is killed in every part of it."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from encoder.errors import EncoderError
from encoder.examples import JUDGMENTS, NEGATIVES, PRODUCTS, Grades
from encoder.ranking import pair_scores
from encoder.recipes import Done, Material, Recipe, Sampling, Stage, examples_of, follow, measured_targets, scored_pairs, table_digest
from encoder.registry import RECORD, read_card
from encoder.trainable import Trainable
from encoder.training import TrainOptions
from tests.towers import WORDS, tiny_tower

pytestmark = pytest.mark.usefixtures("one_thread")

QUERIES, PRODUCTS_EACH = 24, 4
FAST = TrainOptions(steps=4, lr=1e-3, log_every=1, save_every=2, chunk_texts=16)
FIRST = Stage(name="pairs", train=FAST, objective={"parts": {"infonce": 1.0}, "tau": 0.05}, batch=Sampling(queries=4, documents=1))
SECOND = Stage(
    name="odds",
    train=replace(FAST, lr=5e-4),
    objective={"parts": {"infonce": 1.0, "roar": 0.1}, "tau": 0.05, "tau_a": 0.05},
    batch=Sampling(queries=4, documents=3),
)
CIRCLE = Stage(name="circle", train=FAST, objective={"parts": {"circle": 1.0}}, batch=Sampling(queries=4, documents=3, mined=True))
RECIPE = Recipe(name="two", stages=(FIRST, SECOND), seed=3)


def material_of(*, seed: int = 0, dev: int = 6, digest: str = "data") -> Material:
    """Return a small shop in which the better product shares more words with the query."""
    draws = np.random.default_rng(seed)
    products: list[dict[str, Any]] = []
    judged: list[dict[str, Any]] = []
    for number in range(QUERIES):
        words = draws.choice(WORDS, size=6, replace=False).tolist()
        for grade in range(PRODUCTS_EACH):
            name = f"p{number:02d}{grade}"
            others = draws.choice(WORDS, size=4).tolist()
            text = " ".join([*words[: 2 * grade], *others])
            products.append({"locale": "us", "product_id": name, "text": text, "group": "", "vertical": ""})
            judged.append(dict(zip(JUDGMENTS.names, (f"q{number:02d}", " ".join(words), "us", name, grade), strict=True)))
    table = pa.Table.from_pylist(judged, schema=JUDGMENTS)
    cut = dev * PRODUCTS_EACH
    return Material(
        products=pa.Table.from_pylist(products, schema=PRODUCTS), train=table.slice(cut), dev=table.slice(0, cut), digest=digest
    )


def mined_of(material: Material) -> pa.Table:
    """Return for each query another one's worst product, which nobody judged."""
    ids = sorted(set(material.train["query_id"].to_pylist()))
    rows = [{"query_id": one, "locale": "us", "product_id": f"p{other[1:]}0", "grade": -1} for one, other in pairwise(ids)]
    return pa.Table.from_pylist(rows, schema=NEGATIVES)


def went(recipe: Recipe, base: Path, work: Path, material: Material | None = None, **how: Any) -> list[Done]:
    return follow(recipe, material or material_of(), base=base, work=work, device="cpu", **how)


def weights(tower: Path) -> bytes:
    return (tower / "model.safetensors").read_bytes()


def left(done: list[Done]) -> list[tuple[bytes, Mapping[str, Any]]]:
    return [(weights(item.tower), item.record) for item in done]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tower(tmp_path_factory.mktemp("towers") / "bert")


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Done]:
    """Two stages, undisturbed: tests that change something copy nothing of it."""
    return went(RECIPE, base, tmp_path_factory.mktemp("whole"))


# What the processes of the crash test do.


def attempt(base: Path, work: Path, *, number: int) -> None:
    """Follow the recipe, and be killed at the n-th rename or step, whichever stage that is in."""
    torch.set_num_threads(1)
    counter = itertools.count(1)

    def tick(*_: Any) -> None:
        if next(counter) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    rename = Path.rename

    def fatal_rename(path: Path, target: Path) -> Path:
        tick()  # before what is made becomes what is there: a checkpoint, or the tower of a stage
        return rename(path, target)

    Path.rename = fatal_rename  # type: ignore[method-assign,assignment]
    went(RECIPE, base, work, tell=tick)


# At the first step, past a checkpoint, before the tower is there (twice), in the second stage, past its checkpoint, before its tower.
DEATHS = (1, 4, 4, 1, 5, 3, 1, 0)


def die_and_resume(base: Path, folder: Path) -> None:
    """Be killed again and again in one work folder. Each process is a fork, for one import."""
    torch.set_num_threads(1)
    Trainable.open(base, device="cpu")  # imports what every process would import
    ends, states = [], []
    for number in DEATHS:
        process = os.fork()
        if not process:
            attempt(base, folder / "work", number=number)
            os._exit(0)
        ends.append(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
        states.append([any((folder / "work" / name).glob("*/tower")) for name in ("pairs", "odds")])
    (folder / "ends.json").write_text(json.dumps({"ends": ends, "states": states}))


def test_a_recipe_that_is_killed_in_and_between_its_stages_ends_in_the_same_bytes(base: Path, whole: list[Done], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.encoder.test_recipes", str(base), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, check=False, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "ends.json").read_text())
    assert told["ends"] == [*[-signal.SIGKILL] * (len(DEATHS) - 1), 0]
    assert told["states"] == [*[[False, False]] * 4, *[[True, False]] * 3, [True, True]], "deaths fell into other parts than meant"
    assert left(went(RECIPE, base, tmp_path / "work")) == left(whole)


@given(seed=st.integers(0, 1000), share=st.floats(0, 1))
def test_noise_adds_copies_of_so_many_queries_at_most_and_takes_none_away(seed: int, share: float) -> None:
    material = material_of()
    stage = replace(FIRST, batch=Sampling(queries=4, noise=share))
    plain = examples_of(RECIPE, FIRST, material)
    noisy = examples_of(replace(RECIPE, seed=seed), stage, material)
    assert set(plain.id_key_Q) <= set(noisy.id_key_Q)
    assert len(plain) <= len(noisy) <= 2 * len(plain)
    assert share > 0 or len(noisy) == len(plain)
    assert share < 1 or len(noisy) > 1.5 * len(plain)
    assert noisy.has_positive_Q.all()


def test_stages_follow_each_other_and_each_record_says_where_its_tower_comes_from(base: Path, whole: list[Done]) -> None:
    first, second = whole
    assert [item.stage for item in whole] == ["pairs", "odds"]
    assert first.record["base"] == read_card(base).fingerprint
    assert second.record["base"] == read_card(first.tower).fingerprint
    assert len({weights(base), weights(first.tower), weights(second.tower)}) == 3
    for item in whole:
        assert json.loads((item.tower / RECORD).read_text()) == item.record
        assert (item.record["steps"], item.record["queries"], item.record["processes"]) == (4, QUERIES - 6, 1)
        assert (item.tower.parent / "curves.svg").is_file()
    assert {"infonce", "roar"} <= second.record["last"].keys()


def test_a_stage_that_is_done_is_not_done_again(base: Path, tmp_path: Path) -> None:
    first = went(RECIPE, base, tmp_path)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    heard: list[str] = []
    # Words decide nothing, nor does what is written and when.
    stages = tuple(replace(stage, train=replace(stage.train, log_every=7, save_every=9, keep=1)) for stage in RECIPE.stages)
    other = replace(RECIPE, name="another", about="the same", stages=stages)
    again = went(other, base, tmp_path, tell=lambda stage, _: heard.append(stage))
    assert left(again) == left(first)
    assert heard == []
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == written


def test_the_same_recipe_elsewhere_gives_the_same_bytes(base: Path, whole: list[Done], tmp_path: Path) -> None:
    assert left(went(RECIPE, base, tmp_path)) == left(whole)


@pytest.mark.parametrize("what", ["seed", "data", "base", "lr"])
def test_whatever_decides_a_tower_makes_it_anew_in_the_same_folder(base: Path, tmp_path: Path, what: str) -> None:
    short = replace(RECIPE, stages=tuple(replace(stage, train=replace(stage.train, steps=2)) for stage in RECIPE.stages))
    before = went(short, base, tmp_path / "work")
    old = [weights(item.tower) for item in before]
    recipe, material, tower = short, material_of(), base
    if what == "seed":
        recipe = replace(short, seed=4)
    elif what == "data":
        material = material_of(seed=1, digest="other data")
    elif what == "base":
        tower = tiny_tower(tmp_path / "other", seed=1)
    else:
        recipe = replace(short, stages=(replace(short.stages[0], train=replace(short.stages[0].train, lr=1e-4)), short.stages[1]))
    after = went(recipe, tower, tmp_path / "work", material)
    assert all(weights(item.tower) != then for item, then in zip(after, old, strict=True)), "the second stage stands on the first"
    assert left(after) == left(went(recipe, tower, tmp_path / "fresh", material))
    # And back again: what was made first is made as it was.
    assert [weights(item.tower) for item in went(short, base, tmp_path / "work")] == old


def test_a_stage_that_wants_mined_documents_is_refused_before_anything_is_done_without_them(base: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, stages=(FIRST, CIRCLE))
    with pytest.raises(EncoderError, match="stage circle learns from mined documents, and there are none"):
        went(recipe, base, tmp_path)
    assert list(tmp_path.iterdir()) == [], "the first stage was trained for nothing"


def test_mined_documents_are_asked_of_the_tower_so_far_and_decide_the_next(base: Path, tmp_path: Path) -> None:
    material = material_of()
    heard: list[tuple[Path, str]] = []

    def mine(tower: Path, stage: Stage) -> pa.Table:
        heard.append((tower, stage.name))
        return mined_of(material)

    recipe = replace(RECIPE, stages=(FIRST, CIRCLE))
    first, circle = went(recipe, base, tmp_path, mine=mine)
    assert heard == [(first.tower, "circle")]
    assert circle.record["mined"] == mined_of(material).num_rows
    targets = circle.record["targets"]
    assert all(below < above for below, above in pairwise(targets))
    assert targets == list(measured_targets(Trainable.open(first.tower, device="cpu"), material, Grades()))
    old = weights(circle.tower)
    other = went(recipe, base, tmp_path, mine=lambda *_: mined_of(material).slice(3))
    assert weights(other[1].tower) != old


def test_targets_are_quartiles_and_medians_of_the_grades_where_these_rise(base: Path) -> None:
    trainable, material = Trainable.open(base, device="cpu"), material_of(dev=20)
    scores, grades = scored_pairs(trainable.encode, material.dev, material.products, grades=Grades())
    found = measured_targets(trainable, material, Grades())
    expected = [
        np.quantile(scores[grades == 0], 0.25),
        *(np.median(scores[grades == g]) for g in (1, 2)),
        np.quantile(scores[grades == 3], 0.75),
    ]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    texts = dict(zip(material.products["product_id"].to_pylist(), material.products["text"].to_pylist(), strict=True))
    rows = sorted(material.dev.to_pylist(), key=lambda row: (row["grade"], row["query_id"]))
    vectors = trainable.encode([row["query"] for row in rows], kind="query"), trainable.encode([texts[row["product_id"]] for row in rows])
    places = np.arange(len(rows))
    assert sorted(pair_scores(*vectors, places, places).tolist()) == pytest.approx(sorted(scores.tolist()), abs=1e-6)


def upside_down(material: Material) -> Material:
    """Return the same pairs with the scale turned round."""
    grade = pa.array([3 - grade for grade in material.dev["grade"].to_pylist()], pa.int8())
    return replace(material, dev=material.dev.set_column(4, "grade", grade))


def without(material: Material, *grades: int) -> Material:
    kept = [row for row in material.dev.to_pylist() if row["grade"] not in grades]
    return replace(material, dev=pa.Table.from_pylist(kept, schema=JUDGMENTS))


def test_targets_are_refused_the_wrong_way_round_and_where_an_end_of_the_scale_is_lacking(base: Path) -> None:
    trainable, material = Trainable.open(base, device="cpu"), material_of(dev=20)
    with pytest.raises(EncoderError, match="the wrong way round"):
        measured_targets(trainable, upside_down(material), Grades())
    with pytest.raises(EncoderError, match="there are 20 and 0"):
        measured_targets(trainable, without(material, 3), Grades())
    with pytest.raises(EncoderError, match="there are 0 and 0"):
        measured_targets(trainable, without(material, 0, 1, 2, 3), Grades())
    low, *between, high = measured_targets(trainable, without(material, 1, 2), Grades())
    np.testing.assert_allclose(between, [low + (high - low) / 3, low + 2 * (high - low) / 3], atol=1e-4)


def test_stages_without_a_relevant_product_and_odd_settings_are_refused_in_words(base: Path, tmp_path: Path) -> None:
    material = material_of()
    poor = pa.Table.from_pylist([row for row in material.train.to_pylist() if row["grade"] < 2], schema=JUDGMENTS)
    with pytest.raises(EncoderError, match="stage pairs: no query has a relevant product"):
        went(RECIPE, base, tmp_path, replace(material, train=poor))
    for wrong, message in (
        (lambda: replace(FIRST, name="../up"), "called '../up'"),
        (lambda: replace(FIRST, objective={"tua": 0.1}), "no tua"),
        (lambda: replace(FIRST, objective={"parts": {"circle": 1.0}, "targets": [0.5, 0.1, 0.2, 0.3]}), "targets"),
        (lambda: Sampling(queries=1), "teaches nothing"),
        (lambda: Sampling(noise=1.5), "noise is 1.5"),
        (lambda: replace(RECIPE, stages=()), "its stages are"),
        (lambda: replace(RECIPE, stages=(FIRST, FIRST)), "its stages are"),
    ):
        with pytest.raises(EncoderError, match=message):
            wrong()


def test_a_digest_of_a_recipe_or_a_table_is_of_what_it_says() -> None:
    assert replace(RECIPE, name="other", about="words").digest == RECIPE.digest
    changed = [replace(RECIPE, seed=4), replace(RECIPE, dims=(16,)), replace(RECIPE, stages=(FIRST,)), replace(RECIPE, max_tokens=32)]
    assert len({RECIPE.digest, *(recipe.digest for recipe in changed)}) == 5
    table = material_of().products
    pieces = pa.concat_tables([table.slice(0, 5), table.slice(5)])
    assert table_digest(pieces) == table_digest(table) != table_digest(table.slice(1))


if __name__ == "__main__":
    die_and_resume(Path(sys.argv[1]), Path(sys.argv[2]))
