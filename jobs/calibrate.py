"""Calibration: what a generation's scores mean, as probabilities, kept in the store under the generation's name.

A generation never changes, and more people may judge tomorrow: so a calibration is a version of its own beside it, and the
newest one holds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from encoder.examples import keys_of
from encoder.records import parse_record, recorded_split
from encoder.registry import RECORD
from encoder.relevance import Calibration, CalibrationOptions, calibrate
from encoder.splits import split
from jobs.inspect import named, reader, require_store
from jobs.material import grades_of, judgments_of, products_of
from jobs.settings import Settings
from pipelines.errors import InputError, NotFound
from pipelines.layout import printable_lines
from pipelines.manifest import check_generation
from pipelines.schema import ID, VECTOR
from pipelines.storage import Store

_FOLDER = "calibrations"


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """A calibration of a generation, where it lies, and how many judged products the generation does not hold, where that is known."""

    generation: str
    key: str
    calibration: Calibration
    pairs: int
    missing: int | None


def calibrate_generation(
    settings: Settings,
    *,
    generation: str | None = None,
    judgments: Path | None = None,
    queries: Path | None = None,
    options: CalibrationOptions | None = None,
    all_queries: bool = False,
) -> Calibrated:
    """Score what people judged with the vectors that a generation serves, fit the curves, and keep them in the store.

    Queries that the generation's tower was trained on are left out unless `all_queries` are wanted: it knows their answers.
    """
    products = products_of(settings)
    graded = judgments_of(settings, products, path=judgments, queries=queries)
    with reader(settings, generation=generation) as followed:
        opened = followed.opened
        graded = graded if all_queries else _unseen(require_store(settings), opened.manifest.tower, graded)
        ids = pc.unique(graded["product_id"])
        rows = opened.table.rows(ids.to_pylist(), [ID, VECTOR])
        at = pc.index_in(graded["product_id"].combine_chunks(), rows[ID].combine_chunks())
        there = pc.is_valid(at)
        kept, at = graded.filter(there).combine_chunks(), at.filter(there).to_numpy()
        if not kept.num_rows:
            raise InputError(f"{opened.manifest.generation} holds none of {graded.num_rows} judged products. Check ids of the judgments.")
        asked = kept["query"].combine_chunks().dictionary_encode()
        vectors = np.stack([opened.embed(query) for query in asked.dictionary.to_pylist()])
        matrix = np.stack(rows[VECTOR].to_numpy(zero_copy_only=False)).astype(np.float32)
        scores = np.einsum("nd,nd->n", vectors[asked.indices.to_numpy()], matrix[at])
        manifest = opened.manifest
    found = calibrate(scores, kept, tower=manifest.tower, grades=grades_of(settings), verticals=_verticals(products, kept), options=options)
    data = found.to_json()
    key = f"{_FOLDER}/{manifest.generation}/{_next(require_store(settings), manifest.generation):08d}-{hashlib.sha256(data).hexdigest()[:16]}.json"
    require_store(settings).put_if_absent(key, data)
    return Calibrated(
        generation=manifest.generation, key=key, calibration=found, pairs=kept.num_rows, missing=graded.num_rows - kept.num_rows
    )


def _unseen(store: Store, tower: str, graded: pa.Table) -> pa.Table:
    """Leave out the queries that a tower's record says it was trained on."""
    key = f"towers/{tower[:16]}/{RECORD}"
    record = parse_record(store.get(key) if store.head(key) else None, store.uri(key))
    by = recorded_split(record, store.uri(key))
    if by is None:
        return graded
    parts = split(graded, **by)
    kept = pa.concat_tables([parts.dev, parts.test])
    if not kept.num_rows:
        raise InputError("the tower was trained on every judged query, and knows their answers. Judge more, or take --all-queries.")
    return kept.combine_chunks()


def calibration_of(settings: Settings, *, generation: str | None = None) -> Calibrated:
    """Read the newest calibration of a generation, after comparing its bytes with its name."""
    store, manifest = require_store(settings), named(settings, generation)
    keys = _keys(store, manifest.generation)
    if not keys:
        raise NotFound(f"{manifest.generation} was never calibrated. Run `catalog-embed calibrate` with judgments.")
    data = store.get(keys[-1])
    if hashlib.sha256(data).hexdigest()[:16] != Path(keys[-1]).stem.rpartition("-")[2]:
        raise InputError(f"{store.uri(keys[-1])} was changed after it was written. Run `catalog-embed calibrate` again.")
    found = Calibration.from_json(data)
    if found.tower != manifest.tower:
        raise InputError(f"{store.uri(keys[-1])} is of the tower {found.tower[:12]}, and {manifest.generation} of {manifest.tower[:12]}.")
    return Calibrated(generation=manifest.generation, key=keys[-1], calibration=found, pairs=found.strata[0].pairs, missing=None)


def relevant(settings: Settings, rows: Sequence[Mapping[str, Any]], *, generation: str, least: float) -> list[dict[str, Any]]:
    """Return answers with P(relevant) by the newest calibration of their generation, without those below `least`."""
    chances, _ = calibration_of(settings, generation=generation).calibration.probabilities([row["score"] for row in rows])
    found = [{**row, "p_relevant": round(float(chance), 4)} for row, chance in zip(rows, chances, strict=True)]
    return [row for row in found if row["p_relevant"] >= least]


def calibration_text(found: Calibrated) -> str:
    """Return the strata, their errors, and the scores at which probabilities are reached, for a person."""
    lacking = "" if found.missing is None else f", {found.missing:,} of products that it does not hold"
    lines = [f"Calibration  {found.generation}  {found.pairs:,} pairs judged{lacking}", f"  kept as      {found.key}"]
    lines.append(
        f"  {'stratum':<24} {'pairs':>7} {'queries':>8}  {'rate':>6} {'ece':>6} {'brier':>6}   score for P(relevant) of .5, .8 and .9"
    )
    few = [f"{item.kind} {item.name}" for item in found.calibration.strata if item.relevant is None]
    for item in found.calibration.strata:
        name, fit = f"{item.kind} {item.name}".strip()[:24], item.relevant
        if fit is None:
            continue
        at = ", ".join("-" if (score := fit.curve.score_at(goal)) is None else f"{score:.3f}" for goal in (0.5, 0.8, 0.9))
        lines.append(f"  {name:<24} {item.pairs:>7,} {item.queries:>8,}  {fit.rate:6.3f} {fit.ece:6.3f} {fit.brier:6.3f}   {at}")
    if few:
        lines.append(f"  too few pairs for curves of their own, so the overall ones hold: {', '.join(few)}")
    return printable_lines(lines)


def _keys(store: Store, generation: str) -> list[str]:
    check_generation(generation)
    return sorted(info.key for info in store.list(f"{_FOLDER}/{generation}"))


def _next(store: Store, generation: str) -> int:
    """Return the number of the next version."""
    keys = _keys(store, generation)
    return int(Path(keys[-1]).name.partition("-")[0]) + 1 if keys else 1


def _verticals(products: pa.Table, graded: pa.Table) -> list[str]:
    """Return the vertical of each judged product."""
    keys = {key: row for row, key in enumerate(keys_of("product", products["locale"], products["product_id"]).tolist())}
    names = products["vertical"].to_pylist()
    found = keys_of("product", graded["locale"], graded["product_id"]).tolist()
    return [names[keys[key]] if key in keys else "" for key in found]
