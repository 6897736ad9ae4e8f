"""Numbers and foreign text as a person reads them on a screen: no colour, no terminal needed."""

from __future__ import annotations

import re
from collections.abc import Iterable

from pipelines.errors import InputError

_MINUTE_S, _HOUR_S, _DAY_S = 60, 3600, 86400


def printable(text: str) -> str:
    """Show catalog text without letting it move the cursor, forge a line or reorder what is read."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def printable_lines(lines: Iterable[str]) -> str:
    """Return lines for a terminal: what came from a file cannot steer it."""
    return "".join(f"{printable(line)}\n" for line in lines)


def short(text: str, characters: int) -> str:
    """Show at most this many characters of a text, printable."""
    return printable(text if len(text) <= characters else text[: characters - 3] + "...")


def duration(seconds: float) -> str:
    """Show a length of time by one unit, as limits are written: 26h, 2d."""
    if seconds == float("inf"):
        return "never"
    for least, size, unit in ((2 * _DAY_S, _DAY_S, "d"), (_HOUR_S, _HOUR_S, "h"), (_MINUTE_S, _MINUTE_S, "m")):
        if seconds >= least:
            return f"{seconds / size:.1f}".removesuffix(".0") + unit
    return f"{seconds:.0f}s"


def took(seconds: float) -> str:
    """Show how long something took, by its two largest units: 8.4s, 3m12s, 1h02m, 2d03h."""
    whole = round(seconds)
    if seconds < _MINUTE_S - 0.05:
        return f"{seconds:.1f}s"
    for least, large, small in ((_DAY_S, _DAY_S, _HOUR_S), (_HOUR_S, _HOUR_S, _MINUTE_S)):
        if whole >= least:
            return f"{whole // large}{'d' if large == _DAY_S else 'h'}{whole % large // small:02d}{'h' if large == _DAY_S else 'm'}"
    return f"{whole // _MINUTE_S}m{whole % _MINUTE_S:02d}s"


def millions(count: int) -> str:
    """Show a number of tokens: millions where there are some."""
    return f"{count / 1e6:.1f} M" if count >= 1_000_000 else f"{count:,}"  # noqa: PLR2004  a million


_BYTES = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?(k|M|G|T)?(i)?B?")


def byte_count(text: str) -> int:
    """Read a number of bytes such as `8GB`, `512 MiB` or `1000`."""
    found = _BYTES.fullmatch(text.strip())
    if found is None:
        raise InputError(f"{text[:40]!r} is no number of bytes. Write it as `8GB` or `512MiB`.")
    power = " kMGT".index(found[2] or " ")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def byte_size(size: float) -> str:
    """Show a number of bytes in SI units."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:  # noqa: PLR2004  SI units
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def counted(number: int, noun: str) -> str:
    """Show a number of things."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


_AHEAD = "-ahead"


def ahead_of(run_id: str, number: int) -> str:
    """Name the folder of what a backfill makes beside other runs; a new one for every plan that it makes."""
    return f"{run_id}{_AHEAD}{number}"


def run_of(name: str) -> str:
    """Return the run to which a folder below `runs/` or `vectors/` belongs."""
    return name.partition(_AHEAD)[0]
