"""Events on stderr, one a line, with fields: data belongs to stdout, catalog text to neither."""

from __future__ import annotations

import logging
import sys
import time

_EVENTS = logging.getLogger("catalog_embed")


class _Line(logging.Formatter):
    """Time, event, fields. Line breaks and escapes in values stay visible instead of taking effect."""

    converter = staticmethod(time.gmtime)

    def format(self, record: logging.LogRecord) -> str:
        fields = " ".join(f"{key}={_shown(value)}" for key, value in getattr(record, "fields", {}).items())
        return f"{self.formatTime(record, '%H:%M:%SZ')} {record.getMessage()} {fields}".rstrip()


def set_up(verbosity: int) -> None:
    """Show warnings at -1, what happens at 0, details at 1 and more."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Line())
    _EVENTS.handlers[:] = [handler]
    _EVENTS.propagate = False
    _EVENTS.setLevel({-1: logging.WARNING, 0: logging.INFO}.get(verbosity, logging.DEBUG if verbosity > 0 else logging.WARNING))


def event(name: str, **fields: object) -> None:
    """Report that something happened."""
    _EVENTS.info(name, extra={"fields": fields})


def _shown(value: object) -> str:
    text = str(value)
    return text if text.isprintable() and " " not in text else repr(text)
