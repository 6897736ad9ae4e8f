"""Doing the work: run, plan, apply, backfill, and its pause."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import click

from jobs.cli.group import (
    Command,
    asked,
    break_lease_option,
    cli,
    confirm,
    deletes_option,
    index_option,
    moment,
    now_option,
    output_option,
    progress_option,
    ray_option,
    say,
    settings_of,
    since_option,
    yes_option,
)

CHANGES_PRESENT = 3


@cli.command(cls=Command)
@since_option
@deletes_option
@click.option("--dry-run", is_flag=True, help="Only plan: show what would be done and write nothing.")
@click.option("--no-publish", is_flag=True, help="Build and judge the generation, and leave publishing to `publish`.")
@click.option("--reason", default="", metavar="TEXT", help="A note that the publish log keeps.")
@click.option(
    "--wait", default=None, metavar="SPAN", help="Wait so long, such as 1h, for a lease that another run holds. Default: exit 11 at once."
)
@index_option
@break_lease_option
@yes_option
@progress_option
@output_option("text", "json", "jsonl")
@ray_option
@now_option
@click.pass_obj
def run(
    obj: dict[str, Any],
    since: str,
    deletes: Any,
    *,
    dry_run: bool,
    no_publish: bool,
    reason: str,
    wait: str | None,
    index_spec: str | None,
    break_lease: bool,
    yes: bool,
    progress: Any,
    output: str,
    ray_address: str | None,
    now: str | None,
) -> None:
    """Bring the index in step with the catalog: plan, embed, index, validate, publish. The default command.

    Only what changed is paid for: a night without changes does no forward pass and publishes nothing. Killed, it leaves
    what is published untouched, and the same command goes on from the finished parts. While `rollback --hold` holds the
    alias, a run builds and says so, and publishes nothing.

    Exit codes: 0 published, or nothing to do, or built and held; 10 a gate failed and the candidate is kept; 11 another run holds the lease;
    12 a guard of the source tripped; 13 too many rows quarantined; 14 interrupted.
    """
    from dataclasses import replace

    from jobs.nightly import Night, run_night
    from pipelines.window import span

    settings = settings_of(obj, index_spec=index_spec, ray__address=ray_address)
    night = Night(since=since, deletes=deletes, now=moment(now), verbose=obj["verbose"] > 0, publish=not no_publish, reason=reason)
    night = replace(night, wait=span(wait)) if wait else night
    if dry_run:
        _only_plan(settings, night, output)
    if break_lease:
        _break_lease(settings, yes=yes)
    with _watched(obj, progress) as listeners:
        record = run_night(settings, _with(night, listeners))
    _end(record, output)


@cli.command(cls=Command)
@since_option
@deletes_option
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
@output_option("text", "json", "jsonl")
@click.option("--detailed-exitcode", is_flag=True, help="Exit 3 when the plan would change something, 0 only when there is nothing to do.")
@ray_option
@now_option
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
    from pipelines.planning import make_room, save
    from pipelines.report import plan_text

    night = Night(since=since, now=moment(now), deletes=deletes, verbose=obj["verbose"] > 0)
    settings = settings_of(obj, ray__address=ray_address)
    if out is not None:
        make_room(out)
    with planned(settings, night) as found:
        result = found.result
        if out is not None:
            save(result, out)
        samples = found.samples(sample) if sample else {}
        listed = {action: [{"id": name, "text": text} for name, text in items] for action, items in samples.items()}
        data = result.plan.to_json() | ({"samples": listed} if sample else {})
        say(data, plan_text(result.plan, explain=explain, samples=samples), output)
        code = result.plan.exit_code
        changed = result.plan.actions.changed
    sys.exit(code or (CHANGES_PRESENT if detailed_exitcode and changed else 0))


@cli.command(cls=Command)
@click.argument("directory", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--no-publish", is_flag=True, help="Build and judge the generation, and leave publishing to `publish`.")
@break_lease_option
@yes_option
@progress_option
@output_option("text", "json", "jsonl")
@ray_option
@click.pass_obj
def apply(
    obj: dict[str, Any],
    directory: Path,
    *,
    no_publish: bool,
    break_lease: bool,
    yes: bool,
    progress: Any,
    output: str,
    ray_address: str | None,
) -> None:
    """Carry out the plan that `plan --out DIRECTORY` saved.

    Refused when the catalog or the published generation has moved since the plan was made: plan again then.
    """
    from jobs.applying import apply_plan
    from jobs.nightly import Night

    settings = settings_of(obj, ray__address=ray_address)
    night = Night(verbose=obj["verbose"] > 0, publish=not no_publish, command="apply")
    if break_lease:
        _break_lease(settings, yes=yes)
    with _watched(obj, progress) as listeners:
        record = apply_plan(settings, _with(night, listeners), directory)
    _end(record, output)


@cli.command(cls=Command)
@click.option(
    "--where", default=None, metavar="FILTER", help="Published products that pass a filter, such as \"brand = 'Acme' and price < 80\"."
)
@click.option("--ids", default=None, metavar="IDS", help="These products: ids with commas between, or @FILE with one on each line.")
@click.option(
    "--from", "since", default=None, metavar="WHEN", help="Products updated at or after this: a date, ISO-8601, or a span such as 7d."
)
@click.option("--to", "until", default=None, metavar="WHEN", help="Products updated before this, in the same words. Default: now.")
@click.option(
    "--reason",
    default=None,
    metavar="WHY",
    shell_complete=lambda _, __, begun: [word for word in ("missing", "failed", "all") if word.startswith(begun)],
    help="missing: in the catalog and not in the index. failed: those of them that a run has quarantined; or for one reason, such as embed_killed. all: everything, again.",
)
@click.option(
    "--tower",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=None,
    metavar="DIR",
    help="Embed the whole catalog with another tower, beside the live index.",
)
@click.option(
    "--max-parallel",
    type=click.IntRange(1, 100_000),
    default=None,
    metavar="N",
    help="Embed with at most N actors, so that the rest of a cluster stays free.",
)
@click.option("--publish", "publish_it", is_flag=True, help="Publish the result at once. Without it, `publish` does.")
@click.option("--dry-run", is_flag=True, help="Only plan: show what would be made again and write nothing.")
@index_option
@break_lease_option
@yes_option
@progress_option
@output_option("text", "json", "jsonl")
@ray_option
@now_option
@click.pass_obj
def backfill(
    obj: dict[str, Any],
    where: str | None,
    ids: str | None,
    since: str | None,
    until: str | None,
    reason: Any,
    tower: Path | None,
    max_parallel: int | None,
    *,
    publish_it: bool,
    dry_run: bool,
    index_spec: str | None,
    break_lease: bool,
    yes: bool,
    progress: Any,
    output: str,
    ray_address: str | None,
    now: str | None,
) -> None:
    """Make the vectors of some products again, or fill in what is missing. Publishes only with --publish.

    Nothing is deleted, and the watermark stays: the next run reads what it would have read. With --tower the new space
    grows beside the live one, and only `publish` switches; started again, it embeds what has changed since.

    Runs that publish go first: while one writes, a backfill gives its actors back and waits; `pause` and `resume` do the same by
    hand, and `status --watch` shows from any terminal how far it is. Killed, the same command goes on from the finished parts.
    """
    from jobs.backfill import Choice, chosen, run_backfill
    from jobs.nightly import Night

    settings = settings_of(obj, index_spec=index_spec, ray__address=ray_address)
    choice = Choice(where=where, ids=_ids(ids), since=since, until=until, reason=reason, tower=tower)
    plain = Night(now=moment(now), verbose=obj["verbose"] > 0, publish=publish_it, command="backfill", max_parallel=max_parallel)
    night = chosen(settings, choice, plain)
    if dry_run:
        _only_plan(settings, night, output)
    if break_lease:
        _break_lease(settings, yes=yes, tower=tower, ahead=True)
    with _watched(obj, progress) as listeners:
        record = run_backfill(settings, _with(night, listeners))
    if choice.ids and record.ran is not None and (absent := len(set(choice.ids)) - record.ran.plan.actions.changed) > 0:
        click.echo(f"{absent:,} of the {len(set(choice.ids)):,} ids have no live row in the catalog", err=True)
    _end(record, output)


def _only_plan(settings: Any, night: Any, output: str) -> NoReturn:
    """Show what a night would do."""
    from jobs.nightly import planned
    from pipelines.report import plan_text

    with planned(settings, night) as found:
        plan = found.result.plan
        say(plan.to_json(), plan_text(plan), output)
        sys.exit(plan.exit_code)


def _break_lease(settings: Any, *, yes: bool, tower: Path | None = None, ahead: bool = False) -> None:
    """End a lease that another run holds."""
    from jobs.releasing import end_lease

    if asked(yes=yes):
        confirm("End the lease? A run that still holds it can then not publish.")
    entry = end_lease(settings, tower=tower, ahead=ahead)
    click.echo(f"ended the lease of run {entry.run_id} ({entry.holder})" if entry else "no run held the lease", err=True)


def _ids(given: str | None) -> tuple[str, ...]:
    """Read ids from the command line, or from a file."""
    if given is None:
        return ()
    if not given.startswith("@"):
        found = tuple(item.strip() for item in given.split(",") if item.strip())
    else:
        try:
            found = tuple(line.strip() for line in Path(given[1:]).read_text(encoding="utf-8").splitlines() if line.strip())
        except (OSError, UnicodeDecodeError) as error:
            raise click.UsageError(f"--ids {given}: cannot read the file: {error}.") from error
    if not found:
        raise click.UsageError("--ids names no product.")
    return found


@contextmanager
def _watched(obj: dict[str, Any], mode: Any) -> Iterator[list[Any]]:
    """Show progress while the block runs, and keep Ray's native lines off the screen unless they were asked for."""
    from contextlib import nullcontext

    from jobs.cluster import natives_silenced
    from jobs.progress import observing

    with natives_silenced() if not obj["verbose"] else nullcontext(), observing(mode, quiet=obj["quiet"]) as listener:
        yield [listener]


def _with(night: Any, listeners: list[Any]) -> Any:
    from dataclasses import replace

    return replace(night, listeners=tuple(listeners))


def _end(record: Any, output: str) -> None:
    """Print what a run came to, and exit as it did."""
    from pipelines.gates import failed, gates_text
    from pipelines.report import plan_text
    from pipelines.summary import summary_text

    text = summary_text(record.facts)
    ran = record.ran
    if ran is not None and ran.guards:
        text = plan_text(ran.plan) + text
    if ran is not None and failed(ran.gates):
        text += gates_text(failed(ran.gates))
    say(json.loads(record.facts.to_json()), text, output)
    sys.exit(record.facts.exit_code)


@cli.command(cls=Command)
@click.option("--no-publish", is_flag=True, help="Build and judge the generation, and leave publishing to `publish`.")
@index_option
@progress_option
@output_option("text", "json", "jsonl")
@click.pass_obj
def rebuild(obj: dict[str, Any], index_spec: str | None, progress: Any, output: str, *, no_publish: bool) -> None:
    """Make the live generation's table and index anew from the vector log, and publish them.

    For a table or a segment that is damaged or lost, and for another kind of index at once. No text is embedded and the catalog is not read; every part of the
    log is verified. The content stays the same. Exits 10 when a gate fails.
    """
    from jobs.nightly import Night
    from jobs.rebuilding import rebuild_live

    settings = settings_of(obj, index_spec=index_spec)
    with _watched(obj, progress) as listeners:
        record = rebuild_live(settings, _with(Night(publish=not no_publish, command="rebuild"), listeners))
    _end(record, output)


@cli.command(cls=Command)
@click.argument("run_id", required=False, metavar="[RUN]")
@click.option("--reason", default="", metavar="TEXT", help="What others shall read.")
@click.pass_obj
def pause(obj: dict[str, Any], run_id: str | None, reason: str) -> None:
    """Let a backfill finish the parts in flight, give its actors back, and wait. Default: the one that works now."""
    from jobs.inspect import require_store
    from jobs.watching import pause_backfill

    one = pause_backfill(require_store(settings_of(obj)), run_id, reason=reason)
    click.echo(f"{one} stops after the parts in flight; `catalog-embed resume` lets it go on")


@cli.command(cls=Command)
@click.argument("run_id", required=False, metavar="[RUN]")
@click.pass_obj
def resume(obj: dict[str, Any], run_id: str | None) -> None:
    """Let a paused backfill go on. Default: the one that is paused."""
    from jobs.inspect import require_store
    from jobs.watching import resume_backfill

    click.echo(f"{resume_backfill(require_store(settings_of(obj)), run_id)} goes on")
