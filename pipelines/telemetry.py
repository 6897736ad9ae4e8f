"""What a run tells while it works: stages with rates, events as lines of JSON, metrics for Prometheus.

A `Recorder` keeps and fans out; who shows it (`jobs.progress`, `jobs.logs`) is a listener. Telling never fails a run:
a listener that raises is dropped, and an event that cannot be written is counted. Values are made safe here, once:
no control character, no credential of an address, no catalog text under the names that hold it.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import islice
from numbers import Integral, Real
from pathlib import Path, PurePath
from threading import RLock
from typing import Any, Literal, Protocol

Level = Literal["debug", "info", "warning"]
State = Literal["began", "moved", "ended", "failed"]

# Rates are those of the last half minute: an average over a night would hide that a stage has slowed down.
RATE_WINDOW_S = 30.0
# An actor may report a thousand times a second; nobody reads faster than this.
TELL_EVERY_S = 0.1
MAX_EVENTS_BYTES = 64 * 1024 * 1024
MAX_VALUE_CHARACTERS = 500

_MAX_ITEMS, _MAX_DEPTH, _MAX_INT = 100, 3, 2**63
_EVENT_NAME = re.compile(r"[a-z][a-z0-9_]*(\.[a-z0-9_]+)*")
_LOST = "events.lost"
_RESERVED = frozenset({"time", "event", "run_id", "level"})
# Strings under these names would be catalog text or a credential; counts under them are neither.
_CATALOG = re.compile(r"(id|text|title|description|brand|document|product|query|sample|row|example)s?")
_SECRET = re.compile(r"(?i)secret|passw|credential|authorization|signature|(^|_)token$|(access|api|account|private|secret)_?key")
_MASKS = (
    (re.compile(r"(?<=://)[^/\s@]+@"), "***@"),
    (re.compile(r"(://[^\s?]*)\?\S*"), r"\1?***"),
    (
        re.compile(
            r"(?i)\b([\w-]{0,40}(?:secret|password|token(?!s)|credential|signature|(?:access|account|api|private)_?key)[\w-]{0,40}\s?[=:]\s?)[^\s,;&]+"
        ),
        r"\1***",
    ),
    (re.compile(r"(?i)\b(bearer\s)\S+"), r"\1***"),
)
# The messages of these packages are written for people, and quote no catalog text.
_OWN = frozenset({"pipelines", "encoder", "jobs"})


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something happened; `fields` are JSON types already."""

    time: datetime
    name: str
    level: Level
    fields: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a stage is. Rates are recent while it runs and averages once it ended; None where nothing can be said."""

    number: int
    stage: str
    unit: str
    state: State
    time: datetime
    total: int | None = None
    elapsed_s: float = 0.0
    rows: int = 0
    tokens: int = 0
    rows_per_s: float | None = None
    tokens_per_s: float | None = None

    @property
    def eta_s(self) -> float | None:
        """Seconds until the stage ends at the present rate."""
        if self.state != "moved" or self.total is None or not self.rows_per_s:
            return None
        return max(self.total - self.rows, 0) / self.rows_per_s

    @property
    def share(self) -> float | None:
        """How much is done, from 0 to 1."""
        return None if self.total is None else 1.0 if self.rows >= self.total else self.rows / self.total


@dataclass(frozen=True, kw_only=True)
class StageTime:
    """How long a stage took for how much. Times of overlapping stages add up to more than the run."""

    name: str
    seconds: float
    rows: int = 0
    tokens: int = 0
    unit: str = "row"


class Listener(Protocol):
    """Shows what happens. Called in the thread that reports, one call at a time."""

    def on_event(self, event: Event) -> None:
        """Take note of an event."""

    def on_progress(self, progress: Progress) -> None:
        """Take note of how far a stage is."""


class Stage(Protocol):
    """A stage at work."""

    def advance(self, rows: int, *, tokens: int = 0) -> None:
        """Say that this many more rows, and tokens, are done."""


class Observer(Protocol):
    """Where the parts of a run report."""

    def stage(self, name: str, total: int | None = None, unit: str = "row") -> AbstractContextManager[Stage]:
        """Time a stage while the block runs; `unit` is singular: row, text, part."""

    def event(self, name: str, /, *, level: Level = "info", **fields: object) -> None:
        """Say that something happened."""


class Pace:
    """Rows and tokens a second over a moving window."""

    def __init__(self, begun: float, *, window_s: float = RATE_WINDOW_S) -> None:
        self._window_s = window_s
        self._samples: deque[tuple[float, int, int]] = deque([(begun, 0, 0)])

    def add(self, now: float, rows: int, tokens: int) -> None:
        """Note the totals at this time."""
        samples = self._samples
        # At most about a hundred samples, however often an actor reports.
        if len(samples) > 1 and samples[-1][0] - samples[-2][0] < self._window_s / 100:
            samples.pop()
        samples.append((now, rows, tokens))
        while len(samples) > 2 and samples[1][0] <= now - self._window_s:  # noqa: PLR2004  two samples make a rate
            samples.popleft()

    def rates(self) -> tuple[float | None, float | None]:
        """Return rows and tokens a second, None where no time or no token has passed."""
        (begin, rows, tokens), (end, rows_now, tokens_now) = self._samples[0], self._samples[-1]
        return per_second(rows_now - rows, end - begin), per_second(tokens_now - tokens, end - begin) if tokens_now else None


def per_second(count: int, seconds: float) -> float | None:
    """Return a rate, None where no time has passed."""
    return count / seconds if seconds > 0 else None


class _Running:
    """A stage between its begin and its end."""

    def __init__(self, recorder: Recorder, progress: Progress, begun: float) -> None:
        self._recorder, self._begun, self._told, self._pace = recorder, begun, begun, Pace(begun)
        self.progress = progress

    def advance(self, rows: int, *, tokens: int = 0) -> None:
        assert rows >= 0, rows
        assert tokens >= 0, tokens
        with self._recorder.lock:
            now = self._recorder.clock()
            done = replace(self.progress, rows=self.progress.rows + rows, tokens=self.progress.tokens + tokens)
            self._pace.add(now, done.rows, done.tokens)
            rates = self._pace.rates()
            self.progress = replace(done, state="moved", elapsed_s=now - self._begun, rows_per_s=rates[0], tokens_per_s=rates[1])
            if now - self._told >= TELL_EVERY_S:
                self._told = now
                self.progress = replace(self.progress, time=self._recorder.now())
                self._recorder.tell_progress(self.progress)

    def end(self, state: State) -> Progress:
        seconds = self._recorder.clock() - self._begun
        tokens_per_s = per_second(self.progress.tokens, seconds) if self.progress.tokens else None
        done = replace(self.progress, state=state, time=self._recorder.now(), elapsed_s=seconds)
        return replace(done, rows_per_s=per_second(done.rows, seconds), tokens_per_s=tokens_per_s)


class Recorder:
    """The observer of a real run. `path` is a local file for the events; without one they are only passed on."""

    def __init__(
        self,
        run_id: str,
        *,
        path: Path | None = None,
        listeners: Sequence[Listener] = (),
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(tz=UTC),
    ) -> None:
        self.clock, self.now, self.lock = clock, now, RLock()
        self._run_id, self._path, self._listeners = run_id, path, list(listeners)
        self._stages: list[StageTime] = []
        self._begun, self._written, self._lost, self._told_lost = 0, 0, 0, 0
        # A run that was killed may have left half a line; the next one must not be glued to it.
        self._torn = path is not None and path.exists() and not path.read_bytes().endswith(b"\n")

    @property
    def stages(self) -> tuple[StageTime, ...]:
        """The stages that ended so far, failed ones included, in the order in which they ended."""
        return tuple(self._stages)

    @property
    def lost(self) -> int:
        """Events that could not be written."""
        return self._lost

    @contextmanager
    def stage(self, name: str, total: int | None = None, unit: str = "row") -> Iterator[Stage]:
        """Time a stage while the block runs; an exception ends it as failed and goes on."""
        with self.lock:
            self._begun += 1
            start = Progress(number=self._begun, stage=name, unit=unit, state="began", time=self.now(), total=total)
            running = _Running(self, start, self.clock())
            self.event("stage.began", level="debug", stage=name, total=total, unit=unit)
            self.tell_progress(running.progress)
        state: State = "failed"
        try:
            yield running
            state = "ended"
        finally:
            with self.lock:
                done = running.end(state)
                self._stages.append(StageTime(name=name, seconds=done.elapsed_s, rows=done.rows, tokens=done.tokens, unit=unit))
                counts = {"seconds": round(done.elapsed_s, 3), "rows": done.rows, "tokens": done.tokens}
                self.event(f"stage.{state}", level="debug", stage=name, **counts)
                self.tell_progress(done)

    def event(self, name: str, /, *, level: Level = "info", **fields: object) -> None:
        """Keep an event and pass it on."""
        assert _EVENT_NAME.fullmatch(name), name
        assert not fields.keys() & _RESERVED, fields.keys()
        with self.lock:
            event = Event(time=self.now(), name=name, level=level, fields=safe_fields(fields))
            self._write(event)
            self._tell(lambda listener: listener.on_event(event))

    def tell_progress(self, progress: Progress) -> None:
        """Pass on how far a stage is."""
        self._tell(lambda listener: listener.on_progress(progress))

    def finished(self) -> bytes:
        """Return the events so far as JSON lines, for `runs/<run>/events.jsonl`."""
        with self.lock:
            if self._lost > self._told_lost:
                self._told_lost = self._lost
                self.event(_LOST, level="warning", count=self._lost)
            if self._path is None or not self._path.exists():
                return b""
            return b"".join(line for line in self._path.read_bytes().splitlines(keepends=True) if _whole(line))

    def _tell(self, call: Callable[[Listener], None]) -> None:
        for listener in tuple(self._listeners):
            try:
                call(listener)
            except Exception as error:  # noqa: BLE001  a closed terminal must not stop a night's work
                self._listeners.remove(listener)
                self.event("listener.dropped", level="warning", listener=type(listener).__name__, error=error)

    def _write(self, event: Event) -> None:
        if self._path is None:
            return
        line = event_line(event, run_id=self._run_id)
        if self._written + len(line) > MAX_EVENTS_BYTES and event.name != _LOST:
            self._lost += 1
            return
        data = b"\n" + line if self._torn else line
        try:
            # Opened for each event, which are few: whatever kills the process, what was told is in the file.
            with self._path.open("ab", buffering=0) as file:
                self._torn = file.write(data) != len(data)
        except OSError:
            self._torn = True
        self._lost += self._torn
        self._written += len(line)


def event_line(event: Event, *, run_id: str) -> bytes:
    """Return an event as one line of ASCII JSON: no value can break the line or move a cursor."""
    head = {"time": event.time.astimezone(UTC).isoformat(timespec="milliseconds"), "event": event.name, "run_id": run_id}
    level = {} if event.level == "info" else {"level": event.level}
    return json.dumps({**head, **level, **event.fields}, allow_nan=False, separators=(",", ":")).encode("ascii") + b"\n"


def _whole(line: bytes) -> bool:
    """Tell a line from the part of one that a full disk or a kill left, which was counted as lost."""
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def safe_fields(fields: Mapping[str, object]) -> dict[str, Any]:
    """Return fields as JSON types, without credentials and without catalog text."""
    return {name: _safe(value, name=name, depth=0) for name, value in fields.items()}


def error_text(error: BaseException) -> str:
    """Return what may be told of an error: of this package's and the system's its message, of an engine's only its class."""
    return _safe_text(_worded(error), name="")


def _safe(value: object, *, name: str, depth: int) -> Any:
    if isinstance(value, Mapping | list | tuple | set | frozenset):
        return _safe_items(value, name=name, depth=depth)
    if isinstance(value, bool | None):
        return value
    if isinstance(value, Real):
        return _safe_number(value)
    return _safe_text(_worded(value), name=name)


def _safe_items(value: Mapping[Any, Any] | Sequence[Any] | set[Any] | frozenset[Any], *, name: str, depth: int) -> Any:
    if depth >= _MAX_DEPTH:
        return f"<{len(value)} items>"
    if isinstance(value, Mapping):
        # What is under a withheld name stays withheld, keys included.
        hidden = _hidden(name) is not None
        shown = list(value.items())[:_MAX_ITEMS]
        return {
            _key(key, name if hidden else ""): _safe(item, name=name if hidden else _key(key, ""), depth=depth + 1) for key, item in shown
        }
    items = [_safe(item, name=name, depth=depth + 1) for item in islice(value, _MAX_ITEMS)]
    return sorted(items, key=str) if isinstance(value, set | frozenset) else items


def _key(key: object, name: str) -> str:
    return _safe_text(str(_safe(key, name="", depth=_MAX_DEPTH)), name=name)


def _safe_number(value: Real) -> int | float | str:
    """Return a number that JSON has; what it lacks is spelled out."""
    if isinstance(value, Integral):
        whole = int(value)
        return whole if -_MAX_INT <= whole < _MAX_INT else f"about {'-' if whole < 0 else ''}2**{whole.bit_length() - 1}"
    number = float(value)
    return number if math.isfinite(number) else str(number)


def _worded(value: object) -> str:
    """Put a value into words; a type that is not known to be harmless is named and not shown."""
    if isinstance(value, str | PurePath):
        return str(value)
    if isinstance(value, timedelta):
        return f"{value.total_seconds():g}s"
    if isinstance(value, datetime):
        return (value.astimezone(UTC) if value.tzinfo else value).isoformat()
    if isinstance(value, OSError) or (isinstance(value, Exception) and type(value).__module__.partition(".")[0] in _OWN):
        return f"{type(value).__name__}: {value}"
    # An engine's error may quote a cell of the catalog.
    return type(value).__name__ if isinstance(value, BaseException) else f"<{type(value).__name__}>"


def _safe_text(text: str, *, name: str) -> str:
    hidden = _hidden(name)
    if hidden is not None:
        return hidden
    shown = text[: 8 * MAX_VALUE_CHARACTERS]
    for pattern, masked in _MASKS:
        shown = pattern.sub(masked, shown)
    return shown if len(shown) <= MAX_VALUE_CHARACTERS else shown[: MAX_VALUE_CHARACTERS - 3] + "..."


def _hidden(name: str) -> str | None:
    """Return what stands for a string under this name, None where it may be shown."""
    return "<withheld>" if _CATALOG.fullmatch(name) else "***" if _SECRET.search(name) else None
