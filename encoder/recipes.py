"""A recipe: the stages that make a tower out of another, as data, and `follow`, which reads them from the first to the last.

    stage 1   many pairs, contrastive     learns what shoppers call things
    mining    what the tower confuses     becomes the next stage's hard documents
    stage 2   graded documents            learns which of two relevant products is better

Each stage starts from the tower that the one before saved. A stage that is done is not done again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from encoder.augment import with_noise
from encoder.batches import Batches, Positives
from encoder.curves import METRICS, write_curves
from encoder.errors import EncoderError
from encoder.examples import Examples, Grades, Missing, join
from encoder.gathering import World, alone
from encoder.objectives import Objective
from encoder.ranking import pair_scores
from encoder.records import read_record
from encoder.registry import TowerOptions, read_card
from encoder.trainable import Lora, Precision, Trainable
from encoder.training import FREE, TrainOptions, train

Mine: TypeAlias = Callable[[Path, "Stage"], pa.Table]
"""Given the tower so far and the stage that asks, mined documents as NEGATIVES has them."""
Tell: TypeAlias = Callable[[str, Mapping[str, Any]], None]
"""Hears of every step: the name of the stage, and what `train` says."""

# Quartiles that become the circle's target cosines: the lowest grade's lower one, the best grade's upper one.
_LOW, _HIGH = 0.25, 0.75


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What is in a batch: so many queries, and so many documents of each, of which `mined` says whether some are mined ones.

    The positive of a contrastive loss is one of the best-graded documents, or of all `relevant` ones, another one each epoch.
    `noise` adds misspelled copies of so large a share of the queries.
    """

    queries: int = 64
    documents: int = 1
    positives: Positives = "best"
    mined: bool = False
    noise: float = 0.0

    def __post_init__(self) -> None:
        if self.queries < 2 or self.documents < 1:  # noqa: PLR2004 - one query has no negatives
            raise EncoderError(f"A batch of {self.queries} queries with {self.documents} documents teaches nothing. Give 2 and 1, or more.")
        if not 0 <= self.noise <= 1:
            raise EncoderError(f"noise is {self.noise}. Give the share of queries that get a misspelled copy, from 0 to 1.")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage: what is minimised (`objective`, as the fields of Objective), what a batch holds, and how long and fast is learned.

    Target cosines that a circle loss lacks are measured with the tower that the stage starts from.
    """

    name: str
    train: TrainOptions
    objective: Mapping[str, Any] = field(default_factory=dict)
    batch: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise EncoderError(f"A stage is called {self.name!r}. Give it a name of letters and digits.")
        known = {item.name for item in fields(Objective)}
        if unknown := sorted(self.objective.keys() - known):
            raise EncoderError(f"stage {self.name}: the objective has no {', '.join(unknown)}. It has {', '.join(sorted(known))}.")
        self.aim((0.0, 1.0) if self.measures_targets else None)

    @property
    def measures_targets(self) -> bool:
        """Whether target cosines have to be measured."""
        return "circle" in self.objective.get("parts", {}) and self.objective.get("targets") is None

    def aim(self, targets: tuple[float, ...] | None = None, **common: Any) -> Objective:
        """Return the objective, with target cosines where it lacks them."""
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in self.objective.items()}
        return Objective(**{**common, **given, **({"targets": targets} if targets is not None else {})})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What makes a tower of another: the scale of the grades, adapters or all weights, Matryoshka lengths, and the stages."""

    name: str
    about: str = ""
    stages: tuple[Stage, ...]
    grades: Grades = field(default_factory=Grades)
    lora: Lora | None = None
    dtype: Precision = "float32"
    checkpointing: bool = False
    max_tokens: int | None = None
    dims: tuple[int, ...] = ()
    dev: float = 0.1
    test: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        if not names or len(set(names)) < len(names):
            raise EncoderError(f"recipe {self.name}: its stages are {names}. Give one or more, each with a name of its own.")

    @property
    def digest(self) -> str:
        """Return a hash of everything that the recipe says, but for its words."""
        tree = {name: value for name, value in asdict(self).items() if name not in {"name", "about"}}
        return hashlib.sha256(json.dumps(tree, sort_keys=True, default=str).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, eq=False)
class Material:
    """What is learned from: products with texts, judgments to train on, and others that only measure; `digest` names the data."""

    products: pa.Table
    train: pa.Table
    dev: pa.Table
    digest: str


@dataclass(frozen=True, kw_only=True)
class Done:
    """A stage that was carried out: the tower it left, with what was logged in the folder above it, and its record."""

    stage: str
    tower: Path
    record: Mapping[str, Any]


def follow(
    recipe: Recipe,
    material: Material,
    *,
    base: Path,
    work: Path,
    device: str = "auto",
    world: World = alone,
    mine: Mine | None = None,
    tell: Tell | None = None,
) -> list[Done]:
    """Carry out the stages in order, each from the tower of the one before, and return what they left.

    All processes call it alike and see one `work` folder; the leading one writes towers. Killed, it goes on where it was.
    """
    for stage in recipe.stages:
        if stage.batch.mined and mine is None:
            raise EncoderError(f"stage {stage.name} learns from mined documents, and there are none. Mine with `catalog-embed mine` first.")
    tower, done = base, []
    for stage in recipe.stages:
        mined = mine(tower, stage) if stage.batch.mined and mine is not None else None
        step = _Step(recipe=recipe, stage=stage, material=material, tower=tower, mined=mined)
        identity = step.identity(processes=world.size)
        # What was learned from other data or settings has a folder of its own, and is there when these come back.
        folder = work / stage.name / identity[:16]
        record = _left(folder, identity)
        if record is None:
            record = step.carry_out(identity, folder, device=device, world=world, tell=tell)
        tower = folder / "tower"
        done.append(Done(stage=stage.name, tower=tower, record=record))
    return done


@dataclass(frozen=True, kw_only=True, eq=False)
class _Step:
    """A stage with all that it starts from."""

    recipe: Recipe
    stage: Stage
    material: Material
    tower: Path
    mined: pa.Table | None

    def identity(self, *, processes: int) -> str:
        """Hash all that decides the tower of the stage."""
        shared = {name: value for name, value in asdict(self.recipe).items() if name not in {"name", "about", "stages"}}
        said = {
            "recipe": shared,
            "stage": {**asdict(self.stage), "train": {name: value for name, value in asdict(self.stage.train).items() if name not in FREE}},
            "tower": read_card(self.tower).fingerprint,
            "data": self.material.digest,
            "mined": table_digest(self.mined) if self.mined is not None else None,
            "processes": processes,
        }
        return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()

    def carry_out(self, identity: str, folder: Path, *, device: str, world: World, tell: Tell | None) -> dict[str, Any]:
        """Train, save the tower, and return the record."""
        recipe, stage = self.recipe, self.stage
        trainable = Trainable.open(
            self.tower,
            options=TowerOptions(max_tokens=recipe.max_tokens),
            device=device,
            dtype=recipe.dtype,
            lora=recipe.lora,
            checkpointing=recipe.checkpointing,
        )
        batches = self._batches(world)
        targets = measured_targets(trainable, self.material, recipe.grades) if stage.measures_targets else None
        outcome = train(
            trainable,
            batches,
            stage.aim(targets, positive=recipe.grades.positive, dims=recipe.dims),
            replace(stage.train, recipe=identity, seed=recipe.seed),
            work=folder,
            world=world,
            on_step=None if tell is None else lambda line: tell(stage.name, line),
        )
        record = {
            "identity": identity,
            "stage": stage.name,
            "base": trainable.card.fingerprint,
            "steps": outcome.steps,
            "epochs": round(outcome.steps / max(batches.steps_per_epoch, 1), 3),
            "queries": len(batches.examples),
            "mined": self.mined.num_rows if self.mined is not None else 0,
            "missing": asdict(batches.examples.missing),
            "targets": list(targets) if targets else None,
            "processes": world.size,
            "last": {name: value for name, value in outcome.last.items() if not name.endswith("_per_s")},
        }
        if world.leads:
            trainable.save(folder / "tower", record=record)
            write_curves(folder / METRICS, folder / "curves.svg", title=f"{recipe.name}, stage {stage.name}")
        world.barrier()
        return record

    def _batches(self, world: World) -> Batches:
        sampling = self.stage.batch
        return Batches(
            examples_of(self.recipe, self.stage, self.material),
            queries_per_batch=sampling.queries,
            documents_per_query=sampling.documents,
            seed=self.recipe.seed,
            rank=world.rank,
            world=world.size,
            negatives=self.mined,
            positives=sampling.positives,
        )


def examples_of(recipe: Recipe, stage: Stage, material: Material) -> Examples:
    """Return the examples of a stage: those with a relevant product, misspelled copies added where the stage asks for them."""
    judgments = material.train
    if stage.batch.noise:
        judgments = with_noise(judgments, share=stage.batch.noise, seed=recipe.seed)
    examples = join(judgments, material.products, grades=recipe.grades)
    kept = examples.take(examples.has_positive_Q)
    if not len(kept):
        raise EncoderError(f"stage {stage.name}: no query has a relevant product among {material.products.num_rows}. Check ids and grades.")
    without = Missing(
        judgments=examples.missing.judgments,
        products=examples.missing.products,
        queries=examples.missing.queries + len(examples) - len(kept),
    )
    return replace(kept, missing=without)


def measured_targets(trainable: Trainable, material: Material, grades: Grades) -> tuple[float, ...]:
    """Return a target cosine for each grade: from the lower quartile of the lowest to the upper one of the best, on held-out pairs.

    Medians of the grades between stand where they fall; a grade without pairs, or out of order, stands evenly between its neighbours.
    """
    scores, grade = scored_pairs(trainable.encode, material.dev, material.products, grades=grades)
    found = {number: scores[grade == number] for number in range(len(grades.names))}
    if not len(found[0]) or not len(found[grades.best]):
        raise EncoderError(
            f"Target cosines need held-out pairs of the grades {grades.names[0]} and {grades.names[-1]}: there are "
            f"{len(found[0])} and {len(found[grades.best])}. Judge more, raise `dev`, or give `targets`."
        )
    low, high = float(np.quantile(found[0], _LOW)), float(np.quantile(found[grades.best], _HIGH))
    if not low < high:
        raise EncoderError(
            f"The tower puts {grades.names[0]} at {low:.3f} and {grades.names[-1]} at {high:.3f}: the wrong way round. "
            "Train it with a contrastive stage first, or give `targets`."
        )
    even = np.linspace(low, high, len(grades.names))
    medians = [float(np.median(found[number])) if len(found[number]) else even[number] for number in range(1, grades.best)]
    targets = [low, *medians, high]
    rising = all(below < above for below, above in pairwise(targets))
    return tuple(round(float(value), 4) for value in (targets if rising else even))


def scored_pairs(encode: Callable[..., Any], judgments: pa.Table, products: pa.Table, *, grades: Grades) -> tuple[Any, Any]:
    """Return the cosine and the grade of each judged pair whose product is there."""
    examples = join(judgments, products, grades=grades)
    queries = encode(examples.queries.to_pylist(), kind="query")
    rows = np.unique(examples.judged.product_J)
    documents = encode(examples.texts.take(pa.array(rows)).to_pylist(), kind="document")
    asked = np.repeat(np.arange(len(examples)), np.diff(examples.judged.offsets_Q))
    return pair_scores(queries, documents, asked, np.searchsorted(rows, examples.judged.product_J)), examples.judged.grade_J


def table_digest(table: pa.Table) -> str:
    """Hash the rows of a table, whatever chunks they come in."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return hashlib.sha256(sink.getvalue()).hexdigest()


def _left(folder: Path, identity: str) -> Mapping[str, Any] | None:
    """Return the record of a stage that was finished before with the same data and settings."""
    record = read_record(folder / "tower")
    return record if record is not None and record.get("identity") == identity else None
