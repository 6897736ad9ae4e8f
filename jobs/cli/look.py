"""Looking: status, runs, generations, diff, search, explain, report, export."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from jobs.cli.group import GENERATION, Command, cli, output_option, ray_option, say, settings_of

STALE = 1


@cli.command(cls=Command)
@click.option("--max-lag", default=None, metavar="SPAN", help="Exit 1 when the index is further behind than this, such as 26h.")
@click.option("--watch", is_flag=True, help="Go on showing the runs that work now, until none does.")
@click.option(
    "--every", type=click.FloatRange(0.2, 3600), default=2.0, show_default=True, metavar="SECONDS", help="How often --watch looks."
)
@output_option("text", "json", "jsonl")
@click.pass_obj
def status(obj: dict[str, Any], max_lag: str | None, output: str, *, watch: bool, every: float) -> None:
    """Show which generation is live, how old it is, who works and how far they are, and how the last run went.

    With --watch the runs that work now are followed, from any terminal that reaches the store: what is shown is a few seconds old.
    Ctrl-C ends the watching, and no run.
    """
    from jobs.inspect import look, require_store
    from jobs.watching import follow
    from pipelines.window import span

    settings = settings_of(obj)
    lag = span(max_lag) if max_lag else None
    if watch:
        for item in follow(require_store(settings), every_s=every):
            say(asdict(item), f"{item.shown()}\n", "jsonl" if output == "json" else output)
            sys.stdout.flush()
    found = look(settings, max_lag=lag)
    if output != "text":
        last_run = json.loads(found.last_run.to_json()) if found.last_run else None
        say({**asdict(found), "last_run": last_run}, "", output)
    else:
        click.echo(found.text())
    sys.exit(STALE if found.stale else 0)


@cli.command(cls=Command)
@click.option("-n", "--last", type=click.IntRange(1, 10_000), default=20, show_default=True, help="How many.")
@output_option("text", "json", "jsonl")
@click.pass_obj
def runs(obj: dict[str, Any], last: int, output: str) -> None:
    """List the newest runs, oldest first."""
    from jobs.inspect import require_store, running
    from jobs.records import all_runs
    from pipelines.layout import took

    store = require_store(settings_of(obj))
    busy = running(store)
    found = list(all_runs(store).items())[-last:]
    lines, data = [], []
    for name, facts in found:
        if facts is None:
            outcome = "running" if name in busy else "unknown"
            data.append({"run_id": name, "outcome": outcome})
            lines.append(f"{name}  {'runs now' if name in busy else 'left no state: it was killed, or is only beginning'}\n")
        else:
            data.append(json.loads(facts.to_json()))
            made = f"{facts.base or '-'} -> {facts.generation or '-'}"
            outcome = "built, held" if facts.held else facts.outcome.replace("_", " ")
            lines.append(f"{name}  {facts.command:<8}  {outcome:<12}  exit {facts.exit_code:<2}  {made:<22}  {took(facts.seconds)}\n")
    say(data, "".join(lines), output)


@cli.command(cls=Command)
@output_option("text", "json", "jsonl")
@click.pass_obj
def generations(obj: dict[str, Any], output: str) -> None:
    """List every generation that was written whole, oldest first: live, published before, or a candidate."""
    from jobs.inspect import generations as listed
    from pipelines.layout import printable

    lines, data = [], []
    for item in listed(settings_of(obj)):
        shown = {"generation": item.name, "standing": item.standing}
        if item.manifest is None:
            data.append(shown)
            lines.append(printable(f"{item.name}  {item.standing}"))
        else:
            found = item.manifest
            data.append({**json.loads(found.to_json()), **shown})
            counts = f"{found.counts['live']:>12,} products  tower {found.tower[:12]}"
            lines.append(printable(f"{item.name}  {found.created_at:%Y-%m-%d %H:%M} UTC  {counts}  {item.standing}"))
    say(data, "".join(f"{line}\n" for line in lines), output)


@cli.command(cls=Command)
@click.argument("before", type=GENERATION)
@click.argument("after", type=GENERATION)
@click.option("--sample", type=click.IntRange(0, 1000), default=5, show_default=True, metavar="N", help="Show up to N ids of each kind.")
@output_option("text", "json", "jsonl")
@click.pass_obj
def diff(obj: dict[str, Any], before: str, after: str, sample: int, output: str) -> None:
    """Show in which products two generations differ."""
    from jobs.inspect import compare
    from pipelines.layout import printable

    actions, ids = compare(settings_of(obj), before, after, limit=sample)
    names = {"add": "+ only in the second", "text": "~ other text", "attr": ". other attributes", "delete": "- only in the first"}
    lines = []
    for action, called in names.items():
        shown = ", ".join(map(printable, ids[action]))
        lines.append(f"{called:<22} {actions[action]:>10,}{'   ' + shown if shown else ''}\n")
    say({"before": before, "after": after, "actions": dict(actions), "ids": dict(ids)}, "".join(lines), output)


@cli.command(cls=Command)
@click.argument("query")
@click.option("-k", "--top", type=click.IntRange(1, 10_000), default=10, show_default=True, help="How many products.")
@click.option(
    "--where", default=None, metavar="FILTER", help="Only products that pass, such as \"price < 80 and brand in ('Acme', 'Nord')\"."
)
@click.option(
    "--nulls",
    type=click.Choice(["drop", "keep"]),
    default="drop",
    show_default=True,
    help="What becomes of products that the filter does not decide, because a value is missing.",
)
@click.option("--engine", type=click.Choice(["faiss", "lance"]), default="faiss", show_default=True, help="Which index answers.")
@click.option("--exact", is_flag=True, help="Compare every vector instead of asking an index.")
@click.option("--group-by", default=None, metavar="COLUMN", help="Show few products of each group, such as the variants of one article.")
@click.option("--per-group", type=click.IntRange(min=1), default=1, show_default=True, help="How many of each group.")
@click.option("--columns", default="", metavar="NAMES", help="Columns to show, with commas between. Default: all that the index keeps.")
@click.option(
    "--min-relevance",
    type=click.FloatRange(0, 1),
    default=None,
    help="Show P(relevant) of each answer, and leave out those below this. Takes a calibration: see `calibrate`.",
)
@click.option("--generation", default=None, type=GENERATION, help="Search this generation instead of the live one.")
@output_option("text", "json", "jsonl")
@click.pass_obj
def search(
    obj: dict[str, Any],
    query: str,
    top: int,
    where: str | None,
    nulls: Any,
    engine: Any,
    group_by: str | None,
    per_group: int,
    columns: str,
    min_relevance: float | None,
    generation: str | None,
    output: str,
    *,
    exact: bool,
) -> None:
    """Search the live generation with its own query tower."""
    from jobs.inspect import reader
    from pipelines.layout import counted, printable

    settings = settings_of(obj)
    with reader(settings, generation=generation) as opened:
        chosen = [name.strip() for name in columns.split(",") if name.strip()] or list(opened.opened.table.kept)
        how = {"engine": engine, "exact": exact, "group_by": group_by, "per_group": per_group}
        rows = opened.search(query, top, where=where, nulls=nulls, columns=chosen, **how).to_pylist()
        name = opened.generation
    if min_relevance is not None:
        if min_relevance != min_relevance:  # noqa: PLR0124  NaN passes every range
            raise click.UsageError("--min-relevance is a number from 0 to 1.")
        from jobs.calibrate import relevant

        rows, chosen = relevant(settings, rows, generation=name, least=min_relevance), ["p_relevant", *chosen]
    lines = [f"{name}  {counted(len(rows), 'product')}\n"]
    for row in rows:
        shown = "  ".join(f"{column}={row[column]}" for column in chosen if row[column] is not None)
        lines.append(f"  {row['score']:.4f}  {printable(row['id'])}  {printable(shown)}\n")
    say([{"generation": name, **row} for row in rows], "".join(lines), output)


@cli.command(cls=Command)
@click.argument("product")
@output_option("text", "json", "jsonl")
@ray_option
@click.pass_obj
def explain(obj: dict[str, Any], product: str, output: str, ray_address: str | None) -> None:
    """Follow one product: row, text, hashes, table row, quarantine, parts, segments, gates."""
    from jobs.inspect import trace
    from pipelines.layout import printable

    steps = list(trace(settings_of(obj, ray__address=ray_address), product, verbose=obj["verbose"] > 0))
    lines = [f"{step:<14}  {printable(found)}\n" for step, found in steps]
    say([{"step": step.strip(), "found": found} for step, found in steps], "".join(lines), output)


@cli.command(cls=Command)
@click.argument("generation", type=GENERATION, required=False)
@click.option("--against", default=None, type=GENERATION, help="Compare with this generation. Default: the one it grew from.")
@click.option(
    "--queries",
    default=None,
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Ask with these queries: a .txt file with one a line, or a .parquet file with a column `query`. Default: products, chosen by hash.",
)
@click.option("--samples", default=None, type=click.IntRange(1, 10_000), help="Ask at most so many. Default: `gates: samples`.")
@click.option("--top", default=5, type=click.IntRange(0, 1000), show_default=True, help="How many of the worst queries to show.")
@click.option("--html", default=None, type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write it as a web page, too.")
@output_option("text", "json")
@click.pass_obj
def report(
    obj: dict[str, Any],
    generation: str | None,
    against: str | None,
    queries: Path | None,
    samples: int | None,
    top: int,
    html: Path | None,
    output: str,
) -> None:
    """Show how the index stands: its lists and their drift, whether FAISS and Lance agree, and what changed for those who search."""
    from jobs.reporting import report as measured
    from jobs.reporting import write_page
    from pipelines.health import report_text

    found = measured(settings_of(obj), generation, against=against, queries=queries, samples=samples, top=top)
    if html is not None:
        write_page(found, html)
    say(asdict(found), report_text(found), output)


@cli.command(cls=Command)
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
@click.option("--generation", default=None, type=GENERATION, help="Export this generation instead of the live one.")
@output_option("text", "json", "jsonl")
@click.pass_obj
def export(obj: dict[str, Any], directory: Path, generation: str | None, output: str) -> None:
    """Write one clean snapshot of a generation as Parquet into DIRECTORY, which must be new or empty."""
    from jobs.inspect import export_to

    name, rows = export_to(settings_of(obj), directory.resolve(), generation=generation)
    say({"generation": name, "rows": rows, "directory": str(directory.resolve())}, f"{name}: {rows:,} products in {directory}\n", output)
