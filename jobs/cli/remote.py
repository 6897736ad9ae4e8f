"""A command of this machine, written out again for a cluster: what was given here, by hand or in the environment, goes along."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from jobs.cli.group import config_path

_GIVEN = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)
# The cluster is named anew for the job, which runs on it.
_NAMED_ANEW = ("ray_address", "insecure_cluster", "config")
_IDS = "ids.txt"


def send(settings: Any, obj: dict[str, Any]) -> int:
    """Submit the command that is running now, and return its exit code."""
    from jobs.cluster import host_of, is_loopback
    from jobs.schedule import literal_secrets
    from jobs.submit import Command, submit

    if found := literal_secrets(config_path(obj)):
        advice = "Write `${NAME}` there, and set the variable on the cluster's nodes."
        raise click.UsageError(
            f"{', '.join(found)} holds a secret as it is, and the configuration would be copied to the cluster. {advice}"
        )
    ctx = click.get_current_context()
    address = settings.ray.address
    near = is_loopback(host_of(address))
    files: dict[str, Path] = {}
    arguments = list(_words(ctx, near=near, files=files))
    command = Command(
        name=str(ctx.info_name),
        project=settings.project.project,
        config=config_path(obj),
        layer=settings.origins,
        front=list(_words(ctx.find_root(), near=near, files=files)),
        # The driver of a job is on the cluster, where whoever submitted it was let in.
        arguments=["--ray-address", "auto", "--insecure-cluster", *arguments]
        if settings.ray.insecure
        else ["--ray-address", "auto", *arguments],
        files=files,
    )
    return submit(address, command, insecure=settings.ray.insecure)


def _words(ctx: click.Context, *, near: bool, files: dict[str, Path]) -> Iterator[str]:
    """Yield the options and then the arguments of a command as they were given."""
    last: list[str] = []
    for item in ctx.command.params:
        if item.name in _NAMED_ANEW or item.name is None or ctx.get_parameter_source(item.name) not in _GIVEN:
            continue
        value: Any = ctx.params.get(item.name)
        for one in value if item.multiple or item.nargs != 1 else [value]:
            word = _word(item, one, near=near, files=files)
            if isinstance(item, click.Argument):
                last.append(word)
            elif isinstance(item, click.Option) and item.count:
                yield from [item.opts[0]] * int(one)
            elif isinstance(item, click.Option) and item.is_flag:
                yield from [item.opts[0]] if one else item.secondary_opts[:1]
            else:
                option = max(item.opts, key=len)
                yield f"{option}={word}"
    if last:
        yield from ("--", *last)


def _word(item: click.Parameter, value: Any, *, near: bool, files: dict[str, Path]) -> str:
    """Write a value as the cluster can read it; a file of this machine is there only where the cluster is this machine."""
    if item.name == "ids" and str(value).startswith("@"):
        place = Path(str(value)[1:])
        if not place.is_file():
            raise click.UsageError(f"--ids {value}: there is no such file.")
        files[_IDS] = place
        return f"@{_IDS}"
    if isinstance(value, Path):
        if not near:
            named = item.opts[0] if isinstance(item, click.Option) else str(item.human_readable_name)
            raise click.UsageError(
                f"{named} {value} is a place of this machine, and does not travel to the cluster. Run the command on the cluster, or leave it out."
            )
        return str(value.resolve())
    return str(value)
