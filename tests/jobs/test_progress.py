from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, get_args

import pytest

from jobs import logs
from jobs.progress import MODES, Mode, Silence, choose, observing
from pipelines.telemetry import Recorder

ROOT = Path(__file__).parents[2]
NOON = datetime(2026, 11, 4, 12, tzinfo=UTC)
HOSTILE = "plan.made\n12:00:00Z run.published\x1b[2J\u202e"
SGR = re.compile(r"\x1b\[[0-9;]*m")
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.s = 0.0

    def __call__(self) -> float:
        return self.s

    def now(self) -> datetime:
        return NOON + timedelta(seconds=self.s)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CI", "NO_COLOR", "FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def night(listener: Any, clock: Clock) -> None:
    """A small run: a stage of unknown size, one with tokens, one that fails."""
    recorder = Recorder("run-1", listeners=[listener], clock=clock, now=clock.now)
    recorder.event("run.began", alias="prod")
    with recorder.stage("read") as stage:
        for _ in range(3):
            clock.s += 6
            stage.advance(60_000)
    with recorder.stage("embed", total=1000, unit="text") as stage:
        for _ in range(100):
            clock.s += 0.5
            stage.advance(10, tokens=20_000)
    with suppress(RuntimeError), recorder.stage("apply", total=10) as stage:
        clock.s += 1
        stage.advance(1)
        raise RuntimeError


def shown(mode: Mode, stream: io.StringIO, **options: Any) -> str:
    with observing(mode, stream=stream, **options) as listener:
        night(listener, Clock())
    return stream.getvalue()


def test_plain_lines_are_laid_out_as_ever() -> None:
    assert shown("plain", io.StringIO(), every_s=20.0) == (
        "read        started\n"
        "read        done  180,000 rows in 18.0s  10,000 rows/s\n"
        "embed       started  1,000 texts\n"
        "embed       400/1,000 texts  40%  20 texts/s  40,000 tok/s  ETA 30.0s\n"
        "embed       800/1,000 texts  80%  20 texts/s  40,000 tok/s  ETA 10.0s\n"
        "embed       done  1,000 texts in 50.0s  20 texts/s  40,000 tok/s\n"
        "apply       started  10 rows\n"
        "apply       FAILED after 1 row in 1.0s\n"
    )


def test_plain_lines_of_a_stage_without_a_size_promise_no_end() -> None:
    assert "read        120,000 rows  10,000 rows/s\n" in shown("plain", io.StringIO())


def test_json_lines_are_one_object_each() -> None:
    lines = [json.loads(line) for line in shown("json", io.StringIO(), every_s=20.0).splitlines()]
    assert len(lines) == 8
    assert {line["event"] for line in lines} == {"progress"}
    assert lines[3] == {
        "time": "2026-11-04T12:00:38.000+00:00",
        "event": "progress",
        "stage": "embed",
        "state": "moved",
        "unit": "text",
        "rows": 400,
        "total": 1000,
        "tokens": 800_000,
        "elapsed_s": 20.0,
        "rows_per_s": 20.0,
        "tokens_per_s": 40_000.0,
        "eta_s": 30.0,
    }


def test_none_shows_nothing() -> None:
    assert shown("none", Terminal()) == ""


def test_bars_show_every_stage_and_give_the_cursor_back() -> None:
    text = shown("rich", Terminal())
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1
    assert text.rindex("\x1b[?25h") > text.rindex("apply")
    last = CONTROL.sub("", text).splitlines()[-3:]
    assert [line.split()[0] for line in last] == ["read", "embed", "apply"]
    assert "180,000 rows" in last[0]
    assert "1,000/1,000 texts 20 texts/s  40,000 tok/s done 50.0s" in last[1]
    assert "FAILED" in last[2]
    # Beside what moves the cursor and colours, nothing but printable text: no half-written escape.
    assert all(char.isprintable() or char in "\r\n" for char in CONTROL.sub("", text))


def test_bars_show_rates_and_time_left_while_a_stage_runs() -> None:
    stream, clock = Terminal(), Clock()
    with observing("rich", stream=stream) as listener:
        recorder = Recorder("run-1", listeners=[listener], clock=clock, now=clock.now)
        with recorder.stage("embed", total=1000, unit="text") as stage:
            clock.s = 10
            stage.advance(200, tokens=8000)
            listener._bars.refresh()  # type: ignore[attr-defined]
            assert "200/1,000 texts 20 texts/s  800 tok/s ETA 40.0s" in CONTROL.sub("", stream.getvalue())


def test_bars_leave_the_terminal_whole_when_the_run_dies() -> None:
    stream = Terminal()
    stderr = sys.stderr

    def work() -> None:
        with observing("rich", stream=stream) as listener, Recorder("run-1", listeners=[listener]).stage("embed", total=10):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert stream.getvalue().endswith("\x1b[?25h")
    assert sys.stderr is stderr


def test_no_color_draws_bars_without_color(monkeypatch: pytest.MonkeyPatch) -> None:
    assert SGR.search(shown("rich", Terminal()))
    monkeypatch.setenv("NO_COLOR", "1")
    text = shown("rich", Terminal())
    assert not SGR.search(text)
    assert "1,000/1,000 texts" in text


def test_stage_name_with_markup_is_shown_as_it_is() -> None:
    for mode in ("rich", "plain", "json"):
        stream = Terminal()
        with observing(mode, stream=stream) as listener, Recorder("run-1", listeners=[listener]).stage(f"[red]{HOSTILE}", total=1):
            pass
        text = CONTROL.sub("", stream.getvalue()) if mode == "rich" else stream.getvalue()
        assert "[red]plan.made\\n12" in text
        assert "\u202e" not in text
        assert "\x1b" not in text


def test_terminal_that_goes_away_does_not_stop_the_run() -> None:
    for mode in ("rich", "plain", "json"):
        stream = Terminal()
        with observing(mode, stream=stream) as listener:
            recorder = Recorder("run-1", listeners=[listener])
            stream.close()
            with recorder.stage("embed", total=10) as stage:
                stage.advance(10)
        assert recorder.stages[0].rows == 10


def test_auto_draws_only_for_a_person_at_a_terminal_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    assert get_args(Mode) == MODES
    assert choose("auto", Terminal(), quiet=False) == "rich"
    assert choose("auto", io.StringIO(), quiet=False) == "plain"
    assert choose("auto", Terminal(), quiet=True) == "none"
    assert choose("plain", Terminal(), quiet=True) == "plain"
    for name, value in (("CI", "true"), ("TERM", "dumb"), ("TERM", "")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert choose("auto", Terminal(), quiet=False) == "plain"
    with observing("auto", stream=io.StringIO(), quiet=True) as listener:
        assert isinstance(listener, Silence)


def test_rich_loads_only_where_bars_are_drawn() -> None:
    script = (
        "import io, sys, jobs.progress, jobs.logs\n"
        "for mode in ('auto', 'plain', 'json', 'none'):\n"
        "    with jobs.progress.observing(mode, stream=io.StringIO()) as listener: pass\n"
        "print([name for name in ('rich', 'pyarrow', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "[]\n"


def read_to_end(terminal: int) -> bytes:
    seen = b""
    # Linux tells the end of a pseudo-terminal by EIO.
    with suppress(OSError):
        while block := os.read(terminal, 65536):
            seen += block
    os.close(terminal)
    return seen


def test_real_terminal_gets_bars_with_the_log_above_them() -> None:
    """On a pseudo-terminal, as a person would see it: log lines stay whole, and data goes where stdout goes."""
    import pty

    script = (
        "import time\n"
        "from jobs import logs\nfrom jobs.progress import observing\nfrom pipelines.telemetry import Recorder\n"
        "logs.set_up(0)\n"
        "with observing('auto') as listener:\n"
        "    recorder = Recorder('run-1', listeners=[listener, logs.LogLines()])\n"
        "    with recorder.stage('embed', total=4, unit='text') as stage:\n"
        "        for number in range(4):\n"
        "            time.sleep(0.11); stage.advance(1, tokens=9); recorder.event('part.written', number=number); print('data', number)\n"
        "recorder.event('run.ended')\n"
    )
    master, slave = pty.openpty()
    environment = {key: value for key, value in os.environ.items() if key != "CI"} | {"TERM": "xterm-256color", "COLUMNS": "100"}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=slave, cwd=ROOT, env=environment) as child:
        os.close(slave)
        seen = read_to_end(master)
        stdout = child.communicate()[0]
    assert child.returncode == 0
    text = seen.decode()
    assert stdout == b"data 0\ndata 1\ndata 2\ndata 3\n"
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1
    rows = [row.strip() for row in re.split(r"[\r\n]+", CONTROL.sub("", text))]
    for number in range(4):
        assert any(re.fullmatch(rf"\d\d:\d\d:\d\dZ part\.written number={number}", row) for row in rows)
    assert any("4/4 texts" in row and "done" in row for row in rows)
    assert re.fullmatch(r"\d\d:\d\d:\d\dZ run\.ended", rows[-2] if not rows[-1] else rows[-1])


def test_log_lines_are_an_event_and_its_fields(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up(0)
    logs.event("plan.made", add=3, reason="two words", name_shown=HOSTILE, address="postgresql://u:CANARY@h/d")
    logs.event("stage.ended", level="debug", stage="read")
    logs.event("gate.failed", level="warning", gate="churn")
    err = capsys.readouterr().err
    lines = err.splitlines()
    assert len(lines) == 2
    assert lines[0][10:] == (
        r"plan.made add=3 reason='two words' name_shown='plan.made\n12:00:00Z run.published\x1b[2J\u202e' address=postgresql://***@h/d"
    )
    assert lines[1][10:] == "WARNING gate.failed gate=churn"


def test_log_lines_as_json_parse_and_quiet_keeps_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up(1, form="json")
    recorder = Recorder("run-1", listeners=[logs.LogLines()])
    with recorder.stage("read"):
        recorder.event("plan.made", add=3, reason=HOSTILE)
    found = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["event"] for line in found] == ["stage.began", "plan.made", "stage.ended"]
    assert (found[1]["level"], found[1]["add"], found[1]["reason"]) == ("info", 3, HOSTILE)
    logs.set_up(-1, form="json")
    recorder.event("plan.made")
    recorder.event("gate.failed", level="warning", gate="churn")
    assert [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()] == ["gate.failed"]
