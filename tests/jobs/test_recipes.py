"""Recipes as files: the cookbook, one's own, and every way to write one wrongly."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from encoder.examples import Grades
from encoder.objectives import Objective
from encoder.recipes import Recipe, Sampling
from encoder.trainable import Lora
from encoder.training import TrainOptions
from jobs.recipes import COOKBOOK, load_recipe, names
from pipelines.errors import InputError

STAGE: dict[str, Any] = {
    "name": "pairs",
    "objective": {"parts": {"infonce": 1.0}, "tau": 0.05, "delta": None},
    "batch": {"queries": 16, "documents": 2, "noise": 0.1},
    "train": {"steps": 20, "lr": 0.001, "save_every": 5},
}


def saved(folder: Path, tree: Any) -> str:
    path = folder / "own.yaml"
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree), encoding="utf-8")
    return str(path)


def changed(**stage: Any) -> dict[str, Any]:
    return {"stages": [{name: value for name, value in (STAGE | stage).items() if value is not ...}]}


@given(
    steps=st.integers(1, 10**6),
    lr=st.floats(1e-8, 1),
    queries=st.integers(2, 4096),
    seed=st.integers(0, 2**31),
    noise=st.floats(0, 1),
    cached=st.booleans(),
)
def test_what_a_file_says_is_what_the_recipe_does(tmp_path_factory: pytest.TempPathFactory, **drawn: Any) -> None:
    train = {"steps": drawn["steps"], "lr": drawn["lr"], "cached": drawn["cached"]}
    batch = {"queries": drawn["queries"], "noise": drawn["noise"]}
    recipe = load_recipe(saved(tmp_path_factory.mktemp("r"), {"seed": drawn["seed"], **changed(train=train, batch=batch)}), grades=Grades())
    (stage,) = recipe.stages
    assert stage.train == TrainOptions(**train)
    assert stage.batch == Sampling(**batch)
    assert (recipe.seed, recipe.name) == (drawn["seed"], "own")


def test_the_cookbook_holds_the_three_systems_and_a_small_one_and_each_loads() -> None:
    assert names() == ["mnrl", "refine", "roar", "small"]
    found = {name: load_recipe(name, grades=Grades()) for name in names()}
    assert {name: [stage.name for stage in recipe.stages] for name, recipe in found.items()} == {
        "mnrl": ["pairs"],
        "refine": ["ordinal", "circle"],
        "roar": ["contrastive", "odds"],
        "small": ["contrastive", "odds"],
    }
    assert [dict(stage.objective["parts"]) for recipe in found.values() for stage in recipe.stages] == [
        {"infonce": 1.0},
        {"supcon": 1.0},
        {"circle": 1.0},
        *[{"infonce": 1.0}, {"infonce": 1.0, "roar": 0.1}] * 2,
    ]
    assert all(recipe.name == name and recipe.about for name, recipe in found.items())
    circle = found["refine"].stages[1]
    assert (circle.batch.mined, circle.measures_targets) == (True, True)
    assert found["mnrl"].stages[0].aim().delta is None, "the multiple-negatives loss draws no mask"
    assert all((COOKBOOK / f"{name}.yaml").read_text().startswith(f"# {name}: ") for name in names())


def test_a_recipe_of_ones_own_says_everything_in_yaml(tmp_path: Path) -> None:
    tree = {
        "name": "mine",
        "about": "a large decoder",
        "lora": {"rank": 32, "alpha": 64},
        "dtype": "bfloat16",
        "checkpointing": True,
        "max_tokens": 96,
        "dims": [256, 128],
        "dev": 0.2,
        "test": 0.05,
        **changed(objective={"parts": {"circle": 1}, "targets": [0.1, 0.3, 0.5, 0.9]}),
    }
    recipe = load_recipe(saved(tmp_path, tree), grades=Grades())
    assert (recipe.name, recipe.dtype, recipe.checkpointing, recipe.max_tokens, recipe.dims) == ("mine", "bfloat16", True, 96, (256, 128))
    assert (recipe.dev, recipe.test, recipe.lora) == (0.2, 0.05, Lora(rank=32, alpha=64))
    assert recipe.stages[0].aim(positive=2) == Objective(parts={"circle": 1}, targets=(0.1, 0.3, 0.5, 0.9), positive=2)
    assert not recipe.stages[0].measures_targets


def test_the_scale_is_that_of_the_judgments_and_reaches_the_recipe(tmp_path: Path) -> None:
    levels = Grades(names=("no", "partly", "yes"), positive=1)
    assert load_recipe("roar", grades=levels).grades == levels
    with pytest.raises(InputError, match="has no `grades`"):
        load_recipe(saved(tmp_path, {"grades": ["no", "yes"], **changed()}), grades=levels)


def test_some_stages_are_taken_in_the_order_of_the_recipe() -> None:
    assert [stage.name for stage in load_recipe("roar", grades=Grades(), stages=["odds"]).stages] == ["odds"]
    both = load_recipe("roar", grades=Grades(), stages=["odds", "contrastive"])
    assert both == load_recipe("roar", grades=Grades())
    assert isinstance(both, Recipe)
    with pytest.raises(InputError, match=r"has no stage oods\. Its stages are contrastive, odds\."):
        load_recipe("roar", grades=Grades(), stages=["oods"])


@pytest.mark.parametrize(
    ("tree", "say"),
    [
        ({"sead": 1, **changed()}, r"the recipe has no `sead`\. Did you mean `seed`\?"),
        (changed(trian={}), r"stage pairs has no `trian`\. Did you mean `train`\?"),
        (changed(train={"steps": 5, "lrate": 0.1}), "stage pairs train has no `lrate`"),
        (changed(batch={"query": 5}), r"stage pairs batch has no `query`\. Did you mean `queries`\?"),
        (changed(objective={"taau": 0.1}), "the objective has no taau"),
        (changed(objective={"parts": {"infonse": 1.0}}), "infonse"),
        (changed(objective=[1]), "`stage pairs objective` must be"),
        (changed(batch=7), "`stage pairs batch` must be a mapping of queries, documents"),
        (changed(batch={"queries": "many"}), "`stage pairs batch queries` is `many`, but must be a whole number"),
        (changed(batch={"queries": 1}), "teaches nothing"),
        (changed(batch={"mined": "yes"}), "must be true or false"),
        (changed(train={"lr": 0.1}), r"`stage pairs train` is incomplete: it lacks one of steps"),
        (changed(train={"steps": 0, "lr": 0.1}), "steps is 0"),
        (changed(train={"steps": 3, "lr": -1.0}), "lr is -1"),
        (changed(train={"steps": 2.5}), "must be a whole number"),
        (changed(train=...), "needs a name, and `train"),
        (changed(name=...), "needs a name, and `train"),
        (changed(name="a/../b"), "A stage is called 'a/../b'"),
        ({"stages": []}, "its stages are"),
        ({"stages": {"a": 1}}, "`stages` is a list"),
        ({"seed": 1}, "`stages` is a list"),
        ({"stages": [STAGE, copy.deepcopy(STAGE)]}, "each with a name of its own"),
        ({"dims": 128, **changed()}, "`dims` must be a list"),
        ({"dtype": "float8", **changed()}, "must be one of: float32, bfloat16"),
        ({"lora": 8, **changed()}, "`lora` must be a mapping"),
        ({"lora": {"rnk": 8}, **changed()}, r"lora has no `rnk`\. Did you mean `rank`\?"),
        ({"seed": "one", **changed()}, "`seed` is `one`, but must be a whole number"),
        ("stages: [", "is not valid YAML"),
        ("- 1", "holds no settings"),
        ("stages: &a [*a]", "aliases"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_recipe_that_is_written_wrongly_is_refused_with_its_place(tmp_path: Path, tree: Any, say: str) -> None:
    path = saved(tmp_path, tree)
    with pytest.raises(InputError, match=say) as refused:
        load_recipe(path, grades=Grades())
    assert path in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_recipe_that_is_not_there_is_answered_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"no recipe `refin`\. Did you mean `refine`\? There are mnrl, refine, roar, small"):
        load_recipe("refin", grades=Grades())
    with pytest.raises(InputError, match=r"no recipe `zzz`\. There are"):
        load_recipe("zzz", grades=Grades())
