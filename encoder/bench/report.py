"""What a person reads: a table of plain text, and a chart as SVG, both from the same plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

_COLUMNS = ("", "texts/s", "tokens/s", "ratio (min-median-max)", "of limit", "CPU s", "CPU ratio", "grew MiB", "min cosine")
_ROW_PX, _LABEL_PX, _BAR_PX, _HEAD_PX, _SIDE_PX = 24, 430, 420, 54, 16
_COLOURS = {"ours": "#0b6e4f", "padded": "#69b39a", "limit": "#b8b8b8", "limit-linear": "#d4d4d4"}
_COLOUR = "#4a6fa5"


def table(result: Mapping[str, Any]) -> str:
    """Return the lines of one contest, the fastest first, those left out with their reasons, and the latency of a query."""
    rows = [_COLUMNS, *(_cells(line) for line in result["rivals"] if line["status"] == "measured")]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    lines = [_title(result)]
    for row in rows:
        cells = [
            cell.ljust(width) if not column else cell.rjust(width) for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    lines += [f"{line['label']}: {line['status']}. {line['reason']}" for line in result["rivals"] if line["status"] != "measured"]
    return "\n".join([*lines, *_notes(result)])


def _title(result: Mapping[str, Any]) -> str:
    tower, corpus = result["tower"], result["corpus"]
    return f"{tower['label']}, {corpus['name']}, {tower['dtype']} on {tower['device']}, {tower['threads']} threads"


def _cells(line: Mapping[str, Any]) -> tuple[str, ...]:
    cpu = [seconds for seconds in line["cpu_s"] if seconds is not None]
    ratio, share, grown = line["ratio"], line["of_limit"], line["grown_mib"]
    return (
        line["label"],
        f"{line['texts_per_s']['median']:,.1f}",
        f"{line['tokens_per_s']['median']:,.0f}",
        f"{ratio['min']:.2f}-{ratio['median']:.2f}-{ratio['max']:.2f}" if ratio else "-",
        f"{share['median']:.2f}" if share else "-",
        f"{min(cpu):.2f}" if cpu else "-",
        f"{line['cpu_ratio']['median']:.2f}" if "cpu_ratio" in line else "-",
        f"{grown:,.0f}" if grown is not None else "-",
        f"{line['cosine']['min']:.6f}" if "cosine" in line else "-",
    )


def _notes(result: Mapping[str, Any]) -> list[str]:
    """Return what the table does not say of itself."""
    measured = [line for line in result["rivals"] if line["status"] == "measured"]
    notes = []
    if baseline := next((line for line in measured if line["name"] == line["baseline"]), None):
        notes.append(f"Ratios are to {baseline['label']} ({_settings(baseline)}).")
    for line in measured:
        if line["name"] == "ours":
            notes.append(f"Ours ran with {_settings(line)}.")
        if line["name"] == "ours" and "of_limit_of_different_texts" in line:
            notes.append(f"Of the limit of its different texts, ours reached {line['of_limit_of_different_texts']['median']:.2f}.")
        if line["name"] == "ours" and "cpu_ratio" in line:
            share = f", {line['cpu_of_limit']['median']:.2f} of the limit" if "cpu_of_limit" in line else ""
            notes.append(f"By CPU seconds, which a busy machine disturbs less: {line['cpu_ratio']['median']:.2f} of the baseline{share}.")
        if line["name"] == "ours" and "mfu" in line:
            peak = f", {line['mfu_of_peak']:.1%} of the given peak" if line["mfu_of_peak"] else ""
            notes.append(
                f"Ours reached {line['tflops']:.4g} TFLOP/s: {line['mfu']:.1%} of the device's own {result['matrix_tflops']:.4g}{peak}."
            )
    parts = [line for line in measured if line["texts"] < result["corpus"]["texts"]]
    if parts:
        notes.append(
            f"On the first {parts[0]['texts']:,} texts, a fair part for who works in their order: {', '.join(line['name'] for line in parts)}."
        )
    notes += [f"{name}: {way['way']}." for name, way in result["limit"]["ways"].items()]
    notes.append(f"Vectors of different texts have a cosine of {result['between_texts']:.2f} in the mean.")
    ours, bare, ratio = (result["latency"][name] for name in ("ours", "bare", "ratio"))
    notes.append(
        f"One query: p50 {ours['p50_ms']:.2f} ms, p95 {ours['p95_ms']:.2f} ms; the bare model and tokenizer {bare['p50_ms']:.2f} and "
        f"{bare['p95_ms']:.2f}: {ratio['p50_ms']:.2f} and {ratio['p95_ms']:.2f} of it."
    )
    return notes


def _settings(line: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in line["settings"].items() if not isinstance(value, dict))


def chart(results: Sequence[Mapping[str, Any]], *, machine: Mapping[str, Any]) -> str:
    """Return bars of tokens a second for each contest, as an SVG document."""
    panels: list[str] = []
    top = _SIDE_PX
    for result in results:
        lines = [line for line in result["rivals"] if line["status"] == "measured"]
        panels.append(_panel(_title(result), lines, top))
        top += _HEAD_PX + _ROW_PX * len(lines)
    width = _LABEL_PX + _BAR_PX + 200
    where = machine["gpu"]["name"] if "gpu" in machine else f"{machine['cpu']}, {machine['threads']} threads"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{top + 2 * _SIDE_PX}" font-family="sans-serif" font-size="13">',
            f'<rect width="{width}" height="{top + 2 * _SIDE_PX}" fill="white"/>',
            *panels,
            f'<text x="{_SIDE_PX}" y="{top + _SIDE_PX}" fill="#666">{escape(where)}, torch {escape(machine["versions"]["torch"])}</text>',
            "</svg>\n",
        ]
    )


def _panel(title: str, lines: Sequence[Mapping[str, Any]], top: int) -> str:
    """Return the bars of one contest: the median, and a whisker from the slowest round to the fastest."""
    most = max((line["tokens_per_s"]["max"] for line in lines), default=1.0)
    parts = [f'<text x="{_SIDE_PX}" y="{top + 18}" font-size="15" font-weight="bold">{escape(title)}</text>']
    for number, line in enumerate(lines):
        y = top + 30 + number * _ROW_PX
        low, middle, high = (line["tokens_per_s"][name] / most * _BAR_PX for name in ("min", "median", "max"))
        ratio = f", {line['ratio']['median']:.2f}x" if line["ratio"] else ""
        colour = _COLOURS.get(line["name"], _COLOUR)
        parts += [
            f'<text x="{_LABEL_PX - 8}" y="{y + 13}" text-anchor="end">{escape(line["label"])}</text>',
            f'<rect x="{_LABEL_PX}" y="{y}" width="{middle:.1f}" height="{_ROW_PX - 7}" fill="{colour}"/>',
            f'<line x1="{_LABEL_PX + low:.1f}" x2="{_LABEL_PX + high:.1f}" y1="{y + 8}" y2="{y + 8}" stroke="black"/>',
            f'<text x="{_LABEL_PX + high + 6:.1f}" y="{y + 13}">{line["tokens_per_s"]["median"]:,.0f} tokens/s{ratio}</text>',
        ]
    return "\n".join(parts)
