"""Search one pinned version of a table: by vector, by filter, by words, by id. Later commits and sweeps change nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.errors import InputError
from pipelines.schema import ATTR_HASH, ID, ID_HASH, TEXT_HASH, VECTOR, VID
from pipelines.stores.lance.indexes import VECTOR_INDEX
from pipelines.stores.lance.opening import explained, open_table
from pipelines.stores.lance.reading import taken
from pipelines.where import Filter

SCORE = "score"
_DISTANCE, _RELEVANCE = "_distance", "_score"


class TableSearcher:
    """An open version. Safe to share between threads."""

    def __init__(self, uri: str, version: int, options: Mapping[str, str]) -> None:
        self._dataset = open_table(uri, version=version, options=options)
        self._uri = uri
        with explained("look at the indexes of", uri):
            indexes = self._dataset.describe_indices()
        self._indexed = any(index.name == VECTOR_INDEX for index in indexes)
        self._texts = [name for index in indexes if index.index_type == "Inverted" for name in index.field_names]
        self._dims: int = self._dataset.schema.field(VECTOR).type.list_size

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
        nprobes: int = 20,
        refine: int = 4,
        exact: bool = False,
        columns: Sequence[str] = (),
    ) -> pa.Table:
        """Return `k` products by cosine similarity, highest first, ties by id: id, vid, score, then `columns`.

        The filter comes first: `k` products that pass it are found, if there are as many. `nprobes` is the least number
        of partitions that are searched, and the best `refine` times `k` are scored by their full vectors. `exact` reads all.
        """
        query = self._checked(vector, k=k, nprobes=nprobes, refine=refine)
        plan = {"column": VECTOR, "q": query, "k": k}
        if self._indexed and not exact:  # without a metric, it is the index's own
            plan |= {"minimum_nprobes": nprobes, "refine_factor": refine}
        else:
            plan |= {"metric": "cosine", "use_index": False}
        with explained("search", self._uri):
            found = self._dataset.scanner(
                columns=[*self._shown(columns), _DISTANCE],
                nearest=plan,
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

    def matching(self, where: Filter, limit: int | None = None) -> npt.NDArray[np.int64]:
        """Return the numbers of the products that pass a filter, ascending; with a limit, any so many of them."""
        with explained("filter", self._uri):
            found = self._dataset.scanner(columns=[VID], filter=where.expression, limit=limit).to_table()
        return np.sort(found.column(VID).to_numpy())

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

    def _checked(self, vector: npt.NDArray[np.floating], *, k: int, nprobes: int, refine: int) -> npt.NDArray[np.float32]:
        """Return a query of unit length, or say what is wrong with it."""
        _check_k(k)
        if nprobes < 1 or refine < 1:
            raise InputError(f"nprobes and refine must be 1 or more, not {nprobes} and {refine}.")
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


def _ranked(found: pa.Table, dropped: str, scores: npt.NDArray[np.float64]) -> pa.Table:
    """Put the score behind id and vid, and order by it, then by id."""
    table = found.drop_columns([dropped]).add_column(2, SCORE, pa.array(scores))
    return table.sort_by([(SCORE, "descending"), (ID, "ascending")])
