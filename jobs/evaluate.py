"""Evaluation: towers beside plain words and beside both fused, on the whole catalog or a pool of it, with intervals."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from encoder.contenders import BM25, Arena, Contender
from encoder.errors import EncoderError
from encoder.examples import keys_of
from encoder.inference import EncodeOptions, Encoder
from encoder.lexical import Fusion
from encoder.records import read_record, recorded_split
from encoder.relevance import CalibrationOptions, calibrate
from encoder.scoreboard import Scoreboard, scoreboard, write_per_query
from encoder.significance import BootstrapOptions
from encoder.splits import split
from jobs.material import grades_of, judgments_of, made_folder, products_of
from jobs.nightly import tower_directory, tower_options
from jobs.settings import Settings
from pipelines.errors import InputError
from pipelines.layout import printable

SPLITS = ("all", "train", "dev", "test")
FUSED = "+bm25"
_ANY_PAIRS = CalibrationOptions(min_pairs=1, min_outcomes=10)


@dataclass(frozen=True, kw_only=True)
class EvalRequest:
    """What is measured: towers (none: the configured one), on which judgments and which side of the split that training makes.

    A side is that of the split in the towers' records. `pool` measures over the judged products and so many others instead of
    all: quick, and easier than the catalog.
    """

    towers: Sequence[Path] = ()
    judgments: Path | None = None
    queries: Path | None = None
    side: str = "all"
    seed: int = 0
    pool: int | None = None
    fusion: Fusion = "rrf"
    resamples: int = 10_000
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.side not in SPLITS:
            raise InputError(f"the side is `{self.side}`. Choose one of {', '.join(SPLITS)}.")
        if self.pool is not None and self.pool < 0:
            raise InputError(f"a pool of {self.pool} products cannot be. Give 0 or more, or leave it out for the whole catalog.")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The board, what answered, and what it is about: products searched, pairs judged, pairs whose product is not there."""

    board: Scoreboard
    contenders: Mapping[str, Contender]
    arena: Arena
    products: int

    def write(self, folder: Path) -> Mapping[str, str]:
        """Write the board as JSON and as text, and every query of every system as Parquet."""
        made_folder(folder)
        (folder / "eval.json").write_bytes(self.board.to_json())
        (folder / "eval.txt").write_text(self.board.to_text(), encoding="utf-8")
        write_per_query([item.system for item in self.contenders.values()], folder / "per_query.parquet")
        return {name: str(folder / name) for name in ("eval.json", "eval.txt", "per_query.parquet")}


def evaluate(settings: Settings, request: EvalRequest) -> Measured:
    """Measure the towers, the first of them as the baseline, beside BM25 and fused with it."""
    products = products_of(settings)
    judgments = judgments_of(settings, products, path=request.judgments, queries=request.queries)
    towers = request.towers or [tower_directory(settings)]
    if request.side != "all":
        judgments = getattr(split(judgments, **split_of(towers)), request.side)
        if not judgments.num_rows:
            raise InputError(f"the {request.side} side of the split has no query. Judge more queries, or measure all of them.")
    return measured(settings, products, judgments, dict(zip(named(towers), towers, strict=True)), request)


def measured(settings: Settings, products: pa.Table, judgments: pa.Table, towers: Mapping[str, Path], request: EvalRequest) -> Measured:
    """Measure towers by name on products and judgments that were read already."""
    arena = Arena.of(_pooled(products, judgments, request), judgments, grades_of(settings))
    words = arena.lexical()
    found = {BM25: words}
    for name, directory in towers.items():
        encoder = Encoder(directory, tower=tower_options(settings), options=EncodeOptions(device=request.device))
        found[name] = arena.tower(name, encoder, fingerprint=encoder.fingerprint)
        found[name + FUSED] = arena.fused(name + FUSED, [found[name], words], method=request.fusion)
    board = scoreboard(
        [item.system for item in found.values()],
        baseline=next(iter(towers)),
        bootstrap=BootstrapOptions(resamples=request.resamples, seed=request.seed),
    )
    return Measured(board=board, contenders=found, arena=arena, products=arena.products.num_rows)


def split_of(towers: Sequence[Path]) -> Mapping[str, Any]:
    """Return the split that these towers were trained by, from their records: another one would measure on what they have seen."""
    found = {tower: said for tower in towers if (said := split_by(tower)) is not None}
    splits = {json.dumps(said, sort_keys=True) for said in found.values()}
    if not splits:
        raise InputError(
            "none of these towers was trained here, so there is no split to take a side of. Measure all judgments: --side all."
        )
    if len(splits) > 1:
        shown = "; ".join(f"{tower}: {dict(said)}" for tower, said in found.items())
        raise InputError(f"the towers were trained by different splits ({shown}), and no side is unseen by all. Measure them apart.")
    return next(iter(found.values()))


def calibration_errors(found: Measured) -> Mapping[str, Mapping[str, float]]:
    """Return how far P(relevant) and P(best grade) by score are off, for each system whose pairs have a score: on unseen queries."""
    errors = {}
    for name, contender in found.contenders.items():
        if contender.scores_N is None:
            continue
        try:
            fitted = calibrate(contender.scores_N, found.arena.judgments, tower=name, grades=found.arena.grades, options=_ANY_PAIRS)
        except EncoderError:  # too few outcomes of one kind for any curve
            continue
        whole = fitted.stratum()
        if whole.relevant is not None and whole.best is not None:
            errors[name] = {
                "relevant": round(whole.relevant.ece, 4),
                "best": round(whole.best.ece, 4),
                "brier": round(whole.relevant.brier, 4),
            }
    return errors


def errors_text(errors: Mapping[str, Mapping[str, float]]) -> str:
    """Return them for a person."""
    if not errors:
        return "\nToo few judged pairs to say how well scores can be calibrated.\n"
    lines = [f"  {printable(name):<24} {row['relevant']:.3f}      {row['best']:.3f}  {row['brier']:.3f}" for name, row in errors.items()]
    head = f"\nCalibration error by score, on unseen queries\n\n  {'system':<24} P(relevant)  P(best)  Brier\n"
    return head + "\n".join(lines) + "\n"


def split_by(tower: Path) -> Mapping[str, Any] | None:
    """Return the shares and the seed by which a tower's queries were split, or None where its record names none."""
    return recorded_split(read_record(tower), str(tower))


def named(towers: Sequence[Path]) -> list[str]:
    """Return a short name for each tower, of its folder, and of those above where names would be equal."""
    parts = 1
    while True:
        names = ["/".join(tower.resolve().parts[-parts:]).replace(FUSED, "") for tower in towers]
        if len({*names, BM25, ""}) == len(names) + 2 or parts > max(len(tower.resolve().parts) for tower in towers):
            break
        parts += 1
    if len({*names, BM25, ""}) < len(names) + 2:
        raise InputError(f"the towers are {', '.join(map(str, towers))}. Name each once, and none `{BM25}`.")
    return names


def _pooled(products: pa.Table, judgments: pa.Table, request: EvalRequest) -> pa.Table:
    """Return the products that are searched: all, or the judged ones and others with the smallest hashed keys."""
    if request.pool is None:
        return products
    keys = keys_of("product", products["locale"], products["product_id"])
    judged = np.isin(keys, keys_of("product", judgments["locale"], judgments["product_id"]))
    others = np.flatnonzero(~judged)
    chosen = others[np.argsort(keys_of(f"pool {request.seed}", products["locale"], products["product_id"])[others])[: request.pool]]
    return products.take(pa.array(np.sort(np.concatenate([np.flatnonzero(judged), chosen]))))
