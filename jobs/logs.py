"""Events on stderr, one a line, with fields: data belongs to stdout, catalog text to neither."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

from pipelines.layout import printable
from pipelines.telemetry import Event, Level, Progress, safe_fields

_EVENTS = logging.getLogger("catalog_embed")
_LEVELS: Mapping[Level, int] = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING}

Form = Literal["text", "json"]


class _Line(logging.Formatter):
    """Time, event, fields. Line breaks and escapes in values stay visible instead of taking effect."""

    converter = staticmethod(time.gmtime)

    def format(self, record: logging.LogRecord) -> str:
        fields = " ".join(f"{printable(key)}={_shown(value)}" for key, value in _fields(record).items())
        warned = " WARNING" if record.levelno >= logging.WARNING else ""
        return f"{self.formatTime(record, '%H:%M:%SZ')}{warned} {printable(record.getMessage())} {fields}".rstrip()


class _JsonLine(logging.Formatter):
    """The same as one JSON object of plain ASCII."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, tz=UTC).isoformat(timespec="milliseconds")
        head = {"time": at, "level": record.levelname.lower(), "event": record.getMessage()}
        return json.dumps({**head, **{key: value for key, value in _fields(record).items() if key not in head}}, separators=(",", ":"))


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to what `sys.stderr` is at that moment: while bars are drawn it is a proxy that prints above them."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]  # the handlers of `logging.lastResort` do the same
        return sys.stderr


class LogLines:
    """A listener that logs the events of a run."""

    def on_event(self, event: Event) -> None:
        """Log an event at its level."""
        _EVENTS.log(_LEVELS[event.level], event.name, extra={"fields": event.fields})

    def on_progress(self, progress: Progress) -> None:
        """Leave progress to who draws it."""


def set_up(verbosity: int, *, form: Form = "text") -> None:
    """Show warnings at -1, what happens at 0, details at 1 and more; as text for people or JSON for programs."""
    handler = _Stderr()
    handler.setFormatter(_Line() if form == "text" else _JsonLine())
    _EVENTS.handlers[:] = [handler]
    _EVENTS.propagate = False
    _EVENTS.setLevel({-1: logging.WARNING, 0: logging.INFO}.get(verbosity, logging.DEBUG if verbosity > 0 else logging.WARNING))


def event(name: str, *, level: Level = "info", **fields: object) -> None:
    """Report that something happened."""
    _EVENTS.log(_LEVELS[level], name, extra={"fields": safe_fields(fields)})


def _fields(record: logging.LogRecord) -> Mapping[str, Any]:
    fields: Mapping[str, Any] = getattr(record, "fields", {})
    return fields


def _shown(value: object) -> str:
    text = str(value)
    return text if text.isprintable() and " " not in text else repr(text)
