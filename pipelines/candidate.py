"""From parts to a candidate: the table brought to the plan's state and pinned, and the FAISS index extended."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.build import Build, Embedded
from pipelines.contracts import IndexUse, one_by_one
from pipelines.hashes import vids
from pipelines.index.build import Rows
from pipelines.index.update import NextIndex, Night, next_index
from pipelines.manifest import Manifest, ManifestObject, TablePin
from pipelines.schema import ACTION, ADD, ATTR, DELETE, ID, ID_HASH, TEXT, TEXT_HASH, VECTOR, VID
from pipelines.storage import Store
from pipelines.stores import lance
from pipelines.stores.parquet import read_part
from pipelines.table_index import settle
from pipelines.truth import Truth
from pipelines.workers import spread


@dataclass(frozen=True, kw_only=True)
class Applied:
    """The table of a candidate: its pin, how its vector index came about, and the exact answers of its version."""

    pin: TablePin
    use: IndexUse
    truth: Truth


def apply(build: Build, embedded: Embedded, *, live: int) -> Applied:
    """Bring the table to the plan's state, its indexes in step, and pin that version for this generation."""
    build.store.failpoint("run.before_apply")
    uri, spec = build.table_uri, build.spec
    base = build.extends.table if build.extends else None
    restored = lance.restore(uri, version=base.version if base else None, options=build.options)
    with build.observer.stage("table", total=None, unit="row") as progress:
        if base is None:
            fragments = []
            store = Store.open(build.store.root, options=build.options)
            arguments = ((store, item, uri, spec, dict(build.options)) for item in embedded.parts)
            for written in spread(_write_fragment, arguments, in_flight=_FRAGMENTS_IN_FLIGHT):
                fragments.extend(written)
            version = lance.commit_build(uri, sorted(fragments), spec, build.options)
        else:
            version = lance.apply(
                uri,
                upserts=_rows(build, embedded, (ADD, TEXT)),
                attrs=_rows(build, embedded, (ATTR,)),
                deletes=_rows(build, embedded, (DELETE,)),
                spec=spec,
                options=build.options,
                expect_live=live,
                at=restored,
            )
        progress.advance(live)
    build.store.failpoint("run.applied")
    applied = indexed(build, version=version, previous=base)
    build.store.failpoint("run.pinned")
    return applied


def indexed(build: Build, *, version: int, previous: TablePin | None) -> Applied:
    """Bring the indexes of a table's version in step, and pin what comes of it."""
    uri, options = build.table_uri, build.options
    with build.observer.stage("indexes", total=None, unit="row"):
        state = lance.refresh_indexes(uri, build.spec, options, at=version, workers=build.workers)
        truth = Truth(uri=uri, version=state.version, options=options, samples=build.samples)
        state, use = settle(build, state, truth)
    build.store.failpoint("run.indexed")
    with build.observer.stage("read-back", total=None, unit="row"):
        pin = lance.pin(
            uri, version=state.version, tag=build.generation, previous=previous, store=build.store, key=build.table_key, options=options
        )
    return Applied(pin=pin, use=use, truth=truth)


_FRAGMENTS_IN_FLIGHT = 4


def _write_fragment(store: Store, part: ManifestObject, uri: str, spec: lance.TableSpec, options: Mapping[str, str]) -> list[str]:
    """Turn one part into fragments of a new table, on a worker."""
    rows = read_part(store, part)
    rows = rows.filter(pc.is_valid(rows.column(VECTOR)))
    return lance.write_fragments(uri, _as_table(rows, spec.schema), spec, options) if rows.num_rows else []


def _as_table(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """Give rows of the log the columns of the table."""
    with_vids = rows.append_column(VID, pa.array(vids(rows.column(ID_HASH).combine_chunks())))
    return with_vids.select(schema.names).cast(schema)


def _rows(build: Build, embedded: Embedded, actions: tuple[str, ...]) -> Iterator[pa.Table]:
    """Read back the parts' rows of some actions, as the table takes them."""
    schema = build.space.columns
    for item in embedded.parts:
        rows = read_part(build.store, item)
        rows = rows.filter(pc.is_in(rows.column(ACTION), pa.array(actions)))
        if not rows.num_rows:
            continue
        if actions == (DELETE,):
            yield rows.select([ID_HASH])
        elif actions == (ATTR,):
            yield rows.select([name for name in rows.schema.names if name in schema.names and name not in (VECTOR, TEXT_HASH, ID)])
        else:
            yield _as_table(rows, schema)


def segment(build: Build, embedded: Embedded, applied: Applied, *, live: int) -> NextIndex:
    """Extend the FAISS index by what changed, or make it anew as far as its measurements ask for it."""
    added: Callable[[], Iterator[pa.Table]] = partial(_rows, build, embedded, (ADD, TEXT))
    found = _segmented(build, applied, base=build.base, added=added, touched=_touched(build, embedded), live=live)
    build.store.failpoint("run.segmented")
    return found


def whole_index(build: Build, applied: Applied, *, live: int) -> NextIndex:
    """Build the FAISS index of a whole table, whatever there was before."""
    return _segmented(build, applied, base=None, added=lambda: iter(()), touched=np.empty(0, dtype=np.int64), live=live)


def _segmented(
    build: Build,
    applied: Applied,
    *,
    base: Manifest | None,
    added: Callable[[], Iterator[pa.Table]],
    touched: npt.NDArray[np.int64],
    live: int,
) -> NextIndex:
    night = Night(
        store=build.store,
        base=base,
        # A name of its own for every attempt: what a dead one left may differ, if the settings did.
        run_id=build.generation,
        generation=build.generation,
        added=added,
        touched=touched,
        live=_live(build, applied.pin, live),
        truth=applied.truth,
        options=build.refresh,
        dims=build.space.card.dims,
        work=build.work,
    )
    with build.observer.stage("segments", total=None, unit="row"):
        return next_index(night)


def _live(build: Build, pin: TablePin, count: int) -> Rows:
    """Return all live rows as pieces of whole fragments, read by workers where there are many."""
    uri, version, options = build.table_uri, pin.version, dict(build.options)
    read = partial(lance.read_rows, uri, version=version, columns=[ID, VID, VECTOR], options=options, batch_rows=1 << 14)
    groups = lance.fragment_groups(uri, version=version, rows=_PIECE_ROWS, options=options) if count else []
    pieces = [partial(read, fragments=group) for group in groups]
    spreading = spread if count >= build.refresh.distribute_above and len(pieces) > 1 else one_by_one
    return Rows(pieces=pieces, count=count, spread=spreading)


_PIECE_ROWS = 1 << 17


def _touched(build: Build, embedded: Embedded) -> npt.NDArray[np.int64]:
    """Return the numbers of products whose older vectors no longer count."""
    hashes = [table.column(ID_HASH) for action in (TEXT, DELETE) for table in _rows(build, embedded, (action,))]
    if not hashes:
        return np.empty(0, dtype=np.int64)
    return np.unique(np.concatenate([vids(column.combine_chunks()) for column in hashes]))
