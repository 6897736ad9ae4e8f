"""Moving the alias and cleaning up: validate, publish, rollback, gc."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from jobs.cli.group import Command, cli, output_option, settings_of


@cli.command(cls=Command)
@click.argument("generation", required=False)
@output_option("text", "json")
@click.pass_obj
def validate(obj: dict[str, Any], generation: str | None, output: str) -> None:
    """Read a generation back, measure it again and judge it by today's limits. Default: the live one. Exits 10 when a gate fails."""
    from jobs.releasing import validate as judged
    from pipelines.gates import GATE_FAILED, failed, gates_text, to_json

    name, gates = judged(settings_of(obj), generation)
    if output == "json":
        click.echo(json.dumps({"generation": name, **json.loads(to_json(gates))}, indent=2, sort_keys=True))
    else:
        click.echo(f"{name}\n{gates_text(gates)}", nl=False)
    sys.exit(GATE_FAILED if failed(gates) else 0)


@cli.command(cls=Command)
@click.argument("generation")
@click.option("--reason", default="", metavar="TEXT", help="A note that the publish log keeps.")
@click.option("--release-hold", is_flag=True, help="Publish although the alias is held, and end the hold.")
@click.pass_obj
def publish(obj: dict[str, Any], generation: str, reason: str, *, release_hold: bool) -> None:
    """Make a candidate live. Refused when a gate failed, or when the alias has moved since it was built."""
    from jobs.releasing import publish_candidate

    entry = publish_candidate(settings_of(obj), generation, reason=reason, release_hold=release_hold)
    click.echo(f"{entry.generation} is live as entry {entry.seq}")


@cli.command(cls=Command)
@click.option("--to", default=None, metavar="ID", help="The generation to go back to. Default: the one that was live before.")
@click.option("--hold", is_flag=True, help="Keep it there: runs build, but none publishes until `publish --release-hold`.")
@click.option("--reason", default="", metavar="TEXT", help="A note that the publish log keeps.")
@click.pass_obj
def rollback(obj: dict[str, Any], to: str | None, reason: str, *, hold: bool) -> None:
    """Make the previous generation live again, in a second. Nothing is rebuilt and nothing is removed."""
    from jobs.releasing import roll_back

    entry = roll_back(settings_of(obj), to=to, hold=hold, reason=reason)
    click.echo(f"{entry.generation} is live as entry {entry.seq}{', held' if entry.hold else ''}")


@cli.command(cls=Command)
@click.option("--apply", "apply_it", is_flag=True, help="Remove it. Without this, only show what would go.")
@click.option("--keep", type=click.IntRange(1), default=None, help="How many published generations stay. Default: `publish: keep`.")
@click.option("--grace", default=None, metavar="SPAN", help="Nothing younger is removed. Default: `publish: grace`.")
@output_option("text", "json")
@click.pass_obj
def gc(obj: dict[str, Any], keep: int | None, grace: str | None, output: str, *, apply_it: bool) -> None:
    """Show what no alias, pin, reader or listed generation needs, and remove it with --apply."""
    from jobs.releasing import collect
    from pipelines.layout import byte_size
    from pipelines.retention import gc_text
    from pipelines.window import span

    found = collect(settings_of(obj), apply=apply_it, keep=keep, grace=span(grace) if grace else None)
    if output == "json":
        click.echo(json.dumps({**found.plan.to_json(), "applied": found.removed is not None}, indent=2, sort_keys=True, default=str))
        return
    click.echo(gc_text(found.plan), nl=False)
    if found.removed is None:
        click.echo("nothing was removed: say `gc --apply` to remove it")
    else:
        done = found.removed
        click.echo(
            f"removed {done.generations} generations, {done.objects} objects, {byte_size(done.bytes)}, {done.table_versions} table versions"
        )
