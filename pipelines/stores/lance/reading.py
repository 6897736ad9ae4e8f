"""What is read from one pinned version of a table. Keys travel as Arrow values, never inside a filter's text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.errors import StoreError
from pipelines.schema import ID_HASH, PUBLISHED, TEXT_HASH, VECTOR
from pipelines.stores.lance.opening import explained, open_table

SCAN_ROWS = 1 << 16
# One `isin` becomes an OR of equalities in the engine: 98,000 keys took 0.3 s, and memory follows their number.
_KEYS_AT_ONCE = 20_000


def read_published(uri: str, *, version: int, options: Mapping[str, str]) -> Iterator[pa.Table]:
    """Stream the id and the hashes of every product in one version of a table; vectors are not touched."""
    for table in read_rows(uri, version=version, columns=PUBLISHED.names, options=options, batch_rows=SCAN_ROWS):
        yield table.cast(PUBLISHED)


def read_rows(
    uri: str,
    *,
    version: int,
    columns: Sequence[str],
    options: Mapping[str, str],
    batch_rows: int = SCAN_ROWS,
    fragments: Sequence[int] | None = None,
) -> Iterator[pa.Table]:
    """Stream chosen columns of every row of one version, or of some of its fragments, in bounded tables."""
    dataset = open_table(uri, version=version, options=options)
    _require(dataset, columns)
    with explained(f"read version {version} of", uri):
        chosen = None if fragments is None else [dataset.get_fragment(number) for number in fragments]
        for batch in dataset.scanner(columns=[*columns], batch_size=batch_rows, fragments=chosen).to_batches():
            yield pa.Table.from_batches([batch])


def fragment_groups(uri: str, *, version: int, rows: int, options: Mapping[str, str]) -> list[list[int]]:
    """Return the fragments of one version in groups of neighbours with about so many rows each."""
    dataset = open_table(uri, version=version, options=options)
    groups: list[list[int]] = []
    filled = rows
    with explained(f"list the fragments of version {version} of", uri):
        for fragment in dataset.get_fragments():
            if filled >= rows:
                groups.append([])
                filled = 0
            groups[-1].append(fragment.fragment_id)
            filled += fragment.physical_rows
    return groups


def take(uri: str, *, version: int, by: str, values: pa.Array, columns: Sequence[str], options: Mapping[str, str]) -> pa.Table:
    """Return the rows whose column `by` is one of `values`, in any order; a key that is not there has no row."""
    return taken(open_table(uri, version=version, options=options), by=by, values=values, columns=columns)


def taken(dataset: Any, *, by: str, values: pa.Array, columns: Sequence[str]) -> pa.Table:
    """Do `take` on an open table."""
    _require(dataset, (by, *columns))
    keys = pc.unique(values.cast(dataset.schema.field(by).type)).drop_null()
    with explained("look up rows of", dataset.uri):
        found = [
            dataset.scanner(columns=[*columns], filter=pc.field(by).isin(keys.slice(start, _KEYS_AT_ONCE))).to_table()
            for start in range(0, len(keys), _KEYS_AT_ONCE)
        ]
    wanted = pa.schema([dataset.schema.field(name).remove_metadata() for name in columns])
    return pa.concat_tables([table.cast(wanted) for table in found]) if found else wanted.empty_table()


def vectors_of(uri: str, *, version: int, text_hashes: pa.Array, options: Mapping[str, str]) -> pa.Table:
    """Return one vector for each of these texts that the table knows: of several rows, that of the lowest id hash."""
    dataset = open_table(uri, version=version, options=options)
    # Two steps, so that a text which a million products share costs one vector.
    known = taken(dataset, by=TEXT_HASH, values=text_hashes, columns=[TEXT_HASH, ID_HASH])
    known = known.sort_by([(TEXT_HASH, "ascending"), (ID_HASH, "ascending")]).combine_chunks()
    texts = known.column(TEXT_HASH).to_numpy(zero_copy_only=False)
    first = np.ones(len(texts), dtype=bool)
    first[1:] = texts[1:] != texts[:-1]
    chosen = known.filter(pa.array(first)).column(ID_HASH).combine_chunks()
    return taken(dataset, by=ID_HASH, values=chosen, columns=[TEXT_HASH, VECTOR])


def counts(uri: str, *, version: int, options: Mapping[str, str]) -> int:
    """Return the number of live rows of one version."""
    dataset = open_table(uri, version=version, options=options)
    with explained(f"count the rows of version {version} of", uri):
        return int(dataset.count_rows())


def sizes(uri: str, *, version: int, options: Mapping[str, str]) -> Mapping[str, int]:
    """Return what one version consists of: live and deleted rows, fragments, bytes of data and of indexes."""
    dataset = open_table(uri, version=version, options=options)
    with explained(f"measure version {version} of", uri):
        fragments = [fragment.metadata for fragment in dataset.get_fragments()]
        rows = int(dataset.count_rows())
        return {
            "rows": rows,
            "deleted_rows": sum(fragment.physical_rows for fragment in fragments) - rows,
            "fragments": len(fragments),
            "data_bytes": sum(file.file_size_bytes or 0 for fragment in fragments for file in fragment.files),
            "index_bytes": sum(index.total_size_bytes or 0 for index in dataset.describe_indices()),
        }


def _require(dataset: Any, columns: Sequence[str]) -> None:
    missing = [name for name in columns if name not in dataset.schema.names]
    if missing:
        advice = "It was not written by catalog-embed, or for another configuration."
        raise StoreError(f"table {dataset.uri} version {dataset.version} lacks the columns {', '.join(missing)}. {advice}")
