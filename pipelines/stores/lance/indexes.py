"""The table's indexes: created once, extended by what is new, and folded when they consist of too many pieces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.errors import StoreError
from pipelines.schema import ID, ID_HASH, TEXT_HASH, VECTOR, VID
from pipelines.stores.lance.opening import Line, explained, open_table
from pipelines.stores.lance.table import TableSpec

VECTOR_INDEX = f"{VECTOR}_idx"
TEXT_SUFFIX = "_fts"
# How products are looked up: by name, by hash (merges), by FAISS number, and by text (vectors that need no embedding).
_LOOKUPS = (ID, ID_HASH, VID, TEXT_HASH)
_AUTO = "IVF_SQ"
# A bitmap holds one set of rows for each value: small and fast for few values, wasteful for many.
_BITMAP_VALUES = 1000
_SAMPLED_ROWS = 100_000
# Products come in every language, so words are neither stemmed nor dropped; ICU also cuts scripts without spaces.
_FTS = {"base_tokenizer": "icu/split", "stem": False, "remove_stop_words": False, "lower_case": True, "ascii_folding": True}
# Lance aims at this many rows a partition. Past four times as many, the partitions of a smaller table cost latency.
_PARTITION_ROWS, _OUTGROWN = 8192, 4


@dataclass(frozen=True, kw_only=True)
class IndexState:
    """The indexes of one version: rows that each does not cover, pieces that each consists of, and what was done."""

    version: int
    unindexed: Mapping[str, int]
    deltas: Mapping[str, int]
    built: tuple[str, ...]
    folded: tuple[str, ...]


def refresh_indexes(uri: str, spec: TableSpec, options: Mapping[str, str], *, at: int | None = None) -> IndexState:
    """Create what is missing, extend or fold what is behind, and return the state; every row is then in every index.

    A table below `flat_below` rows has no vector index and none in the state: its search is an exact scan. With `at`,
    the work starts from that version, and nobody else's commit may come between.
    """
    line = Line(uri, options, version=at)
    line.check()
    with explained("index", uri):
        built = _create_missing(line, spec)
        folded = _catch_up(line, spec)
    state = index_state(uri, options=options, version=line.version, built=built, folded=folded)
    behind = {name: rows for name, rows in state.unindexed.items() if rows}
    if behind:
        raise StoreError(f"indexes of table {uri} miss rows after a refresh: {behind}. Run again; nothing was published.")
    return state


def index_state(
    uri: str, *, options: Mapping[str, str], version: int | None = None, built: tuple[str, ...] = (), folded: tuple[str, ...] = ()
) -> IndexState:
    """Return the state of the indexes of one version, or of the latest."""
    dataset = open_table(uri, options=options, version=version)
    with explained("look at the indexes of", uri):
        rows, found = dataset.count_rows(), dataset.describe_indices()
        return IndexState(
            version=int(dataset.version),
            unindexed={index.name: rows - index.num_rows_indexed for index in found},
            deltas={index.name: len(index.segments) for index in found},
            built=built,
            folded=folded,
        )


def _create_missing(line: Line, spec: TableSpec) -> tuple[str, ...]:
    dataset = open_table(line.uri, options=line.options)
    rows = dataset.count_rows()
    if not rows:
        return ()
    there = {index.name: index for index in dataset.describe_indices()}
    built = []
    for column in dict.fromkeys((*_LOOKUPS, *spec.scalar)):
        if (name := f"{column}_idx") not in there:
            _create_scalar(line, column=column, name=name, kind=_scalar_kind(dataset, column))
            built.append(name)
    for column in spec.text:
        if (name := f"{column}{TEXT_SUFFIX}") not in there:
            _create_scalar(line, column=column, name=name, kind="INVERTED", **_FTS)
            built.append(name)
    kind = _vector_kind(spec, rows)
    if kind and (VECTOR_INDEX not in there or _outgrown(dataset, rows)):
        line.commit(lambda latest: _create_vector(latest, kind, spec))
        built.append(VECTOR_INDEX)
    return tuple(built)


def _create_scalar(line: Line, *, column: str, name: str, kind: str, **how: Any) -> None:
    line.commit(lambda latest: latest.create_scalar_index(column, kind, name=name, replace=True, **how))


def _create_vector(dataset: Any, kind: str, spec: TableSpec) -> None:
    how: dict[str, int] = {}
    if kind == "IVF_RQ":
        how = {"num_bits": 1}
    elif kind.endswith("PQ"):
        dims = spec.schema.field(VECTOR).type.list_size
        how = {"num_sub_vectors": next(parts for parts in (dims // 8, dims // 4, dims // 2, 1) if parts and not dims % parts)}
    dataset.create_index(VECTOR, kind, name=VECTOR_INDEX, metric=spec.metric, replace=True, **how)


def _catch_up(line: Line, spec: TableSpec) -> tuple[str, ...]:
    """Cover rows that no index has yet: as a new piece, or with a fold where that makes too many or most of it is new."""
    dataset = open_table(line.uri, options=line.options)
    rows = dataset.count_rows()
    extend, fold, pieces = [], [], 0
    for index in dataset.describe_indices():
        missing = rows - index.num_rows_indexed
        count = len(index.segments) + (1 if missing else 0)
        # Rewritten columns leave nothing of the old pieces in use: one new piece replaces them at the price of a delta.
        renewed = missing * 2 > rows and index.name != VECTOR_INDEX
        if count > spec.fold_after or (renewed and missing):
            fold.append(index.name)
            pieces = max(pieces, len(index.segments))
        elif missing:
            extend.append(index.name)
    if extend:
        _optimize(line, names=extend, merge=0)
    if fold:
        _optimize(line, names=fold, merge=pieces)
    return tuple(fold)


def _optimize(line: Line, *, names: list[str], merge: int) -> None:
    line.commit(lambda latest: latest.optimize.optimize_indices(index_names=names, num_indices_to_merge=merge))


def _vector_kind(spec: TableSpec, rows: int) -> str | None:
    if spec.vector_index == "none":
        return None
    if spec.vector_index == "auto":
        return _AUTO if rows >= spec.flat_below else None
    return spec.vector_index


def _outgrown(dataset: Any, rows: int) -> bool:
    """Whether the table has grown far past what the partitions of its vector index were made for."""
    partitions = len(dataset.centroids(index_name=VECTOR_INDEX))
    return rows > _OUTGROWN * _PARTITION_ROWS * partitions


def _scalar_kind(dataset: Any, column: str) -> str:
    """Return BITMAP for a column of few values, BTREE for one of many; what is looked up by key is always a tree."""
    kind = dataset.schema.field(column).type
    if pa.types.is_boolean(kind):
        return "BITMAP"
    if column in _LOOKUPS or not pa.types.is_string(kind):
        return "BTREE"
    values = dataset.scanner(columns=[column], limit=_SAMPLED_ROWS).to_table().column(0)
    return "BITMAP" if pc.count_distinct(values).as_py() <= _BITMAP_VALUES else "BTREE"
