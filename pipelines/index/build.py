"""A segment from rows: the same rows give the same bytes, in whatever order and pieces they come, whoever encodes them.

Rows come as pieces that can be read on any worker. They are read twice: once for numbers, ids and a training sample,
once to be encoded with the template that the sample trained. The builder holds the finished index, the numbers and the
ids; codes pass through a file in the work folder; a worker holds one batch of vectors and the codes of one piece.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.contracts import Spread, one_by_one
from pipelines.errors import InputError, PlanError
from pipelines.index.choosing import SAMPLE_PER_LIST
from pipelines.index.lists import Codes, Floats, Numbers, append_codes, by_list, encode, fill, imbalance, pieces, trained, trained_sha256
from pipelines.index.loading import load_template
from pipelines.index.segments import CARD, FAISS, FILES, IDS, TRAINED, Roster, Vids, card_bytes, keep, write_table
from pipelines.index.spec import IndexSpec, Segment, Training
from pipelines.manifest import ManifestObject
from pipelines.schema import ID, VECTOR, VECTOR_TYPES, VID
from pipelines.storage import Store

Piece = Callable[[], Iterator[pa.Table]]
"""Rows with ID, VID and VECTOR, as often as asked for; order and batch sizes may differ each time. Picklable."""

_SPREAD_DIGITS = 6
# Ranges of one-byte codes need more than centroids do: learned from 64 of 300 vectors, recall@10 was .93; from all, .99.
_LEAST_SAMPLE = 16_384


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What a segment is built of: the pieces, how many rows they have, and who reads them."""

    pieces: Sequence[Piece]
    count: int
    spread: Spread = one_by_one
    in_flight: int = 4


def build_base(store: Store, name: str, rows: Rows, spec: IndexSpec, *, work: Path) -> Segment:
    """Train a template on a sample of the rows, build a segment of all of them, and store both.

    A repeated run finds what it stored before, and stores the rest.
    """
    roster, sample = _surveyed(name, rows, spec, sample_rows=max(SAMPLE_PER_LIST * spec.nlist, _LEAST_SAMPLE) if spec.nlist else 0)
    files, template = Files(store, name, work), trained(spec, sample)
    sha256 = trained_sha256(template)
    stored = _Stored(files.keep_index(TRAINED, template, rows=0), sha256) if sha256 else None
    return _filled(files, roster, rows, spec, source=store, stored=stored, owner=None)


def build_delta(store: Store, name: str, rows: Rows, owner: Segment, *, work: Path, into: Store | None = None) -> Segment:
    """Build a segment with the trained template of a base, and store it beside the base, or in the store `into`."""
    roster, _ = _surveyed(name, rows, owner.spec, sample_rows=0)
    stored = _Stored(owner.object(TRAINED), owner.trained.sha256) if owner.trained else None
    files = Files(into or store, name, work)
    return _filled(files, roster, rows, owner.spec, source=store, stored=stored, owner=owner)


def gather(piece: Piece) -> Roster:
    """Read numbers and ids of all rows, or raise `PlanError` when two rows have one number."""
    return _roster([_look(piece, 0, np.uint64(0))])


def clash(vid: int, first: str, second: str) -> PlanError:
    """Return what to raise for two live entries under one number."""
    if first == second:
        return PlanError(f"product {first[:80]!r} is added where it is live already: the rows do not fit their base. Plan again.")
    return PlanError(f"products {first[:80]!r} and {second[:80]!r} share the number {vid}. Rename one of them in the catalog.")


class Files:
    """Stores the files of one segment, each once, and remembers what the manifest must list."""

    def __init__(self, store: Store, name: str, work: Path) -> None:
        self.name, self.work = name, work
        self.objects: list[ManifestObject] = []
        self._store = store
        work.mkdir(parents=True, exist_ok=True)

    def keep_index(self, role: str, index: Any, *, rows: int) -> ManifestObject:
        """Store an index."""
        return self._keep(role, lambda path: faiss.write_index(index, str(path)), rows=rows)

    def finish(
        self, index: Any, roster: Roster, *, spec: IndexSpec, owner: Segment | None, training: Training | None, spread: float
    ) -> Segment:
        """Store the index, the id map and the card, which comes last: a folder with a card is whole. Return the segment."""
        segment = Segment(
            name=self.name,
            kind="delta" if owner else "base",
            rows=len(roster.vids),
            spec=spec,
            template=owner.name if owner else None,
            trained=training,
            spread=round(spread, _SPREAD_DIGITS),
            objects=(),
        )
        self.keep_index(FAISS, index, rows=segment.rows)
        self._keep(IDS, lambda path: write_table(pa.table({VID: roster.vids, ID: roster.ids}), path), rows=segment.rows)
        self._keep(CARD, lambda path: path.write_bytes(card_bytes(segment)), rows=None)
        return replace(segment, objects=tuple(self.objects))

    def _keep(self, role: str, write: Callable[[Path], object], *, rows: int | None) -> ManifestObject:
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            path = Path(folder) / FILES[role]
            write(path)
            ref = keep(self._store, f"segments/{self.name}/{path.name}", path)
        self.objects.append(ManifestObject.of(ref, role=role, rows=rows))
        return self.objects[-1]


class _Stored(NamedTuple):
    """A trained template in the store."""

    item: ManifestObject
    sha256: str


class _Seen(NamedTuple):
    """What the first reading of a piece brings: every number and id, and the vectors that may be sampled."""

    vids: Vids
    ids: pa.ChunkedArray
    sampled: Vids
    vectors: Floats


class _Coded(NamedTuple):
    """What the second reading brings: every row as the index keeps it."""

    vids: Vids
    lists: npt.NDArray[np.int32]
    codes: Codes
    finer: Codes
    closeness: npt.NDArray[np.float64]


def _surveyed(name: str, rows: Rows, spec: IndexSpec, *, sample_rows: int) -> tuple[Roster, Floats]:
    """Read numbers and ids of all rows, and the vectors of a sample that depends on the set of numbers alone."""
    # The sample is the smallest hashed numbers. Hashes are even, so a worker need only send those below this.
    share = min(1.0, 1.2 * sample_rows / max(rows.count, 1) + 1e-3)
    below = np.uint64(share * float(2**64 - 2**12)) if sample_rows else np.uint64(0)
    seen = list(rows.spread(_look, ((piece, spec.dims, below) for piece in rows.pieces), in_flight=rows.in_flight))
    roster = _roster(seen)
    if not len(roster.vids):
        raise InputError(f"{name}: there are no rows to build a segment from.")
    vids = np.concatenate([found.sampled for found in seen])
    vectors = np.concatenate([found.vectors for found in seen])
    if len(vids) > sample_rows:
        chosen = np.argpartition(mixed(vids), sample_rows)[:sample_rows]
        vids, vectors = vids[chosen], vectors[chosen]
    return roster, vectors[np.argsort(vids)]


def _look(piece: Piece, dims: int, below: np.uint64) -> _Seen:
    """Read a piece for the first time."""
    numbers, ids, sampled, vectors = [np.empty(0, np.int64)], [], [np.empty(0, np.int64)], [np.empty((0, dims), np.float32)]
    for table in piece():
        vids, names = _names(table)
        numbers.append(vids)
        ids += names.chunks
        if below:
            chosen = mixed(vids) < below
            sampled.append(vids[chosen])
            vectors.append(as_matrix(table.filter(pa.array(chosen))[VECTOR], dims=dims).astype(np.float32))
    return _Seen(np.concatenate(numbers), pa.chunked_array(ids, pa.string()), np.concatenate(sampled), np.concatenate(vectors))


def _encode(store: Store, spec: IndexSpec, stored: _Stored | None, piece: Piece) -> _Coded:
    """Read a piece for the second time, and encode it."""
    template = _template(store, spec, stored)
    finer_bytes = _finer_bytes(template)
    numbers, lists = [np.empty(0, np.int64)], [np.empty(0, np.int32)]
    codes, finer = [np.empty((0, spec.code_bytes), np.uint8)], [np.empty((0, finer_bytes), np.uint8)]
    closeness = [np.empty(0)]
    for table in piece():
        coded = encode(template, as_matrix(table[VECTOR], dims=spec.dims))
        numbers.append(table[VID].to_numpy())
        lists.append(coded.lists)
        codes.append(coded.codes)
        closeness.append(coded.closeness)
        if coded.finer is not None:
            finer.append(coded.finer)
    return _Coded(np.concatenate(numbers), np.concatenate(lists), np.concatenate(codes), np.concatenate(finer), np.concatenate(closeness))


def _template(store: Store, spec: IndexSpec, stored: _Stored | None) -> Any:
    """Return the empty index that rows are encoded with."""
    return load_template(store, stored.item, spec, trained=stored.sha256) if stored else trained(spec, np.empty((0, spec.dims), np.float32))


def _finer_bytes(template: Any) -> int:
    finer = pieces(template).finer
    return int(finer.code_size) if finer is not None else 0


class _Gathered:
    """Codes of all rows in the order of the roster, in files that are mapped."""

    def __init__(self, roster: Roster, folder: Path, *, code_bytes: int, finer_bytes: int) -> None:
        size = len(roster.vids)
        self.lists, self.closeness = np.zeros(size, np.int32), np.zeros(size)
        self.codes = np.memmap(folder / "codes", dtype=np.uint8, mode="w+", shape=(size, code_bytes))
        self.finer = np.memmap(folder / "finer", dtype=np.uint8, mode="w+", shape=(size, finer_bytes)) if finer_bytes else None
        self._roster, self._seen = roster, np.zeros(size, np.bool_)

    def put(self, coded: _Coded) -> None:
        """Take the rows of one piece."""
        at, known = self._roster.position(coded.vids)
        if not known.all() or self._seen[at].any() or len(np.unique(at)) != len(at):
            raise PlanError("the rows changed between two readings. Check that nothing writes to the run's parts, then run again.")
        self.lists[at], self.codes[at], self.closeness[at], self._seen[at] = coded.lists, coded.codes, coded.closeness, True
        if self.finer is not None:
            self.finer[at] = coded.finer

    def check(self) -> None:
        """Raise unless every row came."""
        if missing := int((~self._seen).sum()):
            raise PlanError(f"{missing} rows were gone at the second reading. Check that nothing removes the run's parts.")


def _filled(
    files: Files, roster: Roster, rows: Rows, spec: IndexSpec, *, source: Store, stored: _Stored | None, owner: Segment | None
) -> Segment:
    """Encode all rows, wherever the cluster has room, and put them into the lists in the order of their numbers."""
    size, index = len(roster.vids), _template(source, spec, stored)
    parts = pieces(index)
    with tempfile.TemporaryDirectory(dir=files.work) as folder:
        found = _Gathered(roster, Path(folder), code_bytes=spec.code_bytes, finer_bytes=_finer_bytes(index))
        arguments = ((source, spec, stored, piece) for piece in rows.pieces)
        for coded in rows.spread(_encode, arguments, in_flight=rows.in_flight):
            found.put(coded)
        found.check()
        if spec.nlist is None:
            append_codes(index, found.codes)
        else:
            fill(index, by_list(found.lists, found.codes), rows=size)
        if found.finer is not None:
            append_codes(parts.finer, found.finer)
            index.ntotal = size
    spread = round(max(0.0, float(1.0 - found.closeness.mean())), _SPREAD_DIGITS)
    training = owner.trained if owner else None
    if owner is None and stored is not None:
        even = imbalance(np.bincount(found.lists, minlength=spec.nlist or 1).astype(np.int64))
        training = Training(sha256=stored.sha256, rows=size, spread=spread, imbalance=round(even, _SPREAD_DIGITS))
    return files.finish(index, roster, spec=spec, owner=owner, training=training, spread=spread)


def mixed(vids: Vids) -> npt.NDArray[np.uint64]:
    """Hash numbers once more, so that a sample by hash is no sample by number."""
    # The finaliser of SplitMix64: https://prng.di.unimi.it/splitmix64.c
    found = vids.astype(np.uint64)
    found = (found ^ (found >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    found = (found ^ (found >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return found ^ (found >> np.uint64(31))


def as_matrix(column: pa.ChunkedArray, *, dims: int) -> npt.NDArray[np.floating[Any]]:
    """Return a column of vectors as one matrix of the column's own precision."""
    kind = column.type
    if not pa.types.is_fixed_size_list(kind) or kind.list_size != dims or kind.value_type not in VECTOR_TYPES.values():
        raise PlanError(
            f"the vectors are {kind}, expected {dims} numbers of type {' or '.join(VECTOR_TYPES)}. Check the tower's dimensions."
        )
    if column.null_count:
        raise PlanError(f"{column.null_count} rows have no vector. Only rows with vectors can be indexed: plan again.")
    flat = [np.empty(0, kind.value_type.to_pandas_dtype()), *(chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks)]
    matrix: npt.NDArray[np.floating[Any]] = np.concatenate(flat).reshape(-1, dims)
    if not np.isfinite(matrix).all():
        raise PlanError("a vector holds a number that is not finite. Check the embed stage's quarantine.")
    return matrix


def _names(table: pa.Table) -> tuple[Vids, pa.ChunkedArray]:
    return table[VID].to_numpy(), table[ID]


def _roster(seen: Sequence[_Seen]) -> Roster:
    """Put numbers and ids in order, or raise `PlanError` when two rows have one number."""
    vids: Numbers = np.concatenate([np.empty(0, np.int64), *(found.vids for found in seen)])
    ids = pa.chunked_array([chunk for found in seen for chunk in found.ids.chunks], pa.string())
    order = np.argsort(vids, kind="stable")
    roster = Roster(vids=vids[order], ids=ids.take(pa.array(order)))
    if len(repeated := np.flatnonzero(np.diff(roster.vids) == 0)):
        first, second = (roster.ids[int(repeated[0]) + step].as_py() for step in (0, 1))
        raise clash(int(roster.vids[repeated[0]]), first, second)
    return roster
