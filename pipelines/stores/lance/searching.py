"""Search one pinned version of a table: by vector, by filter, by words, by id. Later commits and sweeps change nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.contracts import LANCE_INDEX
from pipelines.errors import InputError
from pipelines.manifest import Manifest
from pipelines.schema import ATTR_HASH, ID, ID_HASH, TEXT_HASH, VECTOR, VID
from pipelines.stores.lance.indexes import VECTOR_INDEX
from pipelines.stores.lance.opening import explained, open_table
from pipelines.stores.lance.reading import taken
from pipelines.stores.lance.selectivity import Estimate, Selectivity
from pipelines.where import Filter

SCORE = "score"
# Up to so many rows that pass a filter all of them are compared, which misses nothing. Even with the index: 300 rows of
# 100,000 (2.5 ms + 13 us a row against 6 ms), 1,200 of 808,000 (against 25 ms); 384 numbers each.
EXACT_ROWS = 512
_STEP = 4
_SCAN_ROWS = 1 << 14
_DISTANCE, _RELEVANCE = "_distance", "_score"


class TableSearcher:
    """An open version. Safe to share between threads. `nprobes` and `refine` are what `nearest` uses unless told otherwise."""

    def __init__(self, uri: str, version: int, options: Mapping[str, str], *, nprobes: int = 20, refine: int = 4) -> None:
        _check_effort(nprobes, refine)
        self._nprobes, self._refine = nprobes, refine
        self._dataset = open_table(uri, version=version, options=options)
        self._uri = uri
        with explained("look at the indexes of", uri):
            indexes = self._dataset.describe_indices()
        self._indexed = any(index.name == VECTOR_INDEX for index in indexes)
        self._texts = [name for index in indexes if index.index_type == "Inverted" for name in index.field_names]
        self._dims: int = self._dataset.schema.field(VECTOR).type.list_size
        self._selectivity = Selectivity(self._dataset, uri)

    @property
    def num_rows(self) -> int:
        """How many products the version has."""
        return self._selectivity.total

    @property
    def columns(self) -> Mapping[str, pa.DataType]:
        """What a filter may name: every column but the vector."""
        return {field.name: field.type for field in self._dataset.schema if field.name != VECTOR}

    @property
    def kept(self) -> tuple[str, ...]:
        """The columns that the table keeps of the catalog: the locale and the filters that it was built with."""
        return tuple(name for name in self.columns if name not in (ID, ID_HASH, VID, TEXT_HASH, ATTR_HASH))

    def nearest(
        self,
        vector: npt.NDArray[np.floating],
        k: int,
        *,
        where: Filter | None = None,
        nprobes: int | None = None,
        refine: int | None = None,
        exact: bool = False,
        columns: Sequence[str] = (),
    ) -> pa.Table:
        """Return `k` products by cosine similarity, highest first, ties by id: id, vid, score, then `columns`.

        The filter comes first: `k` products that pass it are found, if there are as many. Where few pass, they are all
        compared; else `nprobes` partitions are searched, or more where fewer pass, until more change nothing. The best
        `refine` times `k` are scored by their full vectors. Without an index, or with `exact`, all are compared.
        """
        nprobes = self._nprobes if nprobes is None else nprobes
        refine = self._refine if refine is None else refine
        _check_effort(nprobes, refine)
        query = self._checked(vector, k=k)
        passing = Estimate(rows=self.num_rows, total=self.num_rows, counted=True) if where is None else self.estimate(where)
        if exact or not self._indexed or (where is not None and passing.rows <= max(EXACT_ROWS, k)):
            return self._compared(query, k, where, columns)
        found: pa.Table | None = None
        plan = {"q": query, "k": k, "refine_factor": refine}
        for probes in [nprobes] if where is None else self._ladder(nprobes, passing.share):
            # Left to itself, the engine goes on to the first partitions that hold `k`, and two steps would agree on those.
            most = {} if where is None else {"maximum_nprobes": probes}
            found, before = self._asked({**plan, **most, "minimum_nprobes": probes}, where, columns), found
            if before is not None and found.num_rows == k and found.column(VID).equals(before.column(VID)):
                break
        assert found is not None
        if found.num_rows < (min(k, passing.rows) if passing.counted else k):
            return self._compared(query, k, where, columns)
        return found

    def _ladder(self, nprobes: int, share: float) -> Iterator[int]:
        """Yield how many partitions to search, in steps, at last all: two steps that agree have found what there is.

        What passes may lie far from the query, where its nearest partitions hold none of it, so no share alone tells
        how many to search. Of 808,000 real products in 1,000 partitions (40 of them: recall .975 without a filter), for
        a category of 39 % that most queries are far from, the share's root gave recall .50, its inverse .57, this .96.
        """
        probes = max(nprobes, math.ceil(nprobes / math.sqrt(share) / 2))
        while probes < self._partitions:
            yield probes
            probes *= _STEP
        yield self._partitions

    @cached_property
    def _partitions(self) -> int:
        with explained("look at the vector index of", self._uri):
            return max(1, len(self._dataset.centroids(index_name=VECTOR_INDEX)))

    def _compared(self, query: npt.NDArray[np.float32], k: int, where: Filter | None, columns: Sequence[str]) -> pa.Table:
        """Compare every row that passes."""
        return self._asked({"q": query, "k": k, "metric": "cosine", "use_index": False}, where, columns)

    def _asked(self, plan: Mapping[str, object], where: Filter | None, columns: Sequence[str]) -> pa.Table:
        with explained("search", self._uri):
            found = self._dataset.scanner(
                columns=[*self._shown(columns), _DISTANCE],
                nearest={"column": VECTOR, **plan},
                filter=where.expression if where else None,
                prefilter=True,
            ).to_table()
        return _ranked(found, _DISTANCE, 1.0 - found.column(_DISTANCE).to_numpy().astype(np.float64))

    def text(self, query: str, k: int, *, where: Filter | None = None, columns: Sequence[str] = ()) -> pa.Table:
        """Return `k` products by words (BM25 over every full-text column), highest first. The query is words, not a language."""
        if not self._texts:
            raise InputError(f"table {self._uri} has no full-text index. Name columns in the table's `text` setting and rebuild.")
        _check_k(k)
        with explained("search the texts of", self._uri):
            found = self._dataset.scanner(
                columns=[*self._shown(columns), _RELEVANCE],
                full_text_query={"query": query, "columns": self._texts},
                limit=k,
                filter=where.expression if where else None,
                prefilter=True,
            ).to_table()
        return _ranked(found, _RELEVANCE, found.column(_RELEVANCE).to_numpy().astype(np.float64))

    def estimate(self, where: Filter) -> Estimate:
        """Return how many products pass a filter: counted where few do, else estimated; remembered by filter."""
        return self._selectivity.estimate(where)

    def matching(self, where: Filter) -> npt.NDArray[np.int64]:
        """Return the numbers of the products that pass a filter, ascending and read-only; remembered by filter."""
        return self._selectivity.matching(where)

    def sample(self) -> pa.Table:
        """Return some thousands of rows, chosen by hash, or all, without their vectors."""
        return self._selectivity.sample()

    def vectors(self, where: Filter) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.floating]]]:
        """Stream the numbers and vectors of the products that pass a filter."""
        with explained("read the vectors of", self._uri):
            for batch in self._dataset.scanner(columns=[VID, VECTOR], filter=where.expression, batch_size=_SCAN_ROWS).to_batches():
                flat = batch.column(VECTOR).flatten().to_numpy(zero_copy_only=False)
                yield batch.column(VID).to_numpy(), flat.reshape(-1, self._dims)

    def rows(self, ids: Sequence[str], columns: Sequence[str]) -> pa.Table:
        """Return the rows of these products in the order asked; an unknown id has none."""
        wanted = pa.array(dict.fromkeys(ids), pa.string())
        names = [*dict.fromkeys((ID, *columns))]
        found = taken(self._dataset, by=ID, values=wanted, columns=names)
        order = {name: place for place, name in enumerate(wanted.to_pylist())}
        places = np.array([order[name] for name in found.column(ID).to_pylist()], dtype=np.int64)
        return found.take(pa.array(np.argsort(places, kind="stable"))).select([*columns])

    def _shown(self, columns: Sequence[str]) -> list[str]:
        shown = list(dict.fromkeys((ID, VID, *columns)))
        if unknown := [name for name in shown if name not in self._dataset.schema.names]:
            raise InputError(f"table {self._uri} has no column {', '.join(unknown)}. It has: {', '.join(self._dataset.schema.names)}.")
        return shown

    def _checked(self, vector: npt.NDArray[np.floating], *, k: int) -> npt.NDArray[np.float32]:
        """Return a query of unit length, or say what is wrong with it."""
        _check_k(k)
        query = np.asarray(vector, dtype=np.float32)
        if query.shape != (self._dims,):
            raise InputError(f"the query vector has shape {query.shape}, the table holds {self._dims} numbers. Use the table's own tower.")
        length = float(np.linalg.norm(query))
        if not np.isfinite(length) or length == 0.0:
            raise InputError(f"the query vector has length {length}: it is empty, infinite or not a number. Check the encoder.")
        return query / np.float32(length)


def _check_k(k: int) -> None:
    if k < 1:
        raise InputError(f"k must be 1 or more, not {k}.")


def _check_effort(nprobes: int, refine: int) -> None:
    if nprobes < 1 or refine < 1:
        raise InputError(f"nprobes and refine must be 1 or more, not {nprobes} and {refine}.")


def _ranked(found: pa.Table, dropped: str, scores: npt.NDArray[np.float64]) -> pa.Table:
    """Put the score behind id and vid, and order by it, then by id."""
    table = found.drop_columns([dropped]).add_column(2, SCORE, pa.array(scores))
    return table.sort_by([(SCORE, "descending"), (ID, "ascending")])


def tuned(manifest: Manifest) -> Mapping[str, int]:
    """Return what a generation's table is searched with, as `TableSearcher` takes it; nothing where that was not tuned."""
    use = manifest.indexes.get(LANCE_INDEX)
    return {name: use.search[name] for name in ("nprobes", "refine") if name in use.search} if use else {}
