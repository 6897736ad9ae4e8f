"""Live progress on stderr: bars on a terminal, plain lines elsewhere, JSON for programs. The only home of rich.

Each renderer is a listener of a `Recorder`. It shows what it is told and computes nothing: rates and ETA come with the
progress. rich loads only where bars are drawn.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Literal, TextIO

from pipelines.layout import counted, millions, printable, took
from pipelines.telemetry import Event, Listener, Progress

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

Mode = Literal["auto", "rich", "plain", "json", "none"]
MODES: tuple[Mode, ...] = ("auto", "rich", "plain", "json", "none")

# A log of a night should stay readable: six lines a minute for a running stage.
LINE_EVERY_S = 10.0


@contextmanager
def observing(
    mode: Mode = "auto", *, stream: TextIO | None = None, quiet: bool = False, every_s: float = LINE_EVERY_S
) -> Iterator[Listener]:
    """Give a listener that shows progress while the block runs, and leave the terminal as it was, whatever happens."""
    shown = sys.stderr if stream is None else stream
    chosen = choose(mode, shown, quiet=quiet)
    if chosen == "rich":
        with _bars(shown) as listener:
            yield listener
    elif chosen == "none":
        yield Silence()
    else:
        yield Lines(shown, form=chosen, every_s=every_s)


def choose(mode: Mode, stream: TextIO, *, quiet: bool) -> Literal["rich", "plain", "json", "none"]:
    """Return how progress is shown: `auto` draws only for a person at a terminal that can, and a given mode is kept."""
    if mode != "auto":
        return mode
    if quiet:
        return "none"
    drawn = stream.isatty() and os.environ.get("TERM", "") not in {"", "dumb", "unknown"} and not os.environ.get("CI")
    return "rich" if drawn else "plain"


class Silence:
    """Shows nothing."""

    def on_event(self, event: Event) -> None:
        """Say nothing."""

    def on_progress(self, progress: Progress) -> None:
        """Say nothing."""


class Lines:
    """A line when a stage begins, every few seconds while it runs, and when it ends: for people or for programs."""

    def __init__(self, stream: TextIO, *, form: Literal["plain", "json"] = "plain", every_s: float = LINE_EVERY_S) -> None:
        self._stream, self._shown, self._every_s = stream, plain_line if form == "plain" else json_line, every_s
        self._told_s: dict[int, float] = {}

    def on_event(self, event: Event) -> None:
        """Leave events to the log."""

    def on_progress(self, progress: Progress) -> None:
        """Write a line if it is time for one."""
        if progress.state == "moved" and progress.elapsed_s - self._told_s.get(progress.number, 0.0) < self._every_s:
            return
        self._told_s[progress.number] = progress.elapsed_s
        self._stream.write(self._shown(progress) + "\n")
        self._stream.flush()


def plain_line(progress: Progress) -> str:
    """Say how far a stage is, in one line."""
    name, done = f"{printable(progress.stage):<10}", f"{counted(progress.rows, progress.unit)} in {took(progress.elapsed_s)}"
    match progress.state:
        case "began":
            return f"{name}  started" + (f"  {counted(progress.total, progress.unit)}" if progress.total is not None else "")
        case "ended":
            return f"{name}  done  {done}{rates(progress)}"
        case "failed":
            return f"{name}  FAILED after {done}"
        case "moved":
            amount = counted(progress.rows, progress.unit)
            if progress.total is not None:
                amount = f"{progress.rows:,}/{counted(progress.total, progress.unit)}  {progress.share:.0%}"
            return f"{name}  {amount}{rates(progress)}{_eta(progress)}"


def rates(progress: Progress) -> str:
    """Show rows and tokens a second, as far as they are known."""
    shown = f"  {progress.rows_per_s:,.0f} {progress.unit}s/s" if progress.rows_per_s else ""
    return shown + (f"  {millions(round(progress.tokens_per_s))} tok/s" if progress.tokens_per_s else "")


def _eta(progress: Progress) -> str:
    return "" if progress.eta_s is None else f"  ETA {took(progress.eta_s)}"


def json_line(progress: Progress) -> str:
    """Say how far a stage is, as one JSON object of plain ASCII."""
    numbers = {
        "elapsed_s": progress.elapsed_s,
        "rows_per_s": progress.rows_per_s,
        "tokens_per_s": progress.tokens_per_s,
        "eta_s": progress.eta_s,
    }
    line = {
        "time": progress.time.isoformat(timespec="milliseconds"),
        "event": "progress",
        "stage": progress.stage,
        "state": progress.state,
        "unit": progress.unit,
        "rows": progress.rows,
        "total": progress.total,
        "tokens": progress.tokens,
        **{name: None if value is None else round(value, 3) for name, value in numbers.items()},
    }
    return json.dumps(line, allow_nan=False, separators=(",", ":"))


class Drawn:
    """One bar a stage; ended stages stay on the screen with their averages."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._tasks: dict[int, TaskID] = {}

    def on_event(self, event: Event) -> None:
        """Leave events to the log, which prints above the bars."""

    def on_progress(self, progress: Progress) -> None:
        """Move the stage's bar."""
        if progress.number not in self._tasks:
            name = printable(progress.stage)
            self._tasks[progress.number] = self._bars.add_task(name, total=progress.total, amount="", rates="", left="")
        task = self._tasks[progress.number]
        total = "" if progress.total is None else f"/{progress.total:,}"
        left = {"ended": f"done {took(progress.elapsed_s)}", "failed": "FAILED"}.get(progress.state, _eta(progress).strip())
        # A stage whose size was never known is full at its end, so that its bar stops moving.
        size = progress.rows if progress.total is None and progress.state in {"ended", "failed"} else progress.total
        self._bars.update(
            task,
            completed=progress.rows if size else int(progress.state == "ended"),
            total=size if size is None else max(size, 1),
            amount=f"{progress.rows:,}{total} {progress.unit}s",
            rates=rates(progress).strip(),
            left=left,
        )


@contextmanager
def _bars(stream: TextIO) -> Iterator[Drawn]:
    """Draw bars, with the log above them; the cursor comes back whatever happens."""
    from rich.console import Console  # noqa: PLC0415  `--help` and a night without a terminal never load it
    from rich.progress import BarColumn, TextColumn  # noqa: PLC0415
    from rich.progress import Progress as Bars  # noqa: PLC0415

    # No markup, no highlighting: what is shown may hold brackets. rich itself keeps to NO_COLOR.
    console = Console(file=stream, force_terminal=True, highlight=False, markup=False, emoji=False)
    columns = [TextColumn(f"{{task.{name}}}", markup=False) for name in ("description", "fields[amount]", "fields[rates]", "fields[left]")]
    # stdout stays what it is: data may go through it into a pipe.
    bars = Bars(
        columns[0], BarColumn(bar_width=24), *columns[1:], console=console, redirect_stdout=False, redirect_stderr=stream is sys.stderr
    )
    bars.start()
    try:
        yield Drawn(bars)
    finally:
        # A terminal that was closed under us needs no restoring.
        with suppress(OSError, ValueError):
            bars.stop()


def steps_told(
    *, quiet: bool = False, stream: TextIO | None = None, every_s: float = LINE_EVERY_S
) -> Callable[[str, Mapping[str, Any]], None] | None:
    """Return who tells of the steps of a training: a line of its stage, step and loss every few seconds; None where nobody wants it."""
    if quiet:
        return None
    shown, told = sys.stderr if stream is None else stream, [-every_s]

    def tell(stage: str, line: Mapping[str, Any]) -> None:
        if time.monotonic() - told[0] >= every_s:
            told[0] = time.monotonic()
            shown.write(
                f"{stage}  step {line['step']:,}  loss {line['loss']:.4f}  {line['pairs_per_s']:.0f} queries/s  lr {line['lr']:.1e}\n"
            )

    return tell
