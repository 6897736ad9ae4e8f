"""Moving the alias and cleaning up: validate, publish, rollback, pin, unpin, gc."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

import click

from jobs.cli.group import GENERATION, Command, asked, cli, confirm, output_option, say, settings_of, yes_option


@cli.command(cls=Command)
@click.argument("generation", required=False, type=GENERATION)
@output_option("text", "json", "jsonl")
@click.pass_obj
def validate(obj: dict[str, Any], generation: str | None, output: str) -> None:
    """Read a generation back, measure it again and judge it by today's limits. Default: the live one. Exits 10 when a gate fails."""
    from jobs.releasing import validate as judged
    from pipelines.gates import GATE_FAILED, failed, gates_text, to_json

    name, gates = judged(settings_of(obj), generation)
    say({"generation": name, **json.loads(to_json(gates))}, f"{name}\n{gates_text(gates)}", output)
    sys.exit(GATE_FAILED if failed(gates) else 0)


@cli.command(cls=Command)
@click.argument("generation", type=GENERATION)
@click.option("--reason", default="", metavar="TEXT", help="A note that the publish log keeps.")
@click.option("--release-hold", is_flag=True, help="Publish although the alias is held, and end the hold.")
@output_option("text", "json", "jsonl")
@click.pass_obj
def publish(obj: dict[str, Any], generation: str, reason: str, output: str, *, release_hold: bool) -> None:
    """Make a candidate live. Refused when a gate failed, or when the alias has moved since it was built.

    The live generation itself, with --release-hold, ends a hold and changes nothing else.
    """
    from jobs.releasing import other_tower, publish_candidate
    from pipelines.errors import CatalogEmbedError

    settings = settings_of(obj)
    entry = publish_candidate(settings, generation, reason=reason, release_hold=release_hold)
    say(asdict(entry), f"{entry.generation} is live as entry {entry.seq}{', held' if entry.hold else ''}\n", output)
    try:
        note = other_tower(settings, generation)
    except CatalogEmbedError as error:
        note = f"{generation} is live; which tower the next run uses could not be looked at: {error}"
    if note:
        click.echo(f"note: {note}", err=True)


@cli.command(cls=Command)
@click.option("--to", default=None, type=GENERATION, help="The generation to go back to. Default: the one that was live before.")
@click.option("--hold", is_flag=True, help="Keep it there: runs build, but none publishes until `publish --release-hold`.")
@click.option("--reason", default="", metavar="TEXT", help="A note that the publish log keeps.")
@output_option("text", "json", "jsonl")
@click.pass_obj
def rollback(obj: dict[str, Any], to: str | None, reason: str, output: str, *, hold: bool) -> None:
    """Make the previous generation live again, in a second. Nothing is rebuilt and nothing is removed."""
    from jobs.releasing import roll_back

    entry = roll_back(settings_of(obj), to=to, hold=hold, reason=reason)
    say(asdict(entry), f"{entry.generation} is live as entry {entry.seq}{', held' if entry.hold else ''}\n", output)


@cli.command(cls=Command)
@click.argument("generation", type=GENERATION)
@click.option("--reason", default="", metavar="TEXT", help="Why it is kept; `generations` shows it.")
@click.pass_obj
def pin(obj: dict[str, Any], generation: str, reason: str) -> None:
    """Keep a generation from `gc`, whatever its age, until `unpin`."""
    from jobs.releasing import keep
    from pipelines.layout import printable

    pinned = keep(settings_of(obj), generation, reason=reason)
    click.echo(printable(f"{pinned.generation} is pinned by {pinned.by}"))


@cli.command(cls=Command)
@click.argument("generation", type=GENERATION)
@click.pass_obj
def unpin(obj: dict[str, Any], generation: str) -> None:
    """Leave a pinned generation to its age again."""
    from jobs.releasing import let_go

    click.echo(f"{generation} {'is pinned no longer' if let_go(settings_of(obj), generation) else 'was not pinned'}")


@cli.command(cls=Command)
@click.option("--apply", "apply_it", is_flag=True, help="Remove it. Without this, only show what would go.")
@click.option("--dry-run", is_flag=True, help="Only show what would go, which is the default.")
@click.option("--keep", type=click.IntRange(1), default=None, help="How many published generations stay. Default: `publish: keep`.")
@click.option("--grace", default=None, metavar="SPAN", help="Nothing younger is removed. Default: `publish: grace`.")
@yes_option
@output_option("text", "json", "jsonl")
@click.pass_obj
def gc(obj: dict[str, Any], keep: int | None, grace: str | None, output: str, *, apply_it: bool, dry_run: bool, yes: bool) -> None:
    """Show what no alias, pin, reader or listed generation needs, and remove it with --apply."""
    from jobs.releasing import collect
    from pipelines.layout import byte_size
    from pipelines.retention import gc_text
    from pipelines.window import span

    if apply_it and dry_run:
        raise click.UsageError("--apply removes and --dry-run only shows. Give one of them.")
    settings, age = settings_of(obj), span(grace) if grace else None
    if apply_it and asked(yes=yes):
        click.echo(gc_text(collect(settings, apply=False, keep=keep, grace=age).plan), nl=False, err=True)
        confirm("Remove this?")
    found = collect(settings, apply=apply_it, keep=keep, grace=age)
    text = gc_text(found.plan)
    done = found.removed
    if done is None:
        text += "nothing was removed: say `gc --apply` to remove it\n"
    else:
        text += f"removed {done.generations} generations, {done.objects} objects, {byte_size(done.bytes)}, {done.table_versions} table versions\n"
    say({**found.plan.to_json(), "applied": done is not None, "removed": asdict(done) if done else None}, text, output)
