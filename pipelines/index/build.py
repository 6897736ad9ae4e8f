"""A segment from rows: the same rows give the same bytes, in whatever order and batches they come.

Vectors pass through a file in the work folder, in the order of their numbers, so memory holds the growing index, the
numbers, the ids and the training sample: 250,000 products of 384 dimensions took 0.6 GiB, as Flat and as codes of a byte.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.errors import InputError, PlanError
from pipelines.index.loading import load_template, trained_sha256
from pipelines.index.segments import CARD, FAISS, FILES, IDS, TRAINED, Roster, Vids, card_bytes, keep, write_table
from pipelines.index.spec import FLAT, MAX_ROWS_PER_LIST, IndexSpec, Kind, Segment
from pipelines.manifest import ManifestObject
from pipelines.schema import ID, VECTOR, VECTOR_TYPES, VID
from pipelines.storage import Store

Batches = Callable[[], Iterator[pa.Table]]
"""Rows with ID, VID and VECTOR, as often as asked for; order and batch sizes may differ each time."""

# How many vectors FAISS is given at once. Part of what makes equal rows equal bytes, so it is no option.
_BLOCK_ROWS = 65_536


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What is to be built."""

    segment_id: str
    kind: Kind
    spec: IndexSpec
    template: Segment | None

    def __post_init__(self) -> None:
        if (self.kind == "delta") != (self.template is not None):
            raise InputError(f"{self.segment_id}: a delta extends a base, and a base extends nothing. Pass `template` for a delta alone.")
        if self.template is not None and self.template.spec != self.spec:
            raise InputError(f"{self.segment_id}: the delta is {self.spec} and its base {self.template.spec}. Take the spec of the base.")


def build_segment(
    store: Store, segment_id: str, batches: Batches, spec: IndexSpec, *, kind: Kind, template: Segment | None, work: Path
) -> Segment:
    """Build one segment and store it. A base trains its own template; a delta takes that of the base, `template`.

    A repeated run finds what it stored before, and stores the rest.
    """
    plan = _Plan(segment_id=segment_id, kind=kind, spec=spec, template=template)
    roster = gather(batches)
    if not len(roster.vids):
        raise InputError(f"{segment_id}: there are no rows to build a segment from.")
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        vectors = _sorted_vectors(batches, roster, dims=spec.dims, path=Path(folder) / "vectors")
        files = _Files(store, segment_id, Path(folder))
        index = _trained(store, plan, roster, vectors)
        if kind == "base" and spec.nlist is not None:
            files.keep_index(TRAINED, index, rows=0)
        _fill(index, roster, vectors)
        files.keep_index(FAISS, index, rows=len(roster.vids))
        return _finish(files, plan, roster, trained_sha256(index))


def gather(batches: Batches) -> Roster:
    """Read numbers and ids of all rows, or raise `PlanError` when two rows have one number."""
    tables = [table.select([VID, ID]) for table in batches()]
    if not tables:
        return Roster(vids=np.empty(0, np.int64), ids=pa.chunked_array([], pa.string()))
    table = pa.concat_tables(tables)
    vids = table[VID].to_numpy()
    order = np.argsort(vids, kind="stable")
    roster = Roster(vids=vids[order], ids=table[ID].take(pa.array(order)))
    if len(repeated := np.flatnonzero(np.diff(roster.vids) == 0)):
        first, second = (roster.ids[int(repeated[0]) + step].as_py() for step in (0, 1))
        raise clash(int(roster.vids[repeated[0]]), first, second)
    return roster


def clash(vid: int, first: str, second: str) -> PlanError:
    """Return what to raise for two live entries under one number."""
    if first == second:
        return PlanError(f"product {first[:80]!r} is added where it is live already: the rows do not fit their base. Plan again.")
    return PlanError(f"products {first[:80]!r} and {second[:80]!r} share the number {vid}. Rename one of them in the catalog.")


class _Files:
    """Stores the files of one segment, each once, and remembers what the manifest must list."""

    def __init__(self, store: Store, segment_id: str, folder: Path) -> None:
        self.objects: list[ManifestObject] = []
        self._store = store
        self._prefix = f"segments/{segment_id}"
        self._folder = folder

    def keep_index(self, role: str, index: Any, *, rows: int) -> None:
        path = self._folder / FILES[role]
        faiss.write_index(index, str(path))
        self._keep(role, path, rows=rows)

    def keep_roster(self, roster: Roster) -> None:
        path = self._folder / FILES[IDS]
        write_table(pa.table({VID: roster.vids, ID: roster.ids}), path)
        self._keep(IDS, path, rows=len(roster.vids))

    def keep_card(self, data: bytes) -> None:
        path = self._folder / FILES[CARD]
        path.write_bytes(data)
        self._keep(CARD, path, rows=None)

    def _keep(self, role: str, path: Path, *, rows: int | None) -> None:
        ref = keep(self._store, f"{self._prefix}/{path.name}", path)
        self.objects.append(ManifestObject.of(ref, role=role, rows=rows))
        path.unlink()


def _finish(files: _Files, plan: _Plan, roster: Roster, trained: str | None) -> Segment:
    """Store the id map and the card, which comes last: a folder with a card is whole."""
    files.keep_roster(roster)
    segment = Segment(
        name=plan.segment_id,
        kind=plan.kind,
        rows=len(roster.vids),
        spec=plan.spec,
        trained_sha256=trained,
        template=plan.template.name if plan.template else None,
        objects=(),
    )
    files.keep_card(card_bytes(segment))
    return replace(segment, objects=tuple(files.objects))


def _sorted_vectors(batches: Batches, roster: Roster, *, dims: int, path: Path) -> npt.NDArray[np.floating[Any]]:
    """Return the vectors in the order of the roster, mapped from a file that this writes."""
    vectors: npt.NDArray[np.floating[Any]] | None = None
    seen = np.zeros(len(roster.vids), np.bool_)
    for table in batches():
        if not len(table):
            continue
        at, known = roster.position(table[VID].to_numpy())
        if not known.all() or seen[at].any():
            raise PlanError("the rows changed between two readings. Check that nothing writes to the run's parts, then run again.")
        block = _as_matrix(table[VECTOR], dims=dims)
        if vectors is None:
            vectors = np.memmap(path, dtype=block.dtype, mode="w+", shape=(len(roster.vids), dims))
        vectors[at], seen[at] = block, True
    if vectors is None or not seen.all():
        raise PlanError(f"{int((~seen).sum())} rows were gone at the second reading. Check that nothing removes the run's parts.")
    return vectors


def _as_matrix(column: pa.ChunkedArray, *, dims: int) -> npt.NDArray[np.floating[Any]]:
    """Return a column of vectors as one matrix of the column's own precision."""
    kind = column.type
    if not pa.types.is_fixed_size_list(kind) or kind.list_size != dims or kind.value_type not in VECTOR_TYPES.values():
        raise PlanError(
            f"the vectors are {kind}, expected {dims} numbers of type {' or '.join(VECTOR_TYPES)}. Check the tower's dimensions."
        )
    if column.null_count:
        raise PlanError(f"{column.null_count} rows have no vector. Only rows with vectors can be indexed: plan again.")
    flat = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    matrix: npt.NDArray[np.floating[Any]] = np.concatenate(flat).reshape(-1, dims)
    if not np.isfinite(matrix).all():
        raise PlanError("a vector holds a number that is not finite. Check the embed stage's quarantine.")
    return matrix


def _trained(store: Store, plan: _Plan, roster: Roster, vectors: npt.NDArray[np.floating[Any]]) -> Any:
    """Return an empty index that is ready to be filled."""
    if plan.template is not None and plan.spec.nlist is not None:
        return load_template(store, plan.template)
    factory = f"IDMap2,{FLAT}" if plan.spec.factory == FLAT else plan.spec.factory
    index: Any = faiss.index_factory(plan.spec.dims, factory, faiss.METRIC_INNER_PRODUCT)
    if plan.spec.nlist is not None:
        if len(roster.vids) < plan.spec.nlist:
            raise InputError(f"{plan.segment_id}: {len(roster.vids)} rows cannot train the lists of {plan.spec.factory}. Choose Flat.")
        index.nprobe = plan.spec.nprobe
        sample = _sample(roster.vids, MAX_ROWS_PER_LIST * plan.spec.nlist)
        with _one_thread():
            index.train(np.asarray(vectors[sample], dtype=np.float32))
    return index


def _sample(vids: Vids, size: int) -> npt.NDArray[np.int64]:
    """Return the positions of the `size` rows whose hashed numbers are smallest: a sample that depends on the set alone."""
    if len(vids) <= size:
        return np.arange(len(vids))
    # The finaliser of SplitMix64: https://prng.di.unimi.it/splitmix64.c
    mixed = vids.astype(np.uint64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return np.sort(np.argpartition(mixed, size)[:size])


def _fill(index: Any, roster: Roster, vectors: npt.NDArray[np.floating[Any]]) -> None:
    for start in range(0, len(roster.vids), _BLOCK_ROWS):
        block = slice(start, start + _BLOCK_ROWS)
        index.add_with_ids(np.asarray(vectors[block], dtype=np.float32), roster.vids[block])


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Train on one thread. One to five gave equal bytes (faiss 1.15, 65,536 x 384), but k-means amplifies any rounding."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
