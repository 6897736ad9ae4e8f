"""The audit: where shoppers contradict the labels, the strongest contradictions first, for a person to look at.

Engagement is evidence, not a label: clicks depend on position, price and picture. So a product is compared with the other
products of its query, and a contradiction must be larger than chance. Nothing here changes a label.
Axes: R rows, Q queries.
"""

# ruff: noqa: N803, N806 - arrays carry their shape in their names

from __future__ import annotations

import csv
import io
import json
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from encoder.errors import EncoderError
from encoder.examples import JUDGMENTS, Grades, conform, keys_of

KEY = ("locale", "query_id", "product_id")
COUNTS = ("impressions", "clicks", "purchases")
# How often a product was shown for a query, clicked, and bought (shown, and then bought: not pieces). An optional column
# `exposure` (double) is impressions weighed by the chance that a shopper looked at that position; where it is given,
# rates are by exposure, and positions are fair as far as it is.
ENGAGEMENT = pa.schema([*((name, pa.string()) for name in KEY), *((name, pa.int64()) for name in COUNTS)])
DISAGREEMENTS = pa.schema(
    [
        *((name, pa.string()) for name in ("query_id", "query", "locale", "product_id")),
        ("grade", pa.int8()),
        *((name, pa.string()) for name in ("kind", "signal")),
        *((name, pa.int64()) for name in COUNTS),
        *((name, pa.float64()) for name in ("rate", "expected_rate", "strength")),
        ("reason", pa.string()),
    ]
)
LOW_ENGAGED, HIGH_IGNORED = "low_grade_engaged", "high_grade_ignored"
Floats: TypeAlias = npt.NDArray[np.float64]

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")  # the wide ones count in East Asian spreadsheets


@dataclass(frozen=True, kw_only=True)
class AuditOptions:
    """How much evidence makes a contradiction, and how many are wanted.

    A rate is smoothed with `prior` exposures at the rate of the query's other products. `z` is how sure the bound on the rate
    is (1.96: 97.5 %); a product that nobody touched is ignored if `expected` touches or more would have been usual.
    """

    most: int = 1000
    per_query: int = 5
    min_impressions: int = 20
    min_touches: int = 2
    prior: float = 20.0
    z: float = 1.96
    expected: float = 4.0

    def __post_init__(self) -> None:
        if min(self.most, self.per_query, self.min_impressions, self.min_touches) < 1 or not (
            self.prior > 0 and self.z > 0 and self.expected > 0
        ):
            raise EncoderError(f"{self} cannot be: each of them is above 0.")


USUAL = AuditOptions()


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Rows of DISAGREEMENTS, the strongest first, and how many of what there were, left out ones included."""

    rows: pa.Table
    counts: Mapping[str, int]


def disagreements(engagement: pa.Table, judgments: pa.Table, *, grades: Grades | None = None, options: AuditOptions = USUAL) -> Audit:
    """Return labels that engagement contradicts: low grades that shoppers want, and high ones that they pass over.

    `strength` is the deviance of a product's clicks (or purchases) from the rate of its query's other products: twice the log
    of how much likelier its own rate makes them. Rows of one pair, such as those of several days, are added up.
    """
    scale = grades or Grades()
    labels, shown = _labels(judgments, scale), _shown(engagement)
    table = shown.join(labels, list(KEY), join_type="inner").sort_by([(name, "ascending") for name in KEY])
    # Rates come from all products that were shown, labelled or not.
    found = [_signal(table, shown, scale, options, signal) for signal in ("clicks", "purchases")]
    rows = pa.concat_tables(found).sort_by([("strength", "descending"), *((name, "ascending") for name in (*KEY, "signal"))])
    once = _first(rows, KEY, 1)
    kept = _first(once, KEY[:2], options.per_query)
    counts = {
        "labelled": table.num_rows,
        "engagement_without_label": shown.num_rows - table.num_rows,
        "labels_without_engagement": labels.num_rows - table.num_rows,
        "below_min_impressions": int(pc.sum(pc.less(table["impressions"], options.min_impressions)).as_py() or 0),
        LOW_ENGAGED: int(pc.sum(pc.equal(once["kind"], LOW_ENGAGED)).as_py() or 0),
        HIGH_IGNORED: int(pc.sum(pc.equal(once["kind"], HIGH_IGNORED)).as_py() or 0),
        "left_out_per_query": once.num_rows - kept.num_rows,
        "left_out_by_most": max(0, kept.num_rows - options.most),
    }
    return Audit(rows=kept.slice(0, options.most), counts=counts)


def write_csv(rows: pa.Table, path: Path) -> None:
    """Write rows for a spreadsheet: a text that it could take for a formula begins with an apostrophe."""
    written = io.StringIO(newline="")
    writer = csv.writer(written)
    writer.writerow(rows.column_names)
    for row in rows.to_pylist():
        writer.writerow([_harmless(value) if isinstance(value, str) else value for value in row.values()])
    _write(path, "\ufeff" + written.getvalue())  # the mark by which spreadsheets know UTF-8


def write_jsonl(rows: pa.Table, path: Path) -> None:
    """Write one JSON object a line, every text as it is."""
    _write(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows.to_pylist()))


def _shown(engagement: pa.Table) -> pa.Table:
    """Return engagement that can be counted with: one row a pair, and an exposure for each."""
    named = engagement.column_names
    schema = pa.schema([*ENGAGEMENT, ("exposure", pa.float64())]) if "exposure" in named else ENGAGEMENT
    table = conform(engagement, schema, "engagement rows")
    if "exposure" not in named:
        table = table.append_column("exposure", pc.cast(table["impressions"], pa.float64()))
    table = table.group_by(list(KEY)).aggregate([(name, "sum") for name in (*COUNTS, "exposure")])
    table = table.rename_columns([*KEY, *COUNTS, "exposure"])
    impressions, clicks, purchases = (table[name] for name in COUNTS)
    least = pc.min_element_wise(impressions, clicks, purchases)
    wrong = pc.or_(pc.less(least, 0), pc.greater(pc.max_element_wise(clicks, purchases), impressions))
    wrong = pc.or_(wrong, pc.invert(pc.and_(pc.is_finite(table["exposure"]), pc.greater_equal(table["exposure"], 0.0))))
    if bad := pc.sum(wrong).as_py():
        example = table.filter(wrong).slice(0, 1).to_pylist()[0]
        advice = "Count impressions that were clicked, and impressions that led to a purchase, once each"
        raise EncoderError(
            f"{bad} of {table.num_rows} pairs have negative counts, or more clicks or purchases than impressions: {example}. {advice}."
        )
    return table


def _labels(judgments: pa.Table, grades: Grades) -> pa.Table:
    labels = conform(judgments, JUDGMENTS, "judgments")
    if (twice := labels.num_rows - labels.group_by(list(KEY)).aggregate([]).num_rows) > 0:
        raise EncoderError(f"The judgments name {twice} pairs of a query and a product twice. Keep one row for each.")
    if bad := pc.sum(pc.or_(pc.less(labels["grade"], 0), pc.greater(labels["grade"], grades.best))).as_py():
        raise EncoderError(
            f"{bad} of {labels.num_rows} judgments have a grade outside 0 to {grades.best}. Give the grades that they are on."
        )
    return labels


def _signal(table: pa.Table, shown: pa.Table, grades: Grades, options: AuditOptions, signal: str) -> pa.Table:
    """Return the labels that one kind of engagement contradicts, as DISAGREEMENTS."""
    touched_R, exposure_R, usual_R = _rates(table, shown, options.prior, signal)
    grade_R, seen_R = table["grade"].to_numpy(), table["impressions"].to_numpy() >= options.min_impressions
    trials_R = exposure_R + options.prior
    rate_R = (touched_R + options.prior * usual_R) / trials_R
    low_R = (
        seen_R & (grade_R < grades.positive) & (touched_R >= options.min_touches) & (wilson_lower(rate_R, trials_R, z=options.z) > usual_R)
    )
    nobody_R = table["clicks"].to_numpy() + table["purchases"].to_numpy() == 0
    high_R = seen_R & (grade_R >= grades.positive) & nobody_R & (exposure_R * usual_R >= options.expected)
    rows = np.flatnonzero(low_R | high_R)
    strength_R = _deviance(touched_R, exposure_R, usual_R)
    reasons = [_reason(signal, str(grades.names[grade_R[row]]), touched_R[row], exposure_R[row], usual_R[row]) for row in rows.tolist()]
    added = {
        "kind": np.where(low_R, LOW_ENGAGED, HIGH_IGNORED)[rows].tolist(),
        "signal": [signal] * rows.size,
        "rate": rate_R[rows],
        "expected_rate": usual_R[rows],
        "strength": strength_R[rows],
        "reason": reasons,
    }
    chosen = table.take(pa.array(rows))
    return pa.table({name: added[name] if name in added else chosen[name] for name in DISAGREEMENTS.names}).cast(DISAGREEMENTS)


def _rates(table: pa.Table, shown: pa.Table, prior: float, signal: str) -> tuple[Floats, Floats, Floats]:
    """Return touches and exposure of each row, and the rate of the other products of its query, drawn to the rate of all."""
    queries, query_S = np.unique(keys_of("query id", shown["locale"], shown["query_id"]), return_inverse=True)
    touched_S, exposure_S = shown[signal].to_numpy().astype(np.float64), shown["exposure"].to_numpy()
    touched_Q = np.bincount(query_S, touched_S, queries.size)
    exposure_Q = np.bincount(query_S, exposure_S, queries.size)
    everyone = float(touched_S.sum() / max(exposure_S.sum(), 1.0))
    query_R = np.searchsorted(queries, keys_of("query id", table["locale"], table["query_id"]))
    touched_R, exposure_R = table[signal].to_numpy().astype(np.float64), table["exposure"].to_numpy()
    others_R = touched_Q[query_R] - touched_R + prior * everyone
    usual_R = others_R / (np.maximum(exposure_Q[query_R] - exposure_R, 0.0) + prior)
    return touched_R, exposure_R, np.clip(usual_R, 0.0, 1.0)


def wilson_lower(rate_R: Floats, trials_R: Floats, *, z: float) -> Floats:
    """Return the lower end of the Wilson score interval of rates that were seen in so many trials."""
    rate = np.clip(rate_R, 0.0, 1.0)  # with exposure below impressions a rate can pass 1
    middle = rate + z * z / (2 * trials_R)
    spread = z * np.sqrt(rate * (1 - rate) / trials_R + (z / (2 * trials_R)) ** 2)
    return np.asarray((middle - spread) / (1 + z * z / trials_R))


def _deviance(touched_R: Floats, exposure_R: Floats, usual_R: Floats) -> Floats:
    """Return 2 * (log likelihood at the own rate - log likelihood at the usual rate) of binomial counts."""
    trials_R = np.maximum(exposure_R, touched_R)
    tiny = np.finfo(np.float64).tiny
    usual_R = np.clip(usual_R, 1e-12, 1 - 1e-12)
    own_R = touched_R / np.maximum(trials_R, tiny)
    missed_R = trials_R - touched_R
    with_touch = touched_R * np.log(np.maximum(own_R, tiny) / usual_R)
    without = missed_R * np.log(np.maximum(1 - own_R, tiny) / (1 - usual_R))
    return np.asarray(2 * (with_touch + without))


def _reason(signal: str, grade: str, touched: float, exposure: float, usual: float) -> str:
    expected = exposure * usual
    if not touched:
        return f"labelled {grade}, shown {exposure:.0f} times without any {signal}; {expected:.1f} would be usual for this query"
    times = touched / expected if expected > 0 else math.inf
    told = f"{times:.1f} times the usual rate of this query" if math.isfinite(times) else "where this query has none"
    return f"labelled {grade}, but {touched:.0f} {signal} in {exposure:.0f} views, {told}"


def _first(rows: pa.Table, names: tuple[str, ...], most: int) -> pa.Table:
    """Return the first rows of each key, so many of each, in their order."""
    if not rows.num_rows:
        return rows
    keys = keys_of("rows", *(rows[name] for name in names))
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.diff(keys[order], prepend=-1))
    place = np.empty(keys.size, np.int64)
    place[order] = np.arange(keys.size) - np.repeat(starts, np.diff(starts, append=keys.size))
    return rows.filter(pa.array(place < most))


def _harmless(text: str) -> str:
    """Return a cell that no spreadsheet runs: some skip spaces before they look for a formula."""
    return f"'{text}" if text.startswith(_FORMULA) or text.lstrip().startswith(_FORMULA) else text


def _write(path: Path, text: str) -> None:
    """Write it whole or not at all."""
    own = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    try:
        own.write_bytes(text.encode("utf-8"))
        own.replace(path)
    finally:
        own.unlink(missing_ok=True)
