"""Mining: what the published index answers to training queries, and which of its answers are hard to tell from right ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from encoder.examples import JUDGMENTS, NEGATIVES, Grades
from encoder.mining import CANDIDATES, USUAL, Mined, MiningOptions, check_fingerprint, classify, unknown, with_mined
from encoder.ranking import Catalog, rank
from jobs.inspect import reader
from jobs.material import grades_of, judgments_of, made_folder, products_of, read_table
from jobs.nightly import fingerprint_of
from jobs.settings import Settings
from pipelines.reader import Engine, Opened
from pipelines.schema import ID, LOCALE
from pipelines.where import col

# What a file of verdicts must have.
VERDICTS = ("query_id", "query", "locale", "product_id", "grade", "judge")
CANDIDATES_FILE, MINED_FILE, UNKNOWN_FILE = "candidates.parquet", "mined.parquet", "unknown.parquet"
_QUERIES_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class MineRequest:
    """What to mine with: judgments other than the configured ones, how deep to look, and with which index."""

    judgments: Path | None = None
    queries: Path | None = None
    judged: Path | None = None
    tower: Path | None = None
    generation: str | None = None
    top: int = 100
    engine: Engine = "faiss"
    options: MiningOptions = USUAL


@dataclass(frozen=True, kw_only=True)
class Haul:
    """What was mined from a generation, and the pairs among the first ranks that nobody has judged."""

    generation: str
    candidates: pa.Table
    mined: Mined
    unknown: pa.Table

    def write(self, folder: Path) -> Mapping[str, str]:
        """Write the three tables as Parquet, and return their paths by name."""
        made_folder(folder)
        files = {CANDIDATES_FILE: self.candidates, MINED_FILE: self.mined.rows, UNKNOWN_FILE: self.unknown}
        for name, table in files.items():
            pq.write_table(table, folder / name, compression="zstd")
        return {name: str(folder / name) for name in files}


def mine(settings: Settings, request: MineRequest, *, tell: Callable[[int, int], None] | None = None) -> Haul:
    """Search the published generation for every judged query, and sort its answers by what is known of them."""
    wanted = fingerprint_of(settings, request.tower)
    judged = read_table(request.judged, "judged pairs", VERDICTS) if request.judged else None
    with reader(settings, generation=request.generation) as followed:
        opened = followed.opened
        # Before anything is read: another tower's ranks and scores say nothing of this one's mistakes.
        check_fingerprint([opened.manifest.tower], wanted)
        judgments = judgments_of(settings, products_of(settings), path=request.judgments, queries=request.queries)
        candidates = _candidates(opened, judgments, request, tell)
    grades = grades_of(settings)
    found = classify(candidates, judgments, grades=grades, judged=judged, options=request.options)
    return Haul(generation=opened.manifest.generation, candidates=candidates, mined=found, unknown=unknown(candidates, judgments))


def searched(encoder: Any, products: pa.Table, judgments: pa.Table, *, top: int, tower: str) -> pa.Table:
    """Return candidates as an exact index of these products would give them: for a tower that is not published yet."""
    catalog, asked = Catalog.of(products), _queries(judgments)
    vectors = encoder.encode(products["text"].combine_chunks())
    tables = [CANDIDATES.empty_table()]
    for locale in dict.fromkeys(asked["locale"].to_pylist()):
        own, rows = asked.filter(pc.equal(asked["locale"], locale)), catalog.rows(locale)
        if not len(rows):
            continue
        queries = encoder.encode(own["query"].combine_chunks(), kind="query")
        found, scores = rank(queries, vectors[rows], catalog.ids.take(pa.array(rows)), top)
        ids = products["product_id"].combine_chunks().take(pa.array(rows))
        tables += [
            _answers(row, ids.take(pa.array(places[places >= 0])), given[places >= 0], tower)
            for row, places, given in zip(own.to_pylist(), found, scores, strict=True)
        ]
    return pa.concat_tables(tables).combine_chunks()


def mixed(mined: pa.Table, judgments: pa.Table, grades: Grades) -> pa.Table:
    """Mix mined negatives with those that people judged; without any of these, the mined ones stand alone."""
    originals = judgments.filter(pc.less(judgments["grade"], grades.positive)).select(NEGATIVES.names)
    if originals.num_rows:
        return with_mined(originals, mined)
    hard = mined.filter(pc.equal(mined["kind"], "hard_negative"))
    return hard.select(NEGATIVES.names).cast(NEGATIVES)


def _candidates(opened: Opened, judgments: pa.Table, request: MineRequest, tell: Callable[[int, int], None] | None) -> pa.Table:
    """Ask the index every query, in the products of its locale."""
    asked = _queries(judgments)
    tables = [CANDIDATES.empty_table()]
    for start in range(0, asked.num_rows, _QUERIES_AT_ONCE):
        for row in asked.slice(start, _QUERIES_AT_ONCE).to_pylist():
            where = col(LOCALE) == row["locale"] if row["locale"] else None
            found = opened.search(row["query"], request.top, where=where, engine=request.engine)
            tables.append(_answers(row, found[ID].combine_chunks(), found["score"].to_numpy(), opened.manifest.tower))
        if tell is not None:
            tell(min(start + _QUERIES_AT_ONCE, asked.num_rows), asked.num_rows)
    return pa.concat_tables(tables).combine_chunks()


def _queries(judgments: pa.Table) -> pa.Table:
    """Return each query once, in the order of its first judgment."""
    names = ["query_id", "query", "locale"]
    asked = judgments.select([name for name in JUDGMENTS.names if name in names]).combine_chunks()
    return asked.group_by(names, use_threads=False).aggregate([]).select(names)


def _answers(row: Mapping[str, str], ids: pa.Array, scores: Any, tower: str) -> pa.Table:
    count = len(ids)
    columns = {
        "query_id": pa.repeat(row["query_id"], count),
        "query": pa.repeat(row["query"], count),
        "locale": pa.repeat(row["locale"], count),
        "product_id": ids,
        "rank": pa.array(np.arange(1, count + 1), pa.int32()),
        "score": pa.array(np.asarray(scores, np.float64)),
        "tower": pa.repeat(tower, count),
    }
    return pa.table(columns, schema=CANDIDATES)
