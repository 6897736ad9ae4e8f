"""What a training run wrote, line by line, and its picture: one curve a number over the steps, as plain SVG."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from encoder.errors import EncoderError

METRICS = "metrics.jsonl"

_WIDTH_PX, _PANEL_PX, _LEFT_PX, _RIGHT_PX, _TOP_PX, _BOTTOM_PX = 900, 150, 90, 20, 30, 24
_COLOUR, _DOTS_UP_TO = "#0b6e4f", 60


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Add one line. A number that is not finite is written as null, for JSON has no other word for it."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({name: _finite(value) for name, value in line.items()}, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines in their order. A torn last line, of a process that died, is no line."""
    if not path.is_file():
        return []
    lines = []
    pieces = path.read_text(encoding="utf-8").split("\n")
    for number, piece in enumerate(pieces[:-1], 1):
        try:
            line = json.loads(piece)
        except ValueError as error:
            raise EncoderError(f"{path}, line {number} is no JSON: {str(error)[:100]}. Take the line away.") from error
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            raise EncoderError(f"{path}, line {number} has no step. Take the line away.")
        lines.append(line)
    return lines


def drop_lines_after(path: Path, step: int) -> int:
    """Rewrite the file without the lines past a step, and return how many went: the steps are run again."""
    if not path.is_file():
        return 0
    lines = read_lines(path)
    kept = [line for line in lines if line["step"] <= step]
    beside = path.with_name(f".{path.name}.new")
    with beside.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, allow_nan=False) + "\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    return len(lines) - len(kept)


def write_curves(metrics: Path, target: Path, *, title: str = "") -> None:
    """Draw the numbers of a metrics file into an SVG file."""
    target.write_text(curves(read_lines(metrics), title=title), encoding="utf-8")


def curves(lines: Sequence[Mapping[str, Any]], *, title: str = "") -> str:
    """Return an SVG document with a panel for each number that the lines carry, in the order in which they first appear."""
    names = dict.fromkeys(name for line in lines for name, value in line.items() if name != "step" and _is_number(value))
    height = 2 * _TOP_PX + _PANEL_PX * max(1, len(names))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH_PX}" height="{height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH_PX}" height="{height}" fill="white"/>',
        f'<text x="16" y="20" font-size="15" font-weight="bold">{escape(title or "Training")}</text>',
    ]
    if not names:
        parts.append('<text x="16" y="60">No step was logged.</text>')
    for number, name in enumerate(names):
        points = [(int(line["step"]), float(line[name])) for line in lines if _is_number(line.get(name))]
        parts += _panel(str(name), points, top=_TOP_PX + _PANEL_PX * number)
    return "\n".join([*parts, "</svg>\n"])


def _panel(name: str, points: Sequence[tuple[int, float]], *, top: int) -> list[str]:
    """Return one curve with its range: lowest and highest value on the left, first and last step below."""
    steps, values = [step for step, _ in points], [value for _, value in points]
    low, high, first, last = min(values), max(values), min(steps), max(steps)
    left, right, upper, lower = _LEFT_PX, _WIDTH_PX - _RIGHT_PX, top + _TOP_PX, top + _PANEL_PX - _BOTTOM_PX
    places = [
        (left + (step - first) / max(1, last - first) * (right - left), lower - _share(value, low, high) * (lower - upper))
        for step, value in points
    ]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dots = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" fill="{_COLOUR}"/>' for x, y in places] if len(places) <= _DOTS_UP_TO else []
    return [
        f'<text x="{left}" y="{upper - 8}" font-weight="bold">{escape(name)}, last {values[-1]:.5g}</text>',
        f'<path d="M{left} {upper}V{lower}H{right}" fill="none" stroke="#b8b8b8"/>',
        f'<polyline points="{path}" fill="none" stroke="{_COLOUR}" stroke-width="1.5"/>',
        *dots,
        f'<text x="{left - 6}" y="{upper + 10}" text-anchor="end" fill="#666">{high:.5g}</text>',
        f'<text x="{left - 6}" y="{lower}" text-anchor="end" fill="#666">{low:.5g}</text>',
        f'<text x="{left}" y="{lower + 14}" fill="#666">step {first}</text>',
        f'<text x="{right}" y="{lower + 14}" text-anchor="end" fill="#666">step {last}</text>',
    ]


def _share(value: float, low: float, high: float) -> float:
    """Return where a value lies between the lowest and the highest; halved first, for their distance may be past any float."""
    span = high / 2 - low / 2
    return (value / 2 - low / 2) / span if span > 0 else 0.5


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
