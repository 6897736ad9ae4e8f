"""The command line: thin calls of functions that Python users can call too. The only home of click; engines load inside commands."""

from __future__ import annotations

import json
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import click

INTERRUPTED = 14
CHANGES_PRESENT = 3

_VERBOSE_FOR_TRACEBACK = 2


class _Group(click.Group):
    """Says where an option belongs that stands before the subcommand."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            owners = [name for name, command in self.commands.items() if any(error.option_name in item.opts for item in command.params)]
            if not owners:
                raise
            advice = f"`{error.option_name}` belongs behind a subcommand: `catalog-embed {owners[0]} {error.option_name} ...`."
            raise click.UsageError(advice, ctx=ctx) from error


class _Command(click.Command):
    """Says where an option belongs that stands behind the subcommand."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if not any(error.option_name in item.opts for item in cli.params):
                raise
            advice = f"`{error.option_name}` belongs before the subcommand: `catalog-embed {error.option_name} ... {self.name}`."
            raise click.UsageError(advice, ctx=ctx) from error


@click.group(
    cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "CATALOG_EMBED", "max_content_width": 110}
)
@click.option(
    "-c",
    "--config",
    "config",
    type=click.Path(path_type=Path, dir_okay=False),
    default=None,
    metavar="FILE",
    help="The project's configuration. Default: ./catalog-embed.yaml.",
)
@click.option("--target", metavar="NAME", help="Use this entry of `targets:` in the configuration, such as dev or prod.")
@click.option("-v", "--verbose", count=True, help="Tell more on stderr; -vv adds tracebacks to errors.")
@click.option("-q", "--quiet", is_flag=True, help="Tell only what is wrong.")
@click.version_option(package_name="catalog-embed", prog_name="catalog-embed")
@click.pass_context
def cli(ctx: click.Context, config: Path | None, target: str | None, verbose: int, *, quiet: bool) -> None:
    """Keep a product-embedding index in step with a catalog.

    A plan is the difference between a catalog and the published generation. This version makes projects and plans;
    embedding, indexing and publishing build on them.

    \b
    Start here:
      catalog-embed init shop                        a project with a sample catalog
      catalog-embed -c shop/catalog-embed.yaml plan  what a run would do; writes nothing

    \b
    Exit codes:
      0  done, or nothing to do          11  another run was first
      1  error                           12  a guard of the source tripped
      2  wrong usage or configuration    13  too many rows quarantined
      3  changes present                 14  interrupted; start it again
         (plan --detailed-exitcode)

    Every option can be set in the environment: CATALOG_EMBED_PLAN_SINCE for `plan --since`, and
    CATALOG_EMBED_SOURCE__PATH for `source: path` of the configuration. The command line wins.
    """
    from jobs import logs

    logs.set_up(-1 if quiet else verbose)
    ctx.obj = {"config": config, "target": target, "verbose": verbose}


@cli.command(cls=_Command)
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--products",
    type=click.IntRange(1, 1_000_000_000),
    default=5000,
    show_default=True,
    help="How many products the sample catalog has on its first day.",
)
@click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=7, show_default=True, help="The same seed makes the same catalog, byte for byte."
)
@click.option(
    "--night",
    type=click.IntRange(0, 10_000),
    default=None,
    help="Make the catalog as it is after this many nights of edits, price changes, new and vanished products. On a project that is there, only the sample catalog is replaced.",
)
def init(directory: Path, products: int, seed: int, night: int | None) -> None:
    """Make a project in DIRECTORY, with a sample catalog.

    The project is a configuration, a Parquet catalog in three languages, and queries with grades that are derived from
    the products' attributes. A project that is there is left as it is, unless --night moves its sample catalog.
    """
    from jobs.project import make_project
    from pipelines.sample.spec import SampleSpec

    made = make_project(directory, spec=SampleSpec(seed=seed, products=products), night=night)
    if made.products_from_night is None:
        click.echo(f"{directory} is a project already; nothing was changed. `--night 1` moves its sample catalog to the next night.")
        return
    click.echo(
        f"{directory}: sample catalog of {made.spec.products:,} products as of night {made.products_from_night} (seed {made.spec.seed})"
    )
    click.echo(f"next: catalog-embed -c {shlex.quote(str(directory / 'catalog-embed.yaml'))} plan --since beginning")


@cli.command(cls=_Command)
@click.option(
    "--since",
    default="last",
    show_default=True,
    metavar="WHEN",
    help="Read rows updated since: last (the published watermark), beginning, yesterday, today, 36h, 2d, 1w, a date, or ISO-8601. Days begin in the configured zone; `plan: lookback` is subtracted.",
)
@click.option(
    "--deletes",
    type=click.Choice(["auto", "tombstones", "scan", "off"]),
    default=None,
    help="How vanished products are found. auto: absence in a whole read, a scan of all ids beside a narrow one. Default: the configuration's.",
)
@click.option(
    "--explain", is_flag=True, help="Show where every number comes from: reasons of rejects and repairs, guards, template, deletes."
)
@click.option(
    "--sample",
    type=click.IntRange(0, 1000),
    default=0,
    metavar="N",
    help="Show up to N products for each action, with the text that the tower would read. Reads the window once more.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=None,
    metavar="DIR",
    help="Save the plan here: plan.json, changes.parquet, quarantine.parquet. The folder must be new or empty.",
)
@click.option(
    "--output",
    type=click.Choice(["text", "json", "jsonl"]),
    default="text",
    show_default=True,
    help="text for people, json for programs, jsonl for one line a run.",
)
@click.option("--detailed-exitcode", is_flag=True, help="Exit 3 when the plan would change something, 0 only when there is nothing to do.")
@click.option(
    "--ray-address", default=None, metavar="ADDRESS", help="local (a private cluster for this command), auto, host:port or ray://host:port."
)
@click.option(
    "--now", default=None, metavar="ISO", help="Plan as if it were this moment, with zone: for tests and for looking at a past night."
)
@click.pass_obj
def plan(
    obj: dict[str, Any],
    since: str,
    deletes: Any,
    *,
    explain: bool,
    sample: int,
    out: Path | None,
    output: str,
    detailed_exitcode: bool,
    ray_address: str | None,
    now: str | None,
) -> None:
    """Show what a run would do, and whether its guards would let it. Nothing is written but --out.

    Reads the catalog (all of it, or the rows that --since asks for), normalises and renders it, and compares hashes
    with the published generation. --since narrows what is read; the hashes decide what changed.

    Exit codes: 0; 3 with --detailed-exitcode when something would change; 12 when a guard of the source trips
    (completeness, freshness, deletes, duplicates); 13 when too many rows are quarantined.
    """
    from jobs.nightly import Night, planned
    from jobs.settings import load
    from pipelines.generation import make_room, save
    from pipelines.report import plan_text

    night = Night(since=since, now=_moment(now), deletes=deletes, verbose=obj["verbose"] > 0)
    settings = load(_config(obj), target=obj["target"], overrides={"ray.address": ray_address})
    if out is not None:
        make_room(out)
    with planned(settings, night) as found:
        result = found.result
        if out is not None:
            save(result, out)
        samples = found.samples(sample) if sample else {}
        if output == "text":
            click.echo(plan_text(result.plan, explain=explain, samples=samples), nl=False)
        else:
            listed = {action: [{"id": name, "text": text} for name, text in items] for action, items in samples.items()}
            data = result.plan.to_json() | ({"samples": listed} if sample else {})
            click.echo(json.dumps(data, indent=2 if output == "json" else None, sort_keys=True, ensure_ascii=True))
        code = result.plan.exit_code
        changed = result.plan.actions.changed
    sys.exit(code or (CHANGES_PRESENT if detailed_exitcode and changed else 0))


@cli.command(cls=_Command)
@click.option(
    "--output", type=click.Choice(["text", "json"]), default="text", show_default=True, help="text for people, json for programs."
)
@click.pass_obj
def doctor(obj: dict[str, Any], output: str) -> None:
    """Check the machine, the source and the store, and print every setting with its value and origin.

    The store is probed: one object is written twice with put-if-absent and removed. Secrets are masked. Exits 1 when
    a check fails.
    """
    from jobs.doctor import examine
    from jobs.settings import load
    from pipelines.report import printable

    settings = load(_config(obj), target=obj["target"])
    rows = list(settings.describe())
    checks = list(examine(settings))
    if output == "json":
        listed = [{"key": key, "value": value, "origin": origin} for key, value, origin in rows]
        click.echo(json.dumps({"settings": listed, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        width = max(len(key) for key, _, _ in rows)
        for key, value, origin in rows:
            click.echo(printable(f"{key:<{width}}  {value}  ({origin})"))
        click.echo("")
        for check in checks:
            click.echo(printable(f"{'ok    ' if check.passed else 'FAILED'}  {check.name:<10} {check.found}"))
    sys.exit(0 if all(check.passed for check in checks) else 1)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line; turn errors into one line that says what to do, and into exit codes."""
    # Lance warns on its own logger; the messages speak of its internals.
    os.environ.setdefault("LANCE_LOG", "error")
    given = list(sys.argv[1:] if arguments is None else arguments)
    verbose = sum(item.count("v") for item in given if item.startswith("-v") and set(item[1:]) == {"v"}) + given.count("--verbose")
    try:
        cli.main(args=given, prog_name="catalog-embed", standalone_mode=False)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted; nothing was published. Start the command again.", err=True)
        sys.exit(INTERRUPTED)
    except Exception as error:  # noqa: BLE001  the last resort: no traceback unless asked for
        sys.exit(_told(error, show_traceback=verbose >= _VERBOSE_FOR_TRACEBACK))
    sys.exit(0)


def _told(error: Exception, *, show_traceback: bool) -> int:
    """Say on stderr what failed, and return the exit code of its class."""
    from pipelines.errors import CatalogEmbedError
    from pipelines.report import printable

    if show_traceback:
        traceback.print_exception(error)
    if isinstance(error, CatalogEmbedError):
        click.echo(f"error: {printable(str(error))}", err=True)
        return error.exit_code
    told = "\n".join(printable(line) for line in f"{type(error).__name__}: {error}".splitlines())
    click.echo(f"error: {told}\nThis was not foreseen. Run again with -vv and report it.", err=True)
    return 1


def _config(obj: dict[str, Any]) -> Path:
    given: Path | None = obj["config"]
    return given or Path("catalog-embed.yaml")


def _moment(text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise click.UsageError(f"--now `{text}` is no ISO-8601 time. Write 2026-11-03T02:00+01:00.") from error
    if moment.tzinfo is None:
        raise click.UsageError(f"--now `{text}` has no zone. Write 2026-11-03T02:00+01:00.")
    return moment


if __name__ == "__main__":
    main()
