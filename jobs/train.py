"""Training: graded judgments and the catalog's own texts in, an immutable tower out, with a record of where it comes from.

    read       the catalog once, by the template that indexing renders, and the judgments
    split      by query; near-duplicate queries stay on one side
    follow     the recipe, stage after stage, here or on workers of a Ray cluster
    choose     the stage whose tower is best on the dev side
    measure    that tower against the one it comes from, on the test side, which nothing was chosen by
    export     the tower with its card and its record

Killed, it goes on where it was; a stage that is done is not done again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from encoder.contenders import BM25
from encoder.curves import METRICS
from encoder.examples import NEGATIVES
from encoder.gathering import World, alone
from encoder.inference import EncodeOptions, Encoder
from encoder.mining import classify
from encoder.recipes import Done, Material, Mine, Recipe, Stage, Tell, follow, table_digest
from encoder.registry import RECORD, TowerCard, export_tower, read_card
from encoder.relevance import judgments_digest
from encoder.scoreboard import Cell
from encoder.splits import split
from jobs.evaluate import EvalRequest, Measured, measured, split_by
from jobs.fleet import on_workers
from jobs.material import grades_of, judgments_of, made_folder, products_of, read_table
from jobs.mine import VERDICTS, mixed, searched
from jobs.nightly import on_cluster, tower_directory, tower_options
from jobs.recipes import load_recipe
from jobs.settings import Settings
from pipelines.errors import InputError
from pipelines.layout import printable

BASE = "base"
# What the best stage is chosen by, on the dev side.
CHOSEN_BY = "ndcg@10"
_TOP = 100
_DONE = "done.json"
_SHOWN = (CHOSEN_BY, "recall_E@10", "recall_E+S@10", "auc_E+S|C+I")


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What a person asks for."""

    recipe: str
    target: Path
    work: Path | None = None
    base: Path | None = None
    judgments: Path | None = None
    queries: Path | None = None
    stages: Sequence[str] = ()
    mined: Path | None = None
    judged: Path | None = None
    steps: int | None = None
    seed: int | None = None
    pool: int | None = 2_000
    workers: int = 1
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.workers < 1 or (self.steps is not None and self.steps < 1):
            raise InputError(f"workers are {self.workers} and steps {self.steps}. Give 1 or more of each.")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What training left: the tower with its card, what each stage did, and how the chosen one measures against its base."""

    directory: Path
    card: TowerCard
    chosen: str
    stages: Sequence[Done]
    dev: Measured | None
    test: Measured | None
    record: Mapping[str, Any]


def train_tower(settings: Settings, lesson: Lesson, *, others: Sequence[Settings] = (), tell: Tell | None = None) -> Trained:
    """Train a tower by a recipe, and export it to `lesson.target`."""
    recipe = _recipe(settings, lesson)
    _check_target(lesson.target)
    base = tower_directory(settings, lesson.base)
    read_card(base)
    work = made_folder((lesson.work or lesson.target.with_name(f"{lesson.target.name}.work")).resolve())
    mined, judged = _brought(lesson, recipe, among_others=bool(others))
    material, test, facts = gather(settings, lesson, by=_split(base, recipe), others=others)
    school = School(recipe=recipe, material=material, base=base, work=work, device=lesson.device, mined=mined, judged=judged)
    if lesson.workers > 1:
        with on_cluster(settings):
            on_workers(school.attend, lesson.workers, work=work)
    else:
        school.attend(alone, tell)
    done = school.done()
    request = EvalRequest(pool=lesson.pool, device=lesson.device, seed=recipe.seed)
    towers = {BASE: base} | {item.stage: item.tower for item in done}
    dev = _measured(settings, material.products, material.dev, towers, request)
    chosen = _best(dev, done)
    final = _measured(settings, material.products, test, {BASE: base, chosen.stage: chosen.tower}, request)
    record = {
        "trained_at": datetime.now(tz=UTC).isoformat(timespec="seconds"),
        "recipe": {**_plain(asdict(recipe)), "digest": recipe.digest},
        "base": read_card(base).fingerprint,
        "data": facts,
        "stages": [dict(item.record) for item in done],
        "chosen": {"stage": chosen.stage, "by": CHOSEN_BY, "side": "dev"},
        "dev": _board(dev),
        "test": _board(final),
    }
    card = _export(settings, chosen.tower, lesson.target, record)
    _keep(done, {"dev": dev, "test": final}, lesson.target)
    return Trained(directory=lesson.target, card=card, chosen=chosen.stage, stages=done, dev=dev, test=final, record=record)


@dataclass(frozen=True, kw_only=True, eq=False)
class School:
    """Everything that a process needs to follow the recipe; every process of a cluster has the same one."""

    recipe: Recipe
    material: Material
    base: Path
    work: Path
    device: str
    mined: pa.Table | None
    judged: pa.Table | None

    def attend(self, world: World, tell: Tell | None = None) -> None:
        """Follow the recipe as one process of `world`; the leading one writes down what was done."""
        found = follow(
            self.recipe,
            self.material,
            base=self.base,
            work=self.work,
            device=self.device,
            world=world,
            mine=self._mining(world),
            tell=tell,
        )
        if world.leads:
            rows = [{"stage": item.stage, "tower": str(item.tower), "record": dict(item.record)} for item in found]
            (self.work / _DONE).write_text(json.dumps(rows), encoding="utf-8")

    def done(self) -> list[Done]:
        """Read what was done."""
        rows = json.loads((self.work / _DONE).read_text(encoding="utf-8"))
        return [Done(stage=row["stage"], tower=Path(row["tower"]), record=row["record"]) for row in rows]

    def _mining(self, world: World) -> Mine:
        """Return who mines: nobody where mined documents were given, else one process searches the catalog with the tower so far."""

        def mine(tower: Path, stage: Stage) -> pa.Table:
            if self.mined is not None:
                return mixed(self.mined, self.material.train, self.recipe.grades)
            fingerprint = read_card(tower).fingerprint
            brought = table_digest(self.judged) if self.judged is not None else ""
            asked = hashlib.sha256(f"{fingerprint}:{self.material.digest}:{brought}".encode()).hexdigest()
            path = self.work / stage.name / f"mined-{asked[:16]}.parquet"
            if world.leads and not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                encoder = Encoder(tower, options=EncodeOptions(device=self.device))
                found = searched(encoder, self.material.products, self.material.train, top=_TOP, tower=fingerprint)
                sorted_out = classify(found, self.material.train, grades=self.recipe.grades, judged=self.judged)
                pq.write_table(mixed(sorted_out.rows, self.material.train, self.recipe.grades), path.with_suffix(".new"))
                path.with_suffix(".new").rename(path)
            world.barrier()
            return pq.read_table(path)

        return mine


def gather(
    settings: Settings, lesson: Lesson, *, by: Mapping[str, Any], others: Sequence[Settings] = ()
) -> tuple[Material, pa.Table, Mapping[str, Any]]:
    """Read all projects, and return what is learned from, what measures at the end, and what the record says of the data."""
    products, judgments, facts = [], [], []
    for place, project in enumerate([settings, *others]):
        _check_scale(project, settings)
        own = products_of(project)
        first = {"path": lesson.judgments, "queries": lesson.queries} if not place else {}
        graded = judgments_of(project, own, **first)
        facts.append(_facts(project, own, graded))
        mark = f"{place}/" if others else ""
        products.append(_marked(own.select(["locale", "product_id", "text", "group", "vertical"]), mark, "product_id", "group"))
        judgments.append(_marked(graded, mark, "product_id", "query_id"))
    table, graded = pa.concat_tables(products).combine_chunks(), pa.concat_tables(judgments).combine_chunks()
    parts = split(graded, **by)
    material = Material(
        products=table,
        train=parts.train,
        dev=parts.dev,
        digest=f"{table_digest(table.sort_by([('locale', 'ascending'), ('product_id', 'ascending')]))}:{judgments_digest(graded)}",
    )
    sides = {
        name: {"judgments": side.num_rows, "queries": side.group_by(["locale", "query_id"]).aggregate([]).num_rows}
        for name, side in (("train", parts.train), ("dev", parts.dev), ("test", parts.test))
    }
    return material, parts.test, {"projects": facts, "split": {**sides, "by": dict(by)}, "digest": material.digest}


def trained_text(found: Trained) -> str:
    """Return for a person what came of a training: each system on both sides, in the metrics that matter most."""
    lines = [f"tower {found.card.fingerprint[:12]} of stage {found.chosen} in {found.directory}"]
    for side, board in (("dev", found.dev), ("test", found.test)):
        if board is None:
            lines.append(f"{side}: no query fell on this side")
            continue
        shown = [name for name in _SHOWN if name in board.board.metrics]
        lines += ["", f"{side}: {board.board.queries} queries over {board.products:,} products; mean, and difference to {BASE}"]
        lines.append(f"  {'':<24}" + "".join(f"{name:<30}" for name in shown).rstrip())
        for system in board.board.systems:
            cells = {cell.metric: cell for cell in board.board.cells if cell.system == system and not cell.stratum}
            lines.append(f"  {printable(system)[:24]:<24}" + "".join(f"{_cell(cells[name]):<30}" for name in shown).rstrip())
    gap = _gain(found)
    if found.test is not None and not gap > 0:
        lines += [
            "",
            f"It is not shown to be better than its base: the interval of {CHOSEN_BY} on the test side begins at {gap:+.3f}. Think before you publish it.",
        ]
    lines += ["", f"All metrics: {found.directory}/dev/eval.txt and test/eval.txt. Next: catalog-embed backfill --tower {found.directory}"]
    return "\n".join(lines) + "\n"


def _gain(found: Trained) -> float:
    """Return the lower end of what the chosen stage gains over its base on the test side; 0 where nothing can be said."""
    for cell in found.test.board.cells if found.test is not None else ():
        if (
            (cell.system, cell.metric, cell.stratum) == (found.chosen, CHOSEN_BY, "")
            and cell.difference
            and cell.difference.low is not None
        ):
            return cell.difference.low
    return 0.0


def _cell(cell: Cell) -> str:
    """Return a mean, and the difference with its interval."""
    mean, gap = cell.estimate.mean, cell.difference
    if mean is None:
        return "-"
    if gap is None or gap.mean is None or gap.low is None or gap.high is None:
        return f"{mean:.3f}"
    return f"{mean:.3f} {gap.mean:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]"


def _recipe(settings: Settings, lesson: Lesson) -> Recipe:
    recipe = load_recipe(lesson.recipe, grades=grades_of(settings), stages=lesson.stages)
    if recipe.max_tokens is None:  # as long as the texts that will be embedded
        recipe = replace(recipe, max_tokens=settings.tower.max_tokens)
    if lesson.seed is not None:
        recipe = replace(recipe, seed=lesson.seed)
    if lesson.steps is not None:
        stages = tuple(replace(stage, train=replace(stage.train, steps=lesson.steps)) for stage in recipe.stages)
        recipe = replace(recipe, stages=stages)
    if taken := [stage.name for stage in recipe.stages if stage.name in {BASE, BM25}]:
        raise InputError(f"a stage is called {taken[0]}, as what it is measured beside. Give it another name.")
    return recipe


def _split(base: Path, recipe: Recipe) -> Mapping[str, Any]:
    """Return how queries are split: as for the base, if it was trained here, which has seen what another split would test with."""
    return split_by(base) or {"dev": recipe.dev, "test": recipe.test, "seed": recipe.seed}


def _brought(lesson: Lesson, recipe: Recipe, *, among_others: bool) -> tuple[pa.Table | None, pa.Table | None]:
    """Read what earlier commands mined and judged, before hours are spent; what no stage would use is refused."""
    given = [name for name in ("mined", "judged") if getattr(lesson, name)]
    if given and not any(stage.batch.mined for stage in recipe.stages):
        raise InputError(f"--{given[0]} is for stages with `mined: true`, and none of {', '.join(s.name for s in recipe.stages)} has it.")
    if len(given) > 1:
        raise InputError("--judged is for a training that mines by itself. Give it to `catalog-embed mine`, whose result --mined is.")
    mined = read_table(lesson.mined, "mined documents", [*NEGATIVES.names, "kind"]) if lesson.mined else None
    judged = read_table(lesson.judged, "judged pairs", VERDICTS) if lesson.judged else None
    mark = "0/" if among_others else ""
    mined, judged = (None if table is None else _marked(table, mark, "product_id", "query_id") for table in (mined, judged))
    return mined, judged


def _facts(project: Settings, products: pa.Table, judgments: pa.Table) -> dict[str, Any]:
    """Say what a project brings: digests name the data, and whoever uses the tower must know under which licence it came."""
    return {
        "project": project.project.project,
        "products": products.num_rows,
        "judgments": judgments.num_rows,
        "judgments_sha256": judgments_digest(judgments),
        "texts_sha256": table_digest(
            products.select(["locale", "product_id", "text"]).sort_by([("locale", "ascending"), ("product_id", "ascending")])
        ),
        "template_digest": project.template.digest,
        "licence": project.judgments.licence or "not stated",
    }


def _check_scale(project: Settings, settings: Settings) -> None:
    if (project.judgments.grades, project.judgments.positive) != (settings.judgments.grades, settings.judgments.positive):
        raise InputError(
            f"{project.project.project} grades by {', '.join(project.judgments.grades)} and {settings.project.project} by "
            f"{', '.join(settings.judgments.grades)}: one scale is learned at a time. Map the labels of one to the other with `judgments: labels`."
        )


def _marked(table: pa.Table, mark: str, *names: str) -> pa.Table:
    """Put the number of the project before ids, which are its own; an empty family stays empty."""
    for name in names:
        if mark:
            values = [mark + value if value else value for value in table[name].to_pylist()]
            table = table.set_column(table.schema.get_field_index(name), name, pa.array(values, pa.string()))
    return table


def _measured(
    settings: Settings, products: pa.Table, judgments: pa.Table, towers: Mapping[str, Path], request: EvalRequest
) -> Measured | None:
    """Measure towers on one side of the split; None where it has no queries."""
    return measured(settings, products, judgments, towers, request) if judgments.num_rows else None


def _best(dev: Measured | None, done: Sequence[Done]) -> Done:
    """Return the stage whose tower has the best mean on the dev side; the last one where there is nothing to tell them apart."""
    if dev is None:
        return done[-1]
    means = {cell.system: cell.estimate.mean for cell in dev.board.cells if cell.metric == CHOSEN_BY and not cell.stratum}
    return max(enumerate(done), key=lambda item: (means.get(item[1].stage) or 0.0, item[0]))[1]


def _board(found: Measured | None) -> Any:
    if found is None:
        return None
    return {"products": found.products, "pairs_without_product": found.arena.missing, **json.loads(found.board.to_json())}


def _check_target(target: Path) -> None:
    made_folder(target.parent)
    if target.exists() and any(target.iterdir()):
        raise InputError(f"{target} is there already, and a tower never changes. Give a new folder, or remove this one.")


def _export(settings: Settings, tower: Path, target: Path, record: Mapping[str, Any]) -> TowerCard:
    """Copy the tower with its card, its record and the curves; the folder appears whole."""
    card = read_card(tower, tower_options(settings))
    fresh = target.with_name(f".{target.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    export_tower(tower, card, fresh)
    text = json.dumps({"fingerprint": card.fingerprint, **record}, indent=2, sort_keys=True, allow_nan=False, default=str)
    (fresh / RECORD).write_text(text + "\n", encoding="utf-8")
    if target.exists():
        target.rmdir()  # empty, as was checked
    fresh.rename(target)
    return card


def _keep(done: Sequence[Done], boards: Mapping[str, Measured | None], target: Path) -> None:
    """Put what was logged and measured beside the tower."""
    for side, board in boards.items():
        if board is not None:
            board.write(target / side)
    for item in done:
        for name in (METRICS, "curves.svg"):
            path = item.tower.parent / name
            if path.is_file():
                shutil.copyfile(path, target / f"{item.stage}-{name}")


def _plain(tree: Any) -> Any:
    return json.loads(json.dumps(tree, default=str))
