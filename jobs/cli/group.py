"""The root of the command line, and what its commands share. The only home of click, with its siblings."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

RUN = "run"
_RAY = "ray.address"


class Group(click.Group):
    """`run` is what happens when no subcommand is named; a misplaced option is answered with its place."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Send what follows the group's own options to `run`, unless a subcommand is named."""
        return super().parse_args(ctx, self._with_run(ctx, args))

    def _with_run(self, ctx: click.Context, args: list[str]) -> list[str]:
        place = _skip(self, args)
        rest = args[place:]
        if any(item in ("-h", "--help", "--version") for item in args[:place] + rest[:1]):
            return args
        if ctx.resilient_parsing and not rest:  # a shell that completes the first word: it may become any command
            return args
        if rest and not rest[0].startswith("-"):
            return args
        run = self.commands[RUN]
        behind = _skip(run, rest)
        if behind == len(rest):
            return [*args[:place], RUN, *rest]
        found = rest[behind]
        if not found.startswith("-") and found in self.commands and behind:
            advice = f"`{rest[0]}` is an option of `{RUN}` and stands before the subcommand `{found}`. Write `catalog-embed {found} ...` with the options of `{found}` behind it."
            raise click.UsageError(advice, ctx=ctx)
        option = found.split("=", 1)[0]
        owners = [name for name, command in self.commands.items() if name != RUN and any(option in item.opts for item in command.params)]
        if found.startswith("-") and owners:
            raise click.UsageError(f"`{option}` belongs behind a subcommand: `catalog-embed {owners[0]} {option} ...`.", ctx=ctx)
        return [*args[:place], RUN, *rest]

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete commands, and options of the group and of `run`, which stand in the same place."""
        run = self.commands[RUN]
        return [*super().shell_complete(ctx, incomplete), *run.shell_complete(click.Context(run, parent=ctx), incomplete)]


def _skip(command: click.Command, args: Sequence[str]) -> int:
    """Return how many of the arguments are options of a command, with their values."""
    options = {name: item for item in command.params if isinstance(item, click.Option) for name in (*item.opts, *item.secondary_opts)}
    place = 0
    while place < len(args):
        name, equals, _ = args[place].partition("=")
        short = name[:2] if name.startswith("-") and not name.startswith("--") else name
        item = options.get(name) or options.get(short)
        if item is None:
            return place
        takes_value = not (item.is_flag or item.count) and not equals and short == name
        place += 2 if takes_value else 1
    return min(place, len(args))


class Command(click.Command):
    """Says where an option belongs that stands behind the subcommand."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse, and answer a misplaced option with its place."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if not any(error.option_name in item.opts for item in cli.params):
                raise
            advice = f"`{error.option_name}` belongs before the subcommand: `catalog-embed {error.option_name} ... {self.name}`."
            raise click.UsageError(advice, ctx=ctx) from error


@click.group(
    cls=Group, context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "CATALOG_EMBED", "max_content_width": 110}
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

    A plan is the difference between a catalog and the published generation. A run carries the plan out, and either
    publishes a new generation whole, or leaves the old one untouched. Without a subcommand this is `run`.

    \b
    Start here:
      catalog-embed init shop                        a project with a sample catalog
      catalog-embed -c shop/catalog-embed.yaml plan  what a run would do; writes nothing
      catalog-embed -c shop/catalog-embed.yaml       the run itself; repeat it every night
      catalog-embed -c shop/catalog-embed.yaml search "waterproof jacket"

    \b
    Exit codes:
      0  done, or nothing to do          10  built, a gate failed, not published
      1  error                           11  another run was first
      2  wrong usage or configuration    12  a guard of the source tripped
      3  changes present                 13  too many rows quarantined
         (plan --detailed-exitcode)      14  interrupted; start it again

    Every option can be set in the environment: CATALOG_EMBED_PLAN_SINCE for `plan --since`, and
    CATALOG_EMBED_SOURCE__PATH for `source: path` of the configuration. The command line wins.

    \b
    Completion of commands and options (bash; zsh_source and fish_source do the same there):
      eval "$(_CATALOG_EMBED_COMPLETE=bash_source catalog-embed)"
    """
    from jobs import logs

    logs.set_up(-1 if quiet else verbose)
    ctx.obj = {"config": config, "target": target, "verbose": verbose, "quiet": quiet}


def config_path(obj: dict[str, Any]) -> Path:
    """Return the configuration that was named, or the one in this folder."""
    given: Path | None = obj["config"]
    return given or Path("catalog-embed.yaml")


def settings_of(obj: dict[str, Any], *, index_spec: str | None = None, **overrides: Any) -> Any:
    """Load the project's settings, with what this command overrides."""
    from jobs.settings import load, with_index

    named = {name.replace("__", "."): value for name, value in overrides.items()}
    if _RAY in named:
        named["ray.insecure"] = obj.get("insecure")
    settings = load(config_path(obj), target=obj["target"], overrides=named)
    if _RAY in named and settings.ray.address.startswith(("http://", "https://")):
        from jobs.cli.remote import send

        sys.exit(send(settings, obj))
    return settings if index_spec is None else with_index(settings, index_spec)


class GenerationId(click.ParamType[str]):
    """The id of a generation, checked before anything is opened: it becomes part of a path."""

    name = "generation"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the id as it is."""
        if not _GENERATION.fullmatch(str(value)):
            self.fail(f"{str(value)[:40]!r} is no generation id, such as g000042. `catalog-embed generations` lists them.", param, ctx)
        return str(value)


GENERATION = GenerationId()
_GENERATION = re.compile("g[0-9]{6,15}")


def asked(*, yes: bool) -> bool:
    """Return whether a person sits at a terminal who wants to be asked before something goes; a scheduler is not."""
    return not yes and sys.stdin.isatty()


def confirm(question: str) -> None:
    """Ask. A no ends the command."""
    if not click.confirm(question, err=True):
        click.echo("nothing was done", err=True)
        sys.exit(1)


def say(data: Any, text: str, output: str) -> None:
    """Print one thing as text, as JSON, or as a line of JSON; of a list, every item has a line of its own."""
    if output == "text":
        click.echo(text, nl=False)
    elif output == "jsonl" and isinstance(data, list):
        click.echo("".join(f"{_json(item)}\n" for item in data), nl=False)
    else:
        click.echo(_json(data, indent=2 if output == "json" else None))


def _json(data: Any, *, indent: int | None = None) -> str:
    return json.dumps(data, indent=indent, sort_keys=True, ensure_ascii=True, default=_plain)


def _plain(value: Any) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)


def moment(text: str | None, *, option: str = "--now") -> datetime | None:
    """Read a time with its zone."""
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise click.UsageError(f"{option} `{text}` is no ISO-8601 time. Write 2026-11-03T02:00+01:00.") from error
    if moment.tzinfo is None:
        raise click.UsageError(f"{option} `{text}` has no zone. Write 2026-11-03T02:00+01:00.")
    return moment


def output_option(*forms: str) -> Callable[[Any], Any]:
    """Make the option that chooses between text for people and JSON for programs."""
    return click.option(
        "--output",
        type=click.Choice(list(forms)),
        default="text",
        show_default=True,
        help=f"text for people, json for programs{', jsonl for one line each' if 'jsonl' in forms else ''}.",
    )


def ray_option(command: Any) -> Any:
    """Let a command say which cluster works for it."""
    insecure = click.option(
        "--insecure-cluster",
        is_flag=True,
        default=None,
        expose_value=False,
        callback=lambda ctx, _, given: ctx.find_root().obj.update(insecure=given) if given else None,
        help="Use a cluster that is not on loopback although it does not ask for a token.",
    )
    address = click.option(
        "--ray-address",
        default=None,
        metavar="ADDRESS",
        help="local (a private cluster for this command), auto or host:port (from a node of the cluster), or http://host:8265: the same command as a job there, with this code and configuration. ray:// (Ray Client) is refused.",
    )
    return address(insecure(command))


now_option = click.option(
    "--now", default=None, metavar="ISO", help="Do as if it were this moment, with zone: for tests and for looking at a past night."
)
since_option = click.option(
    "--since",
    default="last",
    show_default=True,
    metavar="WHEN",
    help="Read rows updated since: last (the published watermark), beginning, yesterday, today, 36h, 2d, 1w, a date, or ISO-8601. Days begin in the configured zone; `plan: lookback` is subtracted.",
)
deletes_option = click.option(
    "--deletes",
    type=click.Choice(["auto", "tombstones", "scan", "off"]),
    default=None,
    help="How vanished products are found. auto: absence in a whole read, a scan of all ids beside a narrow one. Default: the configuration's.",
)
index_option = click.option(
    "--index-spec",
    default=None,
    metavar="FACTORY",
    help="The FAISS index to build, such as IVF1024,RaBitQfs,Refine(SQ8) or Flat, for this command. Default: the configuration's, chosen from its budget.",
)
break_lease_option = click.option(
    "--break-lease", is_flag=True, help="End the lease of the run that holds it, which can then not publish. For a run that is dead."
)
yes_option = click.option("--yes", is_flag=True, help="Do not ask at a terminal.")
progress_option = click.option(
    "--progress",
    type=click.Choice(["auto", "rich", "plain", "json", "none"]),
    default="auto",
    show_default=True,
    help="How progress is shown on stderr. auto draws bars on a terminal and writes plain lines elsewhere.",
)
