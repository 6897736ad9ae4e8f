"""Learning: train, eval, mine, judge, train-judge, audit, calibrate, write-queries, towers."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from jobs.cli.group import GENERATION, Command, cli, output_option, ray_option, say, settings_of

FILE = click.Path(path_type=Path, dir_okay=False)
FOLDER = click.Path(path_type=Path, file_okay=False)

judgments_option = click.option(
    "--judgments",
    type=FILE,
    default=None,
    metavar="FILE",
    help="Graded (query, product) pairs, Parquet or CSV. Default: `judgments: path`.",
)
queries_option = click.option(
    "--queries", type=FILE, default=None, metavar="FILE", help="The texts of the queries, where the judgments have only their ids."
)
device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:<number> or mps.")


@cli.command(cls=Command)
@click.argument("recipe")
@click.option("--out", required=True, type=FOLDER, help="Where the tower goes: a new folder.")
@click.option("--work", default=None, type=FOLDER, help="Where checkpoints and stages lie. Default: beside the tower, `<out>.work`.")
@click.option("--base", default=None, type=FOLDER, help="The tower to start from. Default: `tower: path`, or all-MiniLM-L6-v2.")
@judgments_option
@queries_option
@click.option("--data", multiple=True, type=FILE, metavar="CONFIG", help="Learn from this project too. May be repeated.")
@click.option("--stage", "stages", multiple=True, metavar="NAME", help="Only this stage of the recipe. May be repeated.")
@click.option("--mined", default=None, type=FILE, help="Hard documents that `mine` found, for stages that ask for them.")
@click.option("--judged", default=None, type=FILE, help="What `judge` said of unknown pairs, where this command mines by itself.")
@click.option("--steps", default=None, type=click.IntRange(1), help="So many steps for each stage, instead of the recipe's.")
@click.option("--seed", default=None, type=click.IntRange(0), help="Another seed than the recipe's.")
@click.option(
    "--pool", default=2000, type=click.IntRange(0), show_default=True, help="Measure over the judged products and so many others."
)
@click.option("--workers", default=1, type=click.IntRange(1), show_default=True, help="Train on so many workers of the Ray cluster.")
@device_option
@output_option("text", "json")
@ray_option
@click.pass_obj
def train(obj: dict[str, Any], /, recipe: str, out: Path, data: tuple[Path, ...], output: str, ray_address: str | None, **how: Any) -> None:
    """Train a tower by RECIPE (mnrl, roar, refine, small, or a YAML file) on graded judgments and the catalog's own texts.

    Killed, it goes on where it was. The tower is measured against its base on queries that it never saw, and comes with a
    card that names its data, recipe, seed and metrics. `backfill --tower` embeds the catalog with it.
    """
    from jobs.progress import steps_told
    from jobs.settings import load
    from jobs.train import Lesson, train_tower, trained_text

    settings = settings_of(obj, ray__address=ray_address)
    others = [load(path) for path in data]
    found = train_tower(settings, Lesson(recipe=recipe, target=out, **how), others=others, tell=steps_told(quiet=obj["quiet"]))
    say({"fingerprint": found.card.fingerprint, "directory": str(found.directory), **found.record}, trained_text(found), output)


@cli.command(cls=Command, name="eval")
@click.argument("towers", nargs=-1, type=FOLDER)
@judgments_option
@queries_option
@click.option(
    "--side",
    type=click.Choice(["all", "train", "dev", "test"]),
    default="all",
    show_default=True,
    help="Which side of the split that the towers' records name.",
)
@click.option("--seed", default=0, type=click.IntRange(0), show_default=True, help="The seed of the bootstrap and of the pool.")
@click.option(
    "--pool", default=None, type=click.IntRange(0), help="Search the judged products and so many others. Default: the whole catalog."
)
@click.option("--fusion", type=click.Choice(["rrf", "convex"]), default="rrf", show_default=True, help="How a tower and BM25 are fused.")
@click.option("--resamples", default=10_000, type=click.IntRange(1), show_default=True, help="Of the bootstrap over queries.")
@click.option("--out", default=None, type=FOLDER, help="Write eval.json, eval.txt and per_query.parquet there.")
@device_option
@output_option("text", "json")
@click.pass_obj
def evaluate(obj: dict[str, Any], /, towers: tuple[Path, ...], out: Path | None, output: str, **how: Any) -> None:
    """Measure TOWERS (default: the configured one) beside BM25 and fused with it, with intervals and corrected differences.

    The first tower is what the others are compared with. Products without a judgment count as not relevant, except in
    ndcg_judged, which looks at judged ones alone.
    """
    from jobs.evaluate import EvalRequest, calibration_errors, errors_text
    from jobs.evaluate import evaluate as measured
    from jobs.material import made_folder

    if out is not None:
        made_folder(out)
    found = measured(settings_of(obj), EvalRequest(towers=towers, **how))
    written = found.write(out) if out is not None else {}
    head = f"{found.products:,} products searched, {found.arena.judgments.num_rows:,} judged pairs, {found.arena.missing:,} without their product\n"
    errors = calibration_errors(found)
    counts = {"products": found.products, "missing": found.arena.missing, "written": written, "calibration_error": errors}
    say({**counts, "board": json.loads(found.board.to_json())}, head + found.board.to_text() + errors_text(errors), output)


@cli.command(cls=Command)
@click.option("--out", required=True, type=FOLDER, help="Where candidates.parquet, mined.parquet and unknown.parquet go.")
@judgments_option
@queries_option
@click.option("--judged", default=None, type=FILE, help="What `judge` said of the unknown pairs of an earlier round.")
@click.option(
    "--tower", default=None, type=FOLDER, help="The tower that is trained. Default: `tower: path`. Another than the index's is refused."
)
@click.option("--generation", default=None, type=GENERATION, help="Mine this generation instead of the live one.")
@click.option("--top", default=100, type=click.IntRange(1, 1000), show_default=True, help="How deep to look.")
@click.option("--engine", type=click.Choice(["faiss", "lance"]), default="faiss", show_default=True, help="Which index answers.")
@output_option("text", "json")
@click.pass_obj
def mine(obj: dict[str, Any], /, out: Path, output: str, **how: Any) -> None:
    """Search the published index for every judged query, and keep what it gets wrong.

    Hard negatives stand among the first though they are irrelevant, hard positives far down though they are exact, and
    inversions are relevant products above exact ones. Pairs that nobody judged go to `judge`.
    """
    from jobs.material import made_folder
    from jobs.mine import MineRequest
    from jobs.mine import mine as mined

    made_folder(out)
    tell = None if obj["quiet"] else lambda done, total: click.echo(f"mine  {done:,} of {total:,} queries", err=True)
    found = mined(settings_of(obj), MineRequest(**how), tell=tell)
    written = found.write(out)
    counts = {**found.mined.counts, "unknown": found.unknown.num_rows, "candidates": found.candidates.num_rows}
    lines = [f"mined {found.generation}\n", *(f"  {name.replace('_', ' '):<24} {count:>10,}\n" for name, count in counts.items())]
    say({"generation": found.generation, "counts": counts, "written": written}, "".join([*lines, f"  written to {out}\n"]), output)


def judge_options(command: Any) -> Any:
    """Add the options that name a judge."""
    for option in (
        click.option("--cache", default=None, type=FILE, help="Keep verdicts in this SQLite file: no pair is asked about twice."),
        click.option("--model", default=None, metavar="NAME", help="The model behind the endpoint."),
        click.option(
            "--endpoint",
            default=None,
            metavar="URL",
            help="An OpenAI-compatible address, such as http://host/v1. Its key: $CATALOG_EMBED_JUDGE_KEY.",
        ),
        click.option(
            "--judge", "directory", default=None, type=FOLDER, help="A judge that `train-judge` made, or any local sequence classifier."
        ),
    ):
        command = option(command)
    return command


@cli.command(cls=Command)
@click.argument("pairs", type=FILE, required=False)
@click.option("--out", default=None, type=FILE, help="Where the verdicts go, for `mine --judged` and `train --judged`.")
@click.option("--deepest", default=None, type=click.IntRange(1), help="Only pairs whose rank is at most this.")
@click.option("--agreement", is_flag=True, help="Ask about pairs that people graded, and show how the judge agrees with them.")
@click.option("--most", default=None, type=click.IntRange(1), help="With --agreement: at most so many pairs.")
@judge_options
@judgments_option
@queries_option
@device_option
@output_option("text", "json")
@click.pass_obj
def judge(
    obj: dict[str, Any],
    /,
    pairs: Path | None,
    out: Path | None,
    deepest: int | None,
    most: int | None,
    judgments: Path | None,
    queries: Path | None,
    output: str,
    *,
    agreement: bool,
    **who: Any,
) -> None:
    """Let a judge grade PAIRS that `mine` left unknown, or show how it agrees with people."""
    from jobs.judging import Bench, agree, judge_pairs, write_judged
    from jobs.material import made_folder

    if agreement is (pairs is not None) or (pairs is not None and out is None):
        raise click.UsageError("give PAIRS with --out FILE, or --agreement.")
    settings, bench = settings_of(obj), Bench(**who)
    if agreement:
        said = agree(settings, bench, judgments=judgments, queries=queries, most=most)
        say(json.loads(said.to_json()), said.to_text() + "\n", output)
        return
    assert pairs is not None
    assert out is not None
    made_folder(out.parent)
    found = judge_pairs(settings, bench, pairs, deepest=deepest)
    write_judged(found, out)
    counts = {"judged": found.judged.num_rows, "without_text": found.without_text}
    say({**counts, "out": str(out)}, f"{counts['judged']:,} pairs judged, {counts['without_text']:,} without a product, in {out}\n", output)


@cli.command(cls=Command, name="train-judge")
@click.option("--out", required=True, type=FOLDER, help="Where the judge goes: a new folder.")
@click.option(
    "--base", default=None, type=FOLDER, help="The tower whose weights it starts from. Default: `tower: path`, or all-MiniLM-L6-v2."
)
@judgments_option
@queries_option
@click.option("--epochs", default=2, type=click.IntRange(1), show_default=True, help="How often it sees every pair.")
@click.option("--steps", "max_steps", default=None, type=click.IntRange(1), help="At most so many steps.")
@click.option("--lr", default=3e-5, type=float, show_default=True, help="The learning rate.")
@click.option("--seed", default=0, type=click.IntRange(0), show_default=True, help="Of its head, its order and what it holds out.")
@device_option
@output_option("text", "json")
@click.pass_obj
def train_judge(
    obj: dict[str, Any], /, out: Path, base: Path | None, judgments: Path | None, queries: Path | None, output: str, **how: Any
) -> None:
    """Train a cross-encoder to grade as people did, on three levels; a tenth of the queries is held out to measure it."""
    from encoder.judge_models import TrainingOptions
    from jobs.judging import train_judge as trained
    from jobs.material import made_folder

    made_folder(out.parent)
    found = trained(settings_of(obj), out, base=base, judgments=judgments, queries=queries, options=TrainingOptions(**how))
    text = f"judge {found.version} in {out}: {found.steps} steps on {found.trained_pairs:,} pairs, loss {found.first_loss:.3f} to {found.last_loss:.3f}\n"
    said = found.agreement
    say(asdict(found), text + (said.to_text() + "\n" if said else "no query was held out\n"), output)


@cli.command(cls=Command)
@click.argument("engagement", type=FILE)
@click.option("--out", required=True, type=FILE, help="Where the disagreements go: a .csv (safe for spreadsheets) or .jsonl file.")
@click.option("--most", default=1000, type=click.IntRange(1), show_default=True, help="At most so many, the strongest first.")
@judgments_option
@queries_option
@output_option("text", "json")
@click.pass_obj
def audit(
    obj: dict[str, Any], /, engagement: Path, out: Path, most: int, judgments: Path | None, queries: Path | None, output: str
) -> None:
    """Set ENGAGEMENT (query_id, product_id, impressions, clicks, purchases) beside grades, and export where they disagree."""
    from encoder.audit import AuditOptions, write_csv, write_jsonl
    from jobs.judging import audit as audited
    from jobs.material import made_folder

    if out.suffix not in {".csv", ".jsonl"}:
        raise click.UsageError(f"--out {out}: give a .csv or a .jsonl file.")
    made_folder(out.parent)
    found = audited(settings_of(obj), engagement, judgments=judgments, queries=queries, options=AuditOptions(most=most))
    (write_csv if out.suffix == ".csv" else write_jsonl)(found.rows, out)
    lines = [f"  {name.replace('_', ' '):<28} {count:>10,}\n" for name, count in found.counts.items()]
    say({"counts": dict(found.counts), "out": str(out)}, "".join([f"{found.rows.num_rows:,} disagreements in {out}\n", *lines]), output)


@cli.command(cls=Command)
@click.argument("generation", type=GENERATION, required=False)
@judgments_option
@queries_option
@click.option("--show", is_flag=True, help="Show the newest calibration instead of making one.")
@click.option(
    "--min-pairs", default=1000, type=click.IntRange(1), show_default=True, help="So many pairs make a vertical's or locale's own curve."
)
@click.option("--min-outcomes", default=50, type=click.IntRange(1), show_default=True, help="So many of either outcome do.")
@click.option("--all-queries", is_flag=True, help="Take queries too that the tower was trained on: probabilities come out too good.")
@output_option("text", "json")
@click.pass_obj
def calibrate(
    obj: dict[str, Any],
    /,
    generation: str | None,
    judgments: Path | None,
    queries: Path | None,
    min_pairs: int,
    min_outcomes: int,
    output: str,
    *,
    show: bool,
    all_queries: bool,
) -> None:
    """Turn scores of a generation into probabilities: P(relevant) and P(exact), overall, per vertical and per locale."""
    from encoder.relevance import CalibrationOptions
    from jobs.calibrate import calibrate_generation, calibration_of, calibration_text

    settings = settings_of(obj)
    if show:
        found = calibration_of(settings, generation=generation)
    else:
        options = CalibrationOptions(min_pairs=min_pairs, min_outcomes=min_outcomes)
        found = calibrate_generation(
            settings, generation=generation, judgments=judgments, queries=queries, options=options, all_queries=all_queries
        )
    data = {"generation": found.generation, "key": found.key, "pairs": found.pairs, "missing": found.missing}
    say({**data, "calibration": json.loads(found.calibration.to_json())}, calibration_text(found), output)


@cli.command(cls=Command, name="write-queries")
@click.argument("out", type=FILE)
@click.option(
    "--template",
    "templates",
    multiple=True,
    metavar="TEXT",
    help="Such as '{brand} {category}', over columns of products. May be repeated.",
)
@click.option("--category", default="vertical", show_default=True, metavar="COLUMN", help="Products that share it may replace each other.")
@click.option("--seq2seq", default=None, type=FOLDER, help="Ask this local T5- or BART-like model instead of templates.")
@click.option("--prompt", default=None, metavar="TEXT", help="What it is asked, with {text} where the product goes.")
@click.option("--products", "most", default=None, type=click.IntRange(1), help="For so many products, chosen by hash. Default: all.")
@click.option("--per-product", default=1, type=click.IntRange(1), show_default=True, help="So many queries for each.")
@click.option("--seed", default=0, type=click.IntRange(0), show_default=True, help="Which products, templates and samples.")
@output_option("text", "json")
@click.pass_obj
def write_queries(obj: dict[str, Any], /, out: Path, output: str, **how: Any) -> None:
    """Write queries for the catalog's products, with derived grades, into OUT (Parquet): judgments for a shop that has none."""
    from jobs.queries import QueryRequest, written

    found = written(settings_of(obj), QueryRequest(**how), out)
    say(found, f"{found['queries']:,} queries with {found['judgments']:,} derived grades in {out}\n", output)


@cli.command(cls=Command)
@click.argument("directories", nargs=-1, type=FOLDER)
@output_option("text", "json")
@click.pass_obj
def towers(obj: dict[str, Any], /, directories: tuple[Path, ...], output: str) -> None:
    """List the towers of the store and of DIRECTORIES: what they are, where they come from, which generations they made."""
    from jobs.towers import towers_known, towers_text

    found = towers_known(settings_of(obj), directories)
    say([asdict(item) for item in found], towers_text(found), output)
