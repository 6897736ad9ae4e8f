"""Judging: unknown pairs put to a judge, how judges agree with people, judges trained on people's grades, and audits by engagement."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from encoder.audit import ENGAGEMENT, USUAL, Audit, AuditOptions, disagreements
from encoder.examples import keys_of
from encoder.judge import THREE_LEVELS, Agreement, CachedJudge, Judge, Judging, Pair, agreement, ask
from encoder.judge_endpoint import EndpointJudge, EndpointOptions
from encoder.judge_models import ClassifierJudge, ClassifierOptions, TrainedJudge, TrainingOptions, train_cross_encoder
from jobs.material import grades_of, judgments_of, made_folder, products_of, read_table
from jobs.nightly import tower_directory
from jobs.settings import Settings
from pipelines.errors import InputError

# Where the key of an endpoint comes from, so that it stands in no file and in no list of processes.
KEY_VARIABLE = "CATALOG_EMBED_JUDGE_KEY"
_ASKED = ("query_id", "query", "locale", "product_id")


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Who judges: a directory with a classifier, or a model behind an address; `cache` keeps what was said."""

    directory: Path | None = None
    endpoint: str | None = None
    model: str | None = None
    cache: Path | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        if (self.directory is None) == (self.endpoint is None) or (self.endpoint is None) != (self.model is None):
            raise InputError("name one judge: --judge DIR, or --endpoint URL with --model NAME.")

    def seat(self) -> Judge:
        """Open the judge, behind its cache where there is one."""
        if self.directory is not None:
            judge: Judge = ClassifierJudge(self.directory, ClassifierOptions(device=self.device))
        else:
            assert self.endpoint is not None
            assert self.model is not None
            judge = EndpointJudge(EndpointOptions(url=self.endpoint, model=self.model), api_key=os.environ.get(KEY_VARIABLE, ""))
        return CachedJudge(judge, self.cache) if self.cache is not None else judge


def judge_pairs(settings: Settings, bench: Bench, pairs: Path, *, deepest: int | None = None) -> Judging:
    """Ask about the pairs that `mine` found nobody had judged, those of the first ranks where that is said."""
    asked = read_table(pairs, "unknown pairs", _ASKED if deepest is None else (*_ASKED, "rank"))
    if deepest is not None:
        asked = asked.filter(pc.less_equal(asked["rank"], deepest))
    return ask(bench.seat(), asked, products_of(settings), grades=grades_of(settings))


def agree(
    settings: Settings, bench: Bench, *, judgments: Path | None = None, queries: Path | None = None, most: int | None = None
) -> Agreement:
    """Let a judge grade what people graded, whole queries chosen by hash where only some are wanted, and compare."""
    pairs, levels = graded_pairs(settings, judgments=judgments, queries=queries, most=most)
    return agreement(bench.seat(), pairs, levels)


def train_judge(
    settings: Settings,
    target: Path,
    *,
    base: Path | None = None,
    judgments: Path | None = None,
    queries: Path | None = None,
    options: TrainingOptions | None = None,
) -> TrainedJudge:
    """Train a cross-encoder on people's grades, starting from a tower's weights; its agreement is of queries held out."""
    pairs, levels = graded_pairs(settings, judgments=judgments, queries=queries)
    return train_cross_encoder(tower_directory(settings, base), pairs, levels, target=target, options=options)


def graded_pairs(
    settings: Settings, *, judgments: Path | None = None, queries: Path | None = None, most: int | None = None
) -> tuple[list[Pair], list[int]]:
    """Return what people graded as pairs of texts, and the levels of the judges' guideline that their grades mean."""
    products = products_of(settings)
    graded = judgments_of(settings, products, path=judgments, queries=queries)
    texts = products.select(["locale", "product_id", "text"])
    joined = graded.join(texts, ["locale", "product_id"], join_type="inner")
    joined = joined.sort_by([(name, "ascending") for name in ("locale", "query_id", "product_id")])
    if most is not None and joined.num_rows > most:
        keys = keys_of("agree", joined["locale"], joined["query_id"])
        joined = joined.take(pa.array(np.argsort(keys, kind="stable")[:most]))
    scale = THREE_LEVELS.from_grades(grades_of(settings))
    pairs = [Pair(query, text) for query, text in zip(joined["query"].to_pylist(), joined["text"].to_pylist(), strict=True)]
    return pairs, [scale[grade] for grade in joined["grade"].to_pylist()]


def audit(
    settings: Settings, engagement: Path, *, judgments: Path | None = None, queries: Path | None = None, options: AuditOptions = USUAL
) -> Audit:
    """Set what shoppers do beside what was graded, and return where the two contradict each other."""
    products = products_of(settings)
    graded = judgments_of(settings, products, path=judgments, queries=queries)
    table = read_table(engagement, "engagement", [name for name in ENGAGEMENT.names if name != "locale"])
    if "locale" not in table.column_names:
        # By query: products that nobody judged are what its judged ones are compared with.
        locales = dict(zip(graded["query_id"].to_pylist(), graded["locale"].to_pylist(), strict=True))
        table = table.append_column("locale", pa.array([locales.get(query, "") for query in table["query_id"].to_pylist()], pa.string()))
    return disagreements(table, graded, grades=grades_of(settings), options=options)


def write_judged(found: Judging, path: Path) -> None:
    """Write verdicts as `mine` and `train` read them."""
    made_folder(path.parent)
    pq.write_table(found.judged, path, compression="zstd")
