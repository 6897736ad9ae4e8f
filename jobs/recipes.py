"""Recipes as files: one YAML page each, from the cookbook or of one's own, into the dataclasses that carry them out."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from encoder.errors import EncoderError
from encoder.examples import Grades
from encoder.recipes import Recipe, Sampling, Stage
from encoder.trainable import Lora
from encoder.training import TrainOptions
from jobs.config import read_file
from jobs.values import convert
from pipelines.errors import InputError

COOKBOOK = Path(__file__).parent / "cookbook"

# The scale of the grades belongs to the judgments, which name it.
_GIVEN = {"stages", "grades", "lora"}


def names() -> list[str]:
    """Return the recipes of the cookbook."""
    return sorted(path.stem for path in COOKBOOK.glob("*.yaml"))


def load_recipe(name: str, *, grades: Grades, stages: Sequence[str] = ()) -> Recipe:
    """Read a recipe by its name in the cookbook or by its path, and some of its stages where they are named."""
    path = COOKBOOK / f"{name}.yaml" if name in names() else Path(name)
    if not path.is_file():
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f" Did you mean `{near[0]}`?" if near else ""
        raise InputError(f"there is no recipe `{name}`.{hint} There are {', '.join(names())}; a recipe of your own is a YAML file.")
    data = read_file(path)
    try:
        recipe = _recipe(data, path, grades)
    except (EncoderError, InputError) as error:
        raise InputError(f"{path}: {error}") from error
    if not stages:
        return recipe
    known = {stage.name: stage for stage in recipe.stages}
    if unknown := [stage for stage in stages if stage not in known]:
        raise InputError(f"{path} has no stage {', '.join(unknown)}. Its stages are {', '.join(known)}.")
    return replace(recipe, stages=tuple(known[stage] for stage in known if stage in stages))


def _recipe(data: dict[str, Any], path: Path, grades: Grades) -> Recipe:
    plain = {name: value for name, value in data.items() if name not in {"stages", "lora"}}
    rows = data.get("stages")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError("`stages` is a list of stages, each with `name`, `objective`, `batch` and `train`.")
    lora = _built(Lora, data["lora"], "lora") if data.get("lora") is not None else None
    given = {"name": path.stem, **_values(Recipe, plain, "", _GIVEN)}
    return Recipe(**given, grades=grades, lora=lora, stages=tuple(_stage(row) for row in rows))


def _stage(row: dict[str, Any]) -> Stage:
    where = f"stage {row.get('name', '?')}"
    nested = {"objective": dict, "batch": Sampling, "train": TrainOptions}
    _refuse_unknown(row, ["name", *nested], where)
    if "name" not in row or not isinstance(row.get("train"), dict):
        raise InputError(f"`{where}` needs a name, and `train: {{ steps: ..., lr: ... }}`.")
    objective = row.get("objective", {})
    if not isinstance(objective, dict):
        raise InputError(f"`{where} objective` must be `{{ parts: {{ infonce: 1.0 }}, tau: ... }}`.")
    batch = _built(Sampling, row.get("batch", {}), f"{where} batch")
    return Stage(name=str(row["name"]), objective=objective, batch=batch, train=_built(TrainOptions, row["train"], f"{where} train"))


def _built(owner: type, raw: Any, where: str) -> Any:
    if not isinstance(raw, dict):
        raise InputError(f"`{where}` must be a mapping of {', '.join(item.name for item in fields(owner))}.")
    try:
        return owner(**_values(owner, raw, where, set()))
    except TypeError as error:
        needed = [item.name for item in fields(owner) if item.name not in raw]
        raise InputError(f"`{where}` is incomplete: it lacks one of {', '.join(needed)}.") from error


def _values(owner: type, raw: dict[str, Any], where: str, apart: set[str]) -> dict[str, Any]:
    known = [item.name for item in fields(owner) if item.name not in apart]
    _refuse_unknown(raw, known, where or "the recipe")
    return {name: convert(value, owner=owner, name=name, where=f"{where} {name}".strip()) for name, value in raw.items()}


def _refuse_unknown(raw: dict[str, Any], known: Sequence[str], where: str) -> None:
    for name in raw:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f" Did you mean `{near[0]}`?" if near else ""
            raise InputError(f"{where} has no `{name}`.{hint} It has {', '.join(known)}.")
