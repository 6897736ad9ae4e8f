"""From the words of `--since` to one absolute interval, in the configured zone, whatever the machine's clock is set to."""

from __future__ import annotations

import re
from datetime import UTC, date, datetime, time, timedelta
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pipelines.contracts import Window
from pipelines.errors import InputError

_SPAN = re.compile(r"(\d{1,6})\s*(m|h|d|w)")
_UNITS = {"m": timedelta(minutes=1), "h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}
_FORMS = (
    "`last`, `beginning`, `yesterday`, `today`, a span such as `36h`, `2d` or `1w`, a date `2026-11-03`, or ISO-8601 `2026-11-03T02:00`"
)


def zone(name: str) -> ZoneInfo:
    """Return the zone of this name from the packaged database."""
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise InputError(f"unknown time zone `{name}`. Use a name such as `Europe/Berlin` or `UTC` for `timezone`.") from error


def span(text: str) -> timedelta:
    """Read a length of time such as `90m`, `26h`, `2d` or `1w`."""
    match = _SPAN.fullmatch(text.strip().lower())
    if match is None:
        raise InputError(f"`{text}` is no length of time. Write a number and one of m, h, d, w: `90m`, `26h`, `2d`.")
    return int(match.group(1)) * _UNITS[match.group(2)]


def resolve(text: str, *, now: datetime, tz: ZoneInfo, lookback: timedelta, watermark: datetime | None) -> Window:
    """Return the window that `--since text` means at `now`, its start moved back by `lookback` for late rows.

    `last` starts at the published watermark, or at the beginning where nothing is published. Days begin at local
    midnight, and `2d` counts calendar days: it starts at the same wall-clock time two days ago, across a clock change
    too. `36h` counts real hours.
    """
    start = _start(text.strip().lower(), text.strip(), now=now, tz=tz, watermark=watermark)
    if start is not None and start >= now:
        raise InputError(
            f"--since {text} is {start.astimezone(tz).isoformat()}, which is not before now ({now.astimezone(tz).isoformat()})."
        )
    try:
        return Window(since=None if start is None else _back(start, lookback), until=now.astimezone(UTC))
    except OverflowError as error:
        raise InputError(f"--since {text} with a lookback of {lookback} lies before the calendar begins. Use `beginning`.") from error


def _start(word: str, text: str, *, now: datetime, tz: ZoneInfo, watermark: datetime | None) -> datetime | None:
    today = now.astimezone(tz).date()
    if word == "beginning" or (word == "last" and watermark is None):
        return None
    if word == "last" and watermark is not None:
        # A machine whose clock is behind the one that published last looks back from its own now.
        return min(watermark, now - timedelta(microseconds=1))
    if word in ("today", "yesterday"):
        return _midnight(today - timedelta(days=word == "yesterday"), tz)
    match = _SPAN.fullmatch(word)
    if match and match.group(2) in "dw":
        return _wall(now.astimezone(tz).replace(tzinfo=None), span(word), tz)
    if match:
        return now.astimezone(UTC) - span(word)
    try:
        return _midnight(date.fromisoformat(text), tz) if len(text) <= len("2026-11-03") else _localised(datetime.fromisoformat(text), tz)
    except (ValueError, OverflowError) as error:
        raise InputError(f"--since `{text}` is not understood. Use {_FORMS}.") from error


def _wall(local: datetime, back: timedelta, tz: ZoneInfo) -> datetime:
    """Go back by calendar days and return the same wall-clock time there."""
    try:
        return _localised(local - back, tz)
    except OverflowError as error:
        raise InputError(f"--since reaches back {back.days} days, before the calendar begins. Use `beginning`.") from error


def _back(start: datetime, lookback: timedelta) -> datetime:
    """Subtract the lookback in real time."""
    return start.astimezone(UTC) - lookback


def _midnight(day: date, tz: ZoneInfo) -> datetime:
    return _localised(datetime.combine(day, time()), tz)


def _localised(moment: datetime, tz: ZoneInfo) -> datetime:
    """Give a wall-clock time its zone. Of two possible instants it is the earlier one, so that no window is too short.

    An hour that autumn repeats has two readings; one that spring skips has none, and is read with the offset after
    the change, which lies before it.
    """
    if moment.tzinfo is not None:
        return moment.astimezone(UTC)
    aware = moment.replace(tzinfo=tz, fold=0)
    exact = aware.astimezone(UTC)
    skipped = exact.astimezone(tz).replace(tzinfo=None) != moment
    return moment.replace(tzinfo=tz, fold=1).astimezone(UTC) if skipped else exact
