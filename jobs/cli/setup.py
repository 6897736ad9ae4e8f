"""Setting up: init, doctor, schedule."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from jobs.cli.group import Command, cli, config_path, output_option, settings_of, since_option


@cli.command(cls=Command)
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


@cli.command(cls=Command)
@click.option("--calibrate", is_flag=True, help="Try anew how the tower runs fastest here, instead of taking what is kept.")
@output_option("text", "json")
@click.pass_obj
def doctor(obj: dict[str, Any], calibrate: bool, output: str) -> None:
    """Check the machine, the source and the store, and print every setting with its value and origin.

    The store is probed: one object is written twice with put-if-absent and removed. The tower is tried for some seconds,
    once for each machine, and the pace that suits it is kept for the runs there. Secrets are masked. Exits 1 when a
    check fails.
    """
    from jobs.doctor import examine
    from pipelines.layout import printable

    settings = settings_of(obj)
    rows = list(settings.describe())
    checks = list(examine(settings, fresh=calibrate))
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


@cli.command(cls=Command)
@click.option(
    "--to", type=click.Choice(["kuberay", "cron", "airflow", "dagster"]), required=True, help="Which scheduler starts the nightly run."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=None,
    metavar="DIR",
    help="Write the files here: a folder that is new, empty, or as this command left it. Without it, the one file of cron, airflow and dagster is printed.",
)
@click.option("--at", default="0 2 * * *", show_default=True, metavar="CRON", help="When, in the project's time zone: five fields.")
@since_option
@click.option(
    "--image",
    default=None,
    metavar="IMAGE",
    help="kuberay: the image of all pods; workers with a GPU have its tag with -gpu behind, unless it is named by a digest.",
)
@click.option("--namespace", default=None, metavar="NAME", help="kuberay: the namespace. Default: catalog-embed.")
@click.option(
    "--allow-local", is_flag=True, help="kuberay: take absolute paths of source, store and tower to be in the image or on a volume."
)
@output_option("text", "json")
@click.pass_obj
def schedule(
    obj: dict[str, Any],
    to: Any,
    out: Path | None,
    at: str,
    since: str,
    image: str | None,
    namespace: str | None,
    *,
    allow_local: bool,
    output: str,
) -> None:
    """Write what a scheduler needs to start this project's run every night.

    cron gets a crontab, airflow and dagster a Python file, kuberay a Kustomize overlay with the configuration as a
    ConfigMap. Nothing is installed or started: the last line is the command that does it. Secrets are never written: the
    configuration names them as ${NAME}, and the names are printed. Those variables must be set here too, to anything.

    A retry follows only the exit codes 11 and 14; what 10, 12 and 13 tell is for a person.
    """
    from jobs.schedule import Schedule, emit, write

    wanted = Schedule(
        to=to,
        config=config_path(obj),
        target=obj["target"],
        at=at,
        since=since,
        image=image,
        namespace=namespace,
        allow_local=allow_local,
    )
    emitted = emit(settings_of(obj), wanted)
    if out is None:
        _print_file(emitted, output)
        return
    written = [str(path) for path in write(emitted, out)]
    then = emitted.then.replace("{out}", shlex.quote(str(out)))
    if output == "json":
        click.echo(json.dumps({"files": written, "next": then, "variables": emitted.variables, "notes": emitted.notes}, indent=2))
        return
    click.echo("".join(f"wrote {path}\n" for path in written), nl=False)
    _tell(emitted.notes)
    click.echo(f"next: {then}")


def _print_file(emitted: Any, output: str) -> None:
    """Print the one file, and beside it what a person has to know."""
    if len(emitted.files) > 1:
        raise click.UsageError("--to kuberay makes several files. Name a folder with --out DIR.")
    texts = {name: data.decode() for name, data in emitted.files.items()}
    if output == "json":
        click.echo(json.dumps({"files": texts, "variables": emitted.variables, "notes": emitted.notes}, indent=2))
        return
    click.echo("".join(texts.values()), nl=False)
    _tell(emitted.notes)


def _tell(notes: tuple[str, ...]) -> None:
    for note in notes:
        click.echo(f"note: {note}", err=True)
