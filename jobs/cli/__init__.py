"""The command line: thin calls of functions that Python users can call too. Engines load inside commands."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import NoReturn

import click

from jobs.cli import learn, look, release, setup, work
from jobs.cli.group import cli

__all__ = ["cli", "learn", "look", "main", "release", "setup", "work"]

INTERRUPTED = 14

_VERBOSE_FOR_TRACEBACK = 2


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line; turn errors into one line that says what to do, and into exit codes."""
    # Lance warns on its own logger; the messages speak of its internals.
    os.environ.setdefault("LANCE_LOG", "error")
    _end_as_interrupted()
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


def _end_as_interrupted() -> None:
    """Let SIGTERM, which is how schedulers stop a job, end a run as Ctrl-C does: recorded, with its lease released."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(*_: object) -> NoReturn:
    """End as Ctrl-C does. Not by raising SIGINT: who was started in the background of a script ignores it."""
    raise KeyboardInterrupt


def _told(error: Exception, *, show_traceback: bool) -> int:
    """Say on stderr what failed, and return the exit code of its class."""
    from encoder.errors import EncoderError
    from pipelines.errors import CatalogEmbedError
    from pipelines.layout import printable

    if show_traceback:
        traceback.print_exception(error)
    if isinstance(error, CatalogEmbedError | EncoderError):
        click.echo(f"error: {printable(str(error))}", err=True)
        return error.exit_code
    told = "\n".join(printable(line) for line in f"{type(error).__name__}: {error}".splitlines())
    click.echo(f"error: {told}\nThis was not foreseen. Run again with -vv and report it.", err=True)
    return 1
