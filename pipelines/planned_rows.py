"""The rows that a plan chose, read from the source a second time and held against the hashes that were planned.

Only the wanted rows of a shard are normalised. A source without a stable order costs one more look at the whole shard;
what is then still missing has changed since it was planned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.contracts import Shard
from pipelines.errors import SourceMoved
from pipelines.prepare import Preparer
from pipelines.schema import ATTR_HASH, ID_HASH, ROW, SHARD, TEXT_HASH


def fetch(planned: pa.Table, open_shard: Callable[[str], Shard | None], preparer: Preparer) -> tuple[pa.Table, pa.StringArray]:
    """Return id, hashes and kept columns of every planned row, and its text, both in the order of `planned`."""
    found = _Found(planned)
    for name, numbers in _by_shard(planned).items():
        shard = open_shard(name)
        if shard is None:
            raise _moved(planned, 0, f"it has no {name} any more")
        for batch in _wanted(shard, numbers):
            found.add(*preparer.rendered(batch, shard=name))
        if found.missing_of(name):
            for batch in shard.open():
                found.add(*preparer.rendered(batch, shard=name))
        if missing := found.missing_of(name):
            raise _moved(planned, missing, f"{missing} planned rows of {name} are gone or changed")
    return found.in_order()


def _moved(planned: pa.Table, missing: int, what: str) -> SourceMoved:
    return SourceMoved(f"the catalog changed after it was planned: {what} ({missing} of {planned.num_rows} rows here). Plan again.")


def _by_shard(planned: pa.Table) -> Mapping[str, npt.NDArray[np.int64]]:
    """Return the wanted row numbers of each shard, ascending."""
    shards = planned.column(SHARD).combine_chunks().dictionary_encode()
    shards = shards.chunk(0) if isinstance(shards, pa.ChunkedArray) else shards
    rows, codes = planned.column(ROW).to_numpy(), shards.indices.to_numpy()
    return {name: np.sort(rows[codes == code]) for code, name in enumerate(shards.dictionary.to_pylist())}


def _wanted(shard: Shard, numbers: npt.NDArray[np.int64]) -> Iterator[pa.RecordBatch]:
    """Yield the rows with these numbers, batch by batch, and read no further than the last of them."""
    first = 0
    for batch in shard.open():
        begin, end = np.searchsorted(numbers, [first, first + batch.num_rows])
        if end - begin == batch.num_rows:
            yield batch
        elif begin < end:
            yield batch.take(pa.array(numbers[begin:end] - first))
        first += batch.num_rows
        if first > numbers[-1]:
            return


class _Found:
    """What has been found of the planned rows so far."""

    def __init__(self, planned: pa.Table) -> None:
        self._planned = planned.combine_chunks()
        self._ids = _array(self._planned, ID_HASH)
        self._missing = np.ones(planned.num_rows, bool)
        self._shards = self._planned.column(SHARD)
        self._places: list[npt.NDArray[np.int64]] = []
        self._tables: list[pa.Table] = []
        self._texts: list[pa.StringArray] = []

    def add(self, table: pa.Table, texts: pa.StringArray) -> None:
        """Keep the rows whose three hashes are as planned, each product once."""
        places = pc.index_in(_array(table, ID_HASH), self._ids)
        rows = np.flatnonzero(places.is_valid().to_numpy(zero_copy_only=False))
        place = places.drop_null().to_numpy().astype(np.int64)
        taken, expected = table.take(pa.array(rows)), self._planned.take(pa.array(place))
        same = self._missing[place]
        for name in (TEXT_HASH, ATTR_HASH):
            same &= pc.equal(_array(taken, name), _array(expected, name)).to_numpy(zero_copy_only=False)
        place, first = np.unique(place[same], return_index=True)
        chosen = pa.array(rows[same][first])
        self._missing[place] = False
        self._places.append(place)
        self._tables.append(table.take(chosen))
        self._texts.append(texts.take(chosen))

    def missing_of(self, shard: str) -> int:
        """Return how many planned rows of a shard have not been found."""
        return int((self._missing & pc.equal(self._shards, shard).to_numpy()).sum())

    def in_order(self) -> tuple[pa.Table, pa.StringArray]:
        """Return rows and texts in the order of the plan."""
        order = pa.array(np.argsort(np.concatenate(self._places)))
        return pa.concat_tables(self._tables).take(order).combine_chunks(), pa.concat_arrays(self._texts).take(order)


def _array(table: pa.Table, name: str) -> pa.Array:
    column = table.column(name).combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        return column.chunk(0) if column.num_chunks else pa.array([], column.type)
    return column
