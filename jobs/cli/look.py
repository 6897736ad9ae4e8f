"""Looking: status, runs, generations, diff, search, explain, export."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from jobs.cli.group import Command, cli, output_option, settings_of

STALE = 1


@cli.command(cls=Command)
@click.option("--max-lag", default=None, metavar="SPAN", help="Exit 1 when the index is further behind than this, such as 26h.")
@output_option("text", "json")
@click.pass_obj
def status(obj: dict[str, Any], max_lag: str | None, output: str) -> None:
    """Show which generation is live, how old it is, who is writing, and how the last run went."""
    from jobs.inspect import look
    from pipelines.layout import byte_size, duration, printable
    from pipelines.window import span

    found = look(settings_of(obj), max_lag=span(max_lag) if max_lag else None)
    if output == "json":
        data = asdict(found)
        data["last_run"] = json.loads(found.last_run.to_json()) if found.last_run else None
        click.echo(json.dumps(data, indent=2, sort_keys=True, default=str))
    elif found.generation is None:
        click.echo(f"{found.alias}: nothing is published yet. Start with `catalog-embed run`.")
    else:
        held = f"  HELD: {found.reason or 'no reason given'}" if found.held else ""
        lines = [f"{found.alias}  {found.generation}  entry {found.seq}{held}"]
        lines += [
            f"  published  {found.published_at:%Y-%m-%d %H:%M} UTC, {found.live:,} products, {found.segments} segments, {byte_size(found.bytes)}"
        ]
        lines += [
            f"  watermark  {found.watermark:%Y-%m-%d %H:%M} UTC, in step {duration(max(found.lag_s or 0.0, 0.0))} ago{'  STALE' if found.stale else ''}"
        ]
        lines += [f"  tower      {found.tower[:12]}"]
        bad = sorted(name for name, verdict in (found.gates or {}).items() if verdict not in ("passed", "skipped"))
        lines += [f"  gates      {len(found.gates or {})} judged{', look at ' + ', '.join(bad) if bad else ', none warned'}"]
        lines += [f"  writing    {printable(item)}" for item in found.writing]
        if found.last_run is not None:
            last = found.last_run
            lines += [f"  last run   {last.run_id}  {last.command}  {last.outcome.replace('_', ' ')}  exit {last.exit_code}"]
        click.echo("\n".join(lines))
    sys.exit(STALE if found.stale else 0)


@cli.command(cls=Command)
@click.option("-n", "--last", type=click.IntRange(1, 10_000), default=20, show_default=True, help="How many.")
@output_option("text", "json")
@click.pass_obj
def runs(obj: dict[str, Any], last: int, output: str) -> None:
    """List the newest runs, oldest first."""
    from jobs.inspect import require_store
    from jobs.records import all_runs
    from pipelines.layout import took

    found = list(all_runs(require_store(settings_of(obj))).items())[-last:]
    if output == "json":
        click.echo(
            json.dumps(
                [json.loads(facts.to_json()) if facts else {"run_id": name, "outcome": "unknown"} for name, facts in found], indent=2
            )
        )
        return
    for name, facts in found:
        if facts is None:
            click.echo(f"{name}  left no state: it runs, or it was killed")
        else:
            made = f"{facts.base or '-'} -> {facts.generation or '-'}"
            click.echo(
                f"{name}  {facts.command:<8}  {facts.outcome.replace('_', ' '):<12}  exit {facts.exit_code:<2}  {made:<22}  {took(facts.seconds)}"
            )


@cli.command(cls=Command)
@output_option("text", "json")
@click.pass_obj
def generations(obj: dict[str, Any], output: str) -> None:
    """List every generation that was written whole, oldest first: live, published before, or a candidate."""
    from jobs.inspect import generations as listed

    found = list(listed(settings_of(obj)))
    if output == "json":
        rows = [{**json.loads(manifest.to_json()), "standing": standing} for manifest, standing in found]
        click.echo(json.dumps(rows, indent=2, sort_keys=True))
        return
    for manifest, standing in found:
        made = f"{manifest.created_at:%Y-%m-%d %H:%M} UTC"
        click.echo(f"{manifest.generation}  {made}  {manifest.counts['live']:>12,} products  tower {manifest.tower[:12]}  {standing}")


@cli.command(cls=Command)
@click.argument("before")
@click.argument("after")
@click.option("--sample", type=click.IntRange(0, 1000), default=5, show_default=True, metavar="N", help="Show up to N ids of each kind.")
@output_option("text", "json")
@click.pass_obj
def diff(obj: dict[str, Any], before: str, after: str, sample: int, output: str) -> None:
    """Show in which products two generations differ."""
    from jobs.inspect import compare
    from pipelines.layout import printable

    actions, ids = compare(settings_of(obj), before, after, limit=sample)
    if output == "json":
        click.echo(json.dumps({"before": before, "after": after, "actions": dict(actions), "ids": dict(ids)}, indent=2, sort_keys=True))
        return
    names = {"add": "+ only in the second", "text": "~ other text", "attr": ". other attributes", "delete": "- only in the first"}
    for action, called in names.items():
        shown = ", ".join(map(printable, ids[action]))
        click.echo(f"{called:<22} {actions[action]:>10,}{'   ' + shown if shown else ''}")


@cli.command(cls=Command)
@click.argument("query")
@click.option("-k", "--top", type=click.IntRange(1, 10_000), default=10, show_default=True, help="How many products.")
@click.option(
    "--where", default=None, metavar="FILTER", help="Only products that pass, such as \"price < 80 and brand in ('Acme', 'Nord')\"."
)
@click.option("--engine", type=click.Choice(["faiss", "lance"]), default="faiss", show_default=True, help="Which index answers.")
@click.option("--exact", is_flag=True, help="Compare every vector instead of asking an index.")
@click.option("--columns", default="", metavar="NAMES", help="Columns to show, with commas between. Default: all filter columns.")
@click.option("--generation", default=None, metavar="ID", help="Search this generation instead of the live one.")
@output_option("text", "json", "jsonl")
@click.pass_obj
def search(
    obj: dict[str, Any],
    query: str,
    top: int,
    where: str | None,
    engine: Any,
    columns: str,
    generation: str | None,
    output: str,
    *,
    exact: bool,
) -> None:
    """Search the live generation with its own query tower."""
    from jobs.inspect import reader
    from pipelines.layout import printable

    settings = settings_of(obj)
    chosen = [name.strip() for name in columns.split(",") if name.strip()] or list(settings.document.filters)
    with reader(settings, generation=generation) as opened:
        rows = opened.search(query, top, where=where, engine=engine, exact=exact, columns=chosen).to_pylist()
        name = opened.generation
    if output == "text":
        click.echo(f"{name}  {len(rows)} products")
        for row in rows:
            shown = "  ".join(f"{column}={row[column]}" for column in chosen if row[column] is not None)
            click.echo(f"  {row['score']:.4f}  {printable(row['id'])}  {printable(shown)}")
    else:
        items = [json.dumps({"generation": name, **row}, default=str, sort_keys=True) for row in rows]
        click.echo("\n".join(items) if output == "jsonl" else json.dumps([json.loads(item) for item in items], indent=2))


@cli.command(cls=Command)
@click.argument("product")
@click.pass_obj
def explain(obj: dict[str, Any], product: str) -> None:
    """Follow one product: row, text, hashes, parts, table row, segments, gates."""
    from jobs.inspect import trace
    from pipelines.layout import printable

    for step, found in trace(settings_of(obj), product, verbose=obj["verbose"] > 0):
        click.echo(f"{step:<14}  {printable(found)}")


@cli.command(cls=Command)
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
@click.option("--generation", default=None, metavar="ID", help="Export this generation instead of the live one.")
@click.pass_obj
def export(obj: dict[str, Any], directory: Path, generation: str | None) -> None:
    """Write one clean snapshot of a generation as Parquet into DIRECTORY, which must be new or empty."""
    from jobs.inspect import export_to

    name, rows = export_to(settings_of(obj), directory, generation=generation)
    click.echo(f"{name}: {rows:,} products in {directory}")
