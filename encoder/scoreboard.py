"""Systems side by side: every metric with its interval, and every difference to a baseline, corrected for being one of many.

All systems and metrics see the same resamples of the queries. Holm's family is the metrics of a system in the table of all
queries, and the strata of a system and metric in the tables of strata.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from encoder.errors import EncoderError
from encoder.evaluation import Evaluation
from encoder.significance import BootstrapOptions, Difference, Estimate, differences, estimates, holm

FORMAT_VERSION = 1

_WIDTH = 140
_MOST_NAME = 24
_FEWEST = 30  # queries of a stratum: an interval of fewer says nothing, and costs the others in Holm's correction


@dataclass(frozen=True, kw_only=True)
class System:
    """A row of the board; `fingerprint` is the tower's, or whatever else says which version this was."""

    name: str
    evaluation: Evaluation
    fingerprint: str = ""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A metric of a system, over all queries (`stratum` and `value` empty) or those of a stratum, and its difference to the baseline.

    `p_holm` is corrected; the baseline itself has no difference.
    """

    system: str
    metric: str
    stratum: str
    value: str
    estimate: Estimate
    difference: Difference | None
    p_holm: float | None


@dataclass(frozen=True, kw_only=True)
class Scoreboard:
    """What was measured; `left_out` names the strata with too few queries."""

    baseline: str
    queries: int
    bootstrap: BootstrapOptions
    systems: Mapping[str, str]
    metrics: tuple[str, ...]
    cells: tuple[Cell, ...]
    pooled: Mapping[str, Mapping[str, float | None]]
    left_out: tuple[str, ...]

    def to_json(self) -> bytes:
        """Return the canonical bytes: equal boards are equal bytes, and every number is finite or null."""
        tree = {"format_version": FORMAT_VERSION, **asdict(self)}
        return json.dumps(tree, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n"

    def to_text(self) -> str:
        """Return the tables for a person, at most 140 columns wide."""
        level = f"{100 * self.bootstrap.level:g} % intervals of {self.bootstrap.resamples} resamples"
        parts = [f"{self.queries} queries; {level}; baseline {_plain(self.baseline)}"]
        overall = [cell for cell in self.cells if not cell.stratum]
        parts += _tables(overall, "system", lambda cell: cell.system)
        if any(self.pooled.values()):
            parts += _pooled(self.pooled)
        if any(cell.difference for cell in overall):
            parts += ["Difference to the baseline", *_differences(overall)]
        for stratum in dict.fromkeys(cell.stratum for cell in self.cells if cell.stratum):
            chosen = [cell for cell in self.cells if cell.stratum == stratum]
            parts += [
                f"By {stratum}",
                *_tables(chosen, stratum, lambda cell: f"{_plain(cell.value, 16) or '(none)'} / {_plain(cell.system)}"),
            ]
            parts += _differences([cell for cell in chosen if cell.difference])
        if self.left_out:
            parts.append(f"Left out, fewer than {_FEWEST} queries: {_plain(', '.join(self.left_out), 100)}")
        return "\n\n".join(parts) + "\n"


def scoreboard(
    systems: Sequence[System],
    *,
    baseline: str,
    bootstrap: BootstrapOptions | None = None,
    strata_metrics: Sequence[str] = (),
) -> Scoreboard:
    """Compare systems over the same queries; without `strata_metrics` the first recall and NDCG are taken apart by stratum."""
    bootstrap = bootstrap or BootstrapOptions()
    first = _checked(systems, baseline)
    usual = [next((name for name in first.metrics if name.startswith(prefix)), None) for prefix in ("recall_", "ndcg@")]
    wanted = tuple(strata_metrics) or tuple(name for name in usual if name)
    unknown = [name for name in wanted if name not in first.metrics]
    if unknown:
        raise EncoderError(f"There is no metric {', '.join(unknown)}. Choose from {', '.join(first.metrics)}.")
    everyone = np.ones(len(first.per_query), bool)
    cells = _by_system(_cells(systems, baseline, first.metrics, ("", "", everyone), bootstrap))
    left_out = []
    split: list[Cell] = []
    for stratum in first.strata:
        column = np.array(first.per_query[stratum].to_pylist(), dtype=np.str_)
        for value in np.unique(column).tolist():
            rows = column == value
            if rows.sum() < _FEWEST:
                left_out.append(f"{stratum}={value} ({int(rows.sum())})")
            elif not rows.all():  # a stratum of all queries is the table above
                split += _cells(systems, baseline, wanted, (stratum, value, rows), bootstrap)
    return Scoreboard(
        baseline=baseline,
        queries=len(first.per_query),
        bootstrap=bootstrap,
        systems={system.name: system.fingerprint for system in systems},
        metrics=first.metrics,
        cells=(*cells, *_by_system_and_metric(split)),
        pooled={system.name: dict(system.evaluation.pooled) for system in systems},
        left_out=tuple(left_out),
    )


def write_per_query(systems: Sequence[System], path: Path) -> None:
    """Write one Parquet row for each system and query, with all strata and metrics."""
    tables = []
    for system in systems:
        table = system.evaluation.per_query
        tables.append(table.add_column(0, "system", pa.array([system.name] * len(table), pa.string())))
    pq.write_table(pa.concat_tables(tables, promote_options="default"), path)


def _checked(systems: Sequence[System], baseline: str) -> Evaluation:
    """Return the evaluation of the baseline, after checking that all have its queries, metrics and strata."""
    names = [system.name for system in systems]
    if len(set(names)) < len(names) or baseline not in names:
        raise EncoderError(f"The systems are {names} and the baseline is {baseline!r}. Name each once, and one of them as baseline.")
    first = systems[names.index(baseline)].evaluation
    for system in systems:
        other = system.evaluation
        for what, found, wanted in (
            ("queries", other.per_query["query_id"].combine_chunks(), first.per_query["query_id"].combine_chunks()),
            ("metrics", other.metrics, first.metrics),
            ("strata", other.strata, first.strata),
        ):
            if found != wanted:
                raise EncoderError(f"{system.name} has other {what} than {baseline}. Evaluate both on the same judgments, in one way.")
    return first


def _cells(
    systems: Sequence[System],
    baseline: str,
    metrics: Sequence[str],
    part: tuple[str, str, npt.NDArray[np.bool_]],
    bootstrap: BootstrapOptions,
) -> list[Cell]:
    """Measure some metrics over the queries of one stratum, without correction."""
    stratum, value, rows = part
    values = {system.name: np.column_stack([system.evaluation.values(metric)[rows] for metric in metrics]) for system in systems}
    cells = []
    for name, matrix in values.items():
        found = estimates(matrix, bootstrap)
        compared = [None] * len(metrics) if name == baseline else differences(matrix, values[baseline], bootstrap)
        for metric, estimate, difference in zip(metrics, found, compared, strict=True):
            cell = Cell(system=name, metric=metric, stratum=stratum, value=value, estimate=estimate, difference=difference, p_holm=None)
            cells.append(cell)
    return cells


def _by_system(cells: Iterable[Cell]) -> list[Cell]:
    return _corrected(cells, lambda cell: (cell.system, ""))


def _by_system_and_metric(cells: Iterable[Cell]) -> list[Cell]:
    return _corrected(cells, lambda cell: (cell.system, cell.metric))


def _corrected(cells: Iterable[Cell], family: Callable[[Cell], tuple[str, str]]) -> list[Cell]:
    """Return the cells in their order, each p corrected within its family; what could not be compared asks no question."""
    cells = list(cells)
    families: dict[tuple[str, str], dict[int, float]] = {}
    for number, cell in enumerate(cells):
        if cell.difference is not None and cell.difference.p is not None:
            families.setdefault(family(cell), {})[number] = cell.difference.p
    for raw in families.values():
        for number, p in zip(raw, holm(list(raw.values())), strict=True):
            cells[number] = replace(cells[number], p_holm=p)
    return cells


def _tables(cells: Sequence[Cell], corner: str, row_name: Callable[[Cell], str]) -> list[str]:
    """Lay out means with intervals and counts: rows as named, a column for each metric, as many tables as the width asks for."""
    rows = list(dict.fromkeys(row_name(cell) for cell in cells))
    metrics = list(dict.fromkeys(cell.metric for cell in cells))
    shown = {(row_name(cell), cell.metric): _estimate(cell.estimate) for cell in cells}
    columns = [[_plain(metric), *(shown[row, metric] for row in rows)] for metric in metrics]
    return _fitted([corner, *rows], columns)


def _pooled(pooled: Mapping[str, Mapping[str, float | None]]) -> list[str]:
    names = list(dict.fromkeys(name for row in pooled.values() for name in row))
    columns = [[_plain(name), *(_number(row.get(name)) for row in pooled.values())] for name in names]
    return ["Pooled over all pairs", *_fitted(["system", *pooled], columns)]


def _differences(cells: Sequence[Cell]) -> list[str]:
    """Lay out the comparisons, one a line."""
    lines = [["system", "metric", "stratum", "difference", "interval", "p", "p (Holm)", "detectable", "queries"]]
    for cell in cells:
        found = cell.difference
        if found is not None:
            interval = "-" if found.mean is None else f"[{found.low:+.4f}, {found.high:+.4f}]"
            values = (_signed(found.mean), interval, _number(found.p, 4), _number(cell.p_holm, 4), _number(found.mde, 4), str(found.count))
            lines.append([_plain(cell.system), _plain(cell.metric), _plain(cell.value, 16), *values])
    return [_aligned(lines)] if len(lines) > 1 else []


def _fitted(labels: Sequence[str], columns: Sequence[Sequence[str]]) -> list[str]:
    """Return tables no wider than the page, each with the labels on the left."""
    left = [_plain(label, 2 * _MOST_NAME) for label in labels]
    room = _WIDTH - max(map(len, left))
    tables: list[list[Sequence[str]]] = [[]]
    used = 0
    for column in columns:
        width = 2 + max(map(len, column))
        if tables[-1] and used + width > room:
            tables.append([])
            used = 0
        tables[-1].append(column)
        used += width
    return [_aligned(list(zip(left, *chosen, strict=True))) for chosen in tables if chosen]


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def _estimate(found: Estimate) -> str:
    if found.mean is None:
        return "- (0)"
    return f"{found.mean:.3f} [{found.low:.3f}, {found.high:.3f}] ({found.count})"


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.4f}"


def _plain(text: str, most: int = _MOST_NAME) -> str:
    """Return a name that cannot break a table or steer a terminal: no control characters, and not too long."""
    clean = "".join(sign if sign.isprintable() else " " for sign in text)
    return clean if len(clean) <= most else clean[: most - 1] + "…"
