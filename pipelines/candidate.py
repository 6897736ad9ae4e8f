"""From parts to a candidate: the table brought to the plan's state and pinned, and the FAISS index extended."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.build import Build, Embedded
from pipelines.hashes import vids
from pipelines.index.update import NextIndex, next_index
from pipelines.manifest import Manifest, ManifestObject, TablePin
from pipelines.schema import ACTION, ADD, ATTR, DELETE, ID, ID_HASH, TEXT, TEXT_HASH, VECTOR, VID
from pipelines.storage import Store
from pipelines.stores import lance
from pipelines.stores.parquet import read_part
from pipelines.workers import spread


def apply(build: Build, embedded: Embedded, *, live: int) -> TablePin:
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
    with build.observer.stage("indexes", total=None, unit="row"):
        state = lance.refresh_indexes(uri, spec, build.options, at=version)
    build.store.failpoint("run.indexed")
    with build.observer.stage("read-back", total=None, unit="row"):
        pin = lance.pin(
            uri,
            version=state.version,
            tag=build.generation,
            previous=base,
            store=build.store,
            key=build.table_key,
            options=build.options,
        )
    build.store.failpoint("run.pinned")
    return pin


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


def segment(build: Build, embedded: Embedded, pin: TablePin, *, live: int) -> NextIndex:
    """Extend the FAISS index by what changed, or build it anew where its shares have grown too large."""
    added: Callable[[], Iterator[pa.Table]] = partial(_rows, build, embedded, (ADD, TEXT))
    found = _indexed(build, pin, base=build.base, added=added, touched=_touched(build, embedded), live=live)
    build.store.failpoint("run.segmented")
    return found


def whole_index(build: Build, pin: TablePin, *, live: int) -> NextIndex:
    """Build the FAISS index of a whole table, whatever there was before."""
    return _indexed(build, pin, base=None, added=lambda: iter(()), touched=np.empty(0, dtype=np.int64), live=live)


def _indexed(
    build: Build,
    pin: TablePin,
    *,
    base: Manifest | None,
    added: Callable[[], Iterator[pa.Table]],
    touched: npt.NDArray[np.int64],
    live: int,
) -> NextIndex:
    everything = partial(
        lance.read_rows,
        build.table_uri,
        version=pin.version,
        columns=[ID, VID, ID_HASH, VECTOR],
        options=build.options,
        batch_rows=1 << 14,
    )
    with build.observer.stage("segments", total=None, unit="row"):
        return next_index(
            build.store,
            base=base,
            # A name of its own for every attempt: what a dead one left may differ, if the settings did.
            run_id=build.generation,
            generation=build.generation,
            added=added,
            touched=touched,
            live=everything,
            num_live=live,
            options=build.refresh,
            dims=build.space.card.dims,
            work=build.work,
        )


def _touched(build: Build, embedded: Embedded) -> npt.NDArray[np.int64]:
    """Return the numbers of products whose older vectors no longer count."""
    hashes = [table.column(ID_HASH) for action in (TEXT, DELETE) for table in _rows(build, embedded, (action,))]
    if not hashes:
        return np.empty(0, dtype=np.int64)
    return np.unique(np.concatenate([vids(column.combine_chunks()) for column in hashes]))
