"""Write the table of a tower: a full build from fragments that many workers wrote, or one night's changes by one committer.

Every commit is a version of its own and none is published: a reader opens the version that a generation pins, and
`restore` takes back whatever a dead run committed after it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import lance
import numpy as np
import pyarrow as pa

from pipelines.errors import InputError, StoreError
from pipelines.hashes import vids
from pipelines.schema import ID, ID_HASH, TEXT_HASH, VECTOR, VECTOR_INDEXES, VID
from pipelines.stores.lance.opening import STORAGE_VERSION, Line, engine_options, explained, first_line, latest, open_table, steady

Metric = Literal["cosine", "dot"]

_PRIMARY_KEY = {"lance-schema:unenforced-primary-key": "true"}
# One commit for this much: large enough to be few, small enough to stay in memory beside its join.
_CHUNK_BYTES = 128 << 20
# A file is hashed by one thread and read back whole, so it stays below what takes seconds.
_FILE_ROWS, _FILE_BYTES = 1 << 20, 2 << 30


@dataclass(frozen=True, kw_only=True)
class TableSpec:
    """A table's columns and indexes: `scalar` columns are for filters, `text` columns for full-text search.

    `vector_index` is a Lance type, `none`, or `auto`: IVF_SQ from `flat_below` rows on, exact scan below.
    `fold_after` is how many pieces an index may consist of before they become one: of 100,000 rows, 9 pieces cost 25
    to 60 % more median latency than one, and 17 doubled it (docs/experiments.md).
    Above `distribute_above` rows, `auto` and IVF_FLAT are built by workers, as IVF_FLAT: codes of other kinds are scaled
    by each worker's own rows, so that its pieces could never be folded. Whole vectors take 4 times the bytes of codes and
    1.5 times as long to search, so one process goes first: by 400,000 rows of 384 numbers in 33 s and 1 million in 45 s
    (two cores), 20 million take it half an hour, and 31 GB of its own disk.
    Past the share `compact_above` of deleted rows, fragments are written anew: after 60 nights of 2 %, 60 % of the rows on
    disk were deleted, and a scan took 6 times as long and a lookup 2.7 times as long as afterwards.
    """

    schema: pa.Schema
    scalar: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    metric: Metric = "cosine"
    vector_index: str = "auto"
    flat_below: int = 20_000
    fold_after: int = 8
    distribute_above: int = 20_000_000
    compact_above: float = 0.25

    def __post_init__(self) -> None:
        for name in (*self.scalar, *self.text):
            if name not in self.schema.names:
                raise InputError(f"`{name}` cannot be indexed: the table keeps no such column. Add it to the filters.")
        for name in self.text:
            if not pa.types.is_string(self.schema.field(name).type):
                raise InputError(f"`{name}` cannot have a full-text index: it is {self.schema.field(name).type}, not a string.")
        if self.vector_index not in VECTOR_INDEXES:
            raise InputError(f"unknown vector index `{self.vector_index}`. Use one of: {', '.join(VECTOR_INDEXES)}.")
        if self.fold_after < 1 or self.flat_below < 0:
            raise InputError(f"fold_after must be 1 or more and flat_below 0 or more, not {self.fold_after} and {self.flat_below}.")
        if self.distribute_above < 0 or not 0 < self.compact_above <= 1:
            raise InputError(
                f"distribute_above must be 0 or more and compact_above above 0 and at most 1, not {self.distribute_above} "
                f"and {self.compact_above}."
            )

    @property
    def stored(self) -> pa.Schema:
        """The schema on disk: the key is marked, so that two writers cannot insert one product twice."""
        marked = [field.with_metadata(_PRIMARY_KEY) if field.name == ID_HASH else field for field in self.schema]
        return pa.schema(marked)

    @property
    def attributes(self) -> tuple[str, ...]:
        """What an attribute-only update carries: the key, the attribute hash and the kept columns."""
        return tuple(name for name in self.schema.names if name not in (ID, VID, TEXT_HASH, VECTOR))


def restore(uri: str, *, version: int | None, options: Mapping[str, str]) -> int | None:
    """Make the table's latest version equal to the pinned one, or to nothing when none was ever pinned, and return its number.

    Without a pin, a table that carries tags is left alone: a generation reads it, and a build replaces it in a new
    version. Files that no version names are removed by a later sweep, a week after they were written.
    """
    dataset = latest(uri, options=options)
    if version is None:
        if dataset is not None and not steady(dataset.tags.list):
            with explained("remove the unpublished", uri):
                steady(lambda: lance.LanceDataset.drop(uri, storage_options=engine_options(uri, options)))
        return None
    if dataset is not None and dataset.version == version:
        return version
    pinned = open_table(uri, version=version, options=options)
    with explained(f"restore version {version} of", uri):
        steady(pinned.restore)
    return int(pinned.version)


def write_fragments(uri: str, table: pa.Table, spec: TableSpec, options: Mapping[str, str]) -> list[str]:
    """Write rows as data files that no version names yet, and return their descriptions for `commit_build`."""
    return _write(uri, [table], spec, options)


def commit_build(uri: str, fragments: Sequence[str], spec: TableSpec, options: Mapping[str, str]) -> int:
    """Make fragments the whole table, in one commit, and return its version. No id may be in them twice."""
    if not fragments:
        raise StoreError(f"a build of table {uri} has no rows. Check that the catalog has live products; nothing was written.")
    with explained("commit a build of", uri):
        parts = [lance.FragmentMetadata.from_json(fragment) for fragment in fragments]
        operation = lance.LanceOperation.Overwrite(spec.stored, parts)
        told = engine_options(uri, options)
        # Twice the same build is the same table.
        dataset = steady(lambda: lance.LanceDataset.commit(uri, operation, storage_options=told, enable_v2_manifest_paths=True))
        keys = _Keys(uri)
        for batch in dataset.scanner(columns=[ID_HASH]).to_batches():
            keys.admit(batch.column(0))
    return int(dataset.version)


def build(uri: str, batches: Iterable[pa.Table], spec: TableSpec, options: Mapping[str, str]) -> int:
    """Write a whole table from a stream of tables with disjoint ids, and return its version."""
    return commit_build(uri, _write(uri, batches, spec, options), spec, options)


def apply(
    uri: str,
    *,
    upserts: Iterable[pa.Table],
    attrs: Iterable[pa.Table],
    deletes: Iterable[pa.Table],
    spec: TableSpec,
    options: Mapping[str, str],
    expect_live: int,
    at: int | None = None,
) -> int:
    """Carry out one night's changes and return the version: whole rows, attributes of known rows, and what goes.

    A product may be named once in all three. Deleting what is not there is no error; an attribute update of what is
    not there is. Nothing is committed for what is empty. The table must then have `expect_live` rows. With `at`,
    the changes start from that version, and nobody else's commit may come between them.
    """
    keys, line = _Keys(uri), Line(uri, options, version=at)
    line.check()
    for chunk in _chunks(attrs, spec.attributes, spec.schema, uri):
        keys.admit(chunk.column(ID_HASH))
        updated = _merge(line, chunk, _replace_columns)["num_updated_rows"]
        if updated != chunk.num_rows:
            missing = chunk.num_rows - updated
            raise StoreError(
                f"{missing} of {chunk.num_rows} attribute updates found no row in table {uri}. Plan again from its generation."
            )
    for chunk in _chunks(deletes, (ID_HASH,), spec.schema, uri):
        keys.admit(chunk.column(ID_HASH))
        _merge(line, chunk, _remove)
    for chunk in _chunks(upserts, spec.schema.names, spec.schema, uri):
        keys.admit(chunk.column(ID_HASH))
        _merge(line, chunk, _replace_rows)
    dataset = open_table(uri, options=options, version=line.version)
    with explained("count the rows of", uri):
        found = int(dataset.count_rows())
    if found != expect_live:
        raise StoreError(f"table {uri} has {found} rows after the changes, expected {expect_live}. Plan again; nothing was published.")
    return int(dataset.version)


def _merge(line: Line, chunk: pa.Table, rule: Any) -> Mapping[str, int]:
    with explained(f"apply {chunk.num_rows} changes to", line.uri):
        done: Mapping[str, int] = line.commit(lambda dataset: rule(dataset.merge_insert(ID_HASH)).execute(chunk))
        return done


def _replace_rows(merge: Any) -> Any:
    return merge.when_matched_update_all().when_not_matched_insert_all()


def _replace_columns(merge: Any) -> Any:
    """Write new files for the changed columns alone: those that hold vectors stay as they are, and so does their index."""
    return merge.when_matched_update_all().write_mode("rewrite_columns")


def _remove(merge: Any) -> Any:
    return merge.when_matched_delete()


def _write(uri: str, tables: Iterable[pa.Table], spec: TableSpec, options: Mapping[str, str]) -> list[str]:
    source = (batch for chunk in _chunks(tables, spec.schema.names, spec.schema, uri) for batch in chunk.cast(spec.stored).to_batches())
    first = next(source, None)
    if first is None:
        return []
    with explained("write fragments of", uri):
        written = lance.fragment.write_fragments(
            pa.RecordBatchReader.from_batches(spec.stored, _chained(first, source)),
            uri,
            mode="overwrite",
            schema=spec.stored,
            max_rows_per_file=_FILE_ROWS,
            max_bytes_per_file=_FILE_BYTES,
            data_storage_version=STORAGE_VERSION,
            storage_options=engine_options(uri, options),
        )
    return [json.dumps(fragment.to_json()) for fragment in written]


def _chained(first: pa.RecordBatch, rest: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    yield first
    yield from rest


def _chunks(tables: Iterable[pa.Table], names: Sequence[str], schema: pa.Schema, uri: str) -> Iterator[pa.Table]:
    """Give tables these columns and types, and regroup them in chunks of bounded bytes, none empty."""
    wanted = pa.schema([schema.field(name) for name in names])
    held: list[pa.Table] = []
    held_bytes = 0
    for table in tables:
        fitted = _fitted(table, wanted, uri)
        rows = max(1, _CHUNK_BYTES * fitted.num_rows // max(1, fitted.nbytes))
        for start in range(0, fitted.num_rows, rows):
            piece = fitted.slice(start, rows)
            if held and held_bytes + piece.nbytes > _CHUNK_BYTES:
                yield pa.concat_tables(held).combine_chunks()
                held, held_bytes = [], 0
            held.append(piece)
            held_bytes += piece.nbytes
    if held:
        yield pa.concat_tables(held).combine_chunks()


def _fitted(table: pa.Table, wanted: pa.Schema, uri: str) -> pa.Table:
    """Select and cast; refuse nulls where none may be, and text that Lance would store and never read again."""
    try:
        fitted = table.select(wanted.names).cast(wanted)
        fitted.validate(full=True)
    except (KeyError, ValueError) as error:
        raise StoreError(f"rows for table {uri} do not fit its columns: {first_line(error)}. Check the vector log.") from error
    return fitted


class _Keys:
    """Remembers, in 8 bytes each, the products that a run has named, and refuses the second naming.

    Lance refuses two source rows for one existing row, but inserts both when the product is new.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._blocks: list[np.ndarray[Any, np.dtype[np.int64]]] = []

    def admit(self, hashes: pa.Array | pa.ChunkedArray) -> None:
        """Take the keys of one chunk, or raise."""
        fixed = hashes.combine_chunks() if isinstance(hashes, pa.ChunkedArray) else hashes
        fresh = np.sort(vids(fixed))
        twice = fresh[1:][fresh[1:] == fresh[:-1]]
        for block in self._blocks:
            if not len(twice):
                at = np.searchsorted(block, fresh)
                twice = fresh[block[np.minimum(at, len(block) - 1)] == fresh]
        if len(twice):
            raise StoreError(f"{len(twice)} products are named twice in the rows for table {self._uri} (vid {twice[0]}). Plan again.")
        if len(fresh):
            self._blocks.append(fresh)
            self._compact()

    def _compact(self) -> None:
        """Merge blocks of similar size, so that their number grows with the logarithm of the rows."""
        while len(self._blocks) > 1 and len(self._blocks[-2]) <= 2 * len(self._blocks[-1]):
            self._blocks.append(np.sort(np.concatenate([self._blocks.pop(), self._blocks.pop()])))
