"""Inverted lists as arrays: train a template once, turn vectors into codes anywhere, and put codes into lists.

A code depends on the template and on its own vector alone, never on the batch that it travelled in. So it does not
matter who encodes what, and lists that are filled in the order of positions are the same bytes every time.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from pipelines.errors import InputError
from pipelines.index.spec import FLAT, IndexSpec
from pipelines.manifest import canonical

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.int64]

# Scores of a row against all centroids differ by some 1e-7 from batch to batch. Centroids closer than this to the best
# are compared again, one row at a time and in double precision.
_NEAR = 1e-5
_ROWS_AT_ONCE = 4096
_SCALARS = {"SQ8": faiss.ScalarQuantizer.QT_8bit, "SQfp16": faiss.ScalarQuantizer.QT_fp16}


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoded:
    """Vectors as an index keeps them: the list of each, its code, its finer code if there are any, and its centroid's cosine."""

    lists: npt.NDArray[np.int32]
    codes: Codes
    finer: Codes | None
    closeness: npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Pieces:
    """An index taken apart: what is searched first, lists or one flat store of codes, and the finer codes (None without refinement)."""

    base: Any
    finer: Any | None


def pieces(index: Any) -> Pieces:
    """Take an index of ours apart."""
    if isinstance(index, faiss.IndexRefine):
        return Pieces(base=faiss.downcast_index(index.base_index), finer=faiss.downcast_index(index.refine_index))
    return Pieces(base=index, finer=None)


def trained(spec: IndexSpec, sample: Floats) -> Any:
    """Train an empty index on a sample, whose order matters. Flat needs no training."""
    refine = f",Refine({spec.refine})" if spec.refine else ""
    index: Any = faiss.index_factory(spec.dims, spec.template + refine, faiss.METRIC_INNER_PRODUCT)
    if spec.nlist is None:
        return index
    if len(sample) < spec.nlist:
        raise InputError(f"{len(sample)} rows cannot train the lists of {spec.factory}. Choose Flat.")
    base: Any = pieces(index).base
    if spec.parts is not None:
        # Orders code words for a search that nobody makes, and takes 19 of the 22 seconds of training (512 lists, 192 parts).
        base.do_polysemous_training = False
    with one_thread():
        index.train(np.ascontiguousarray(sample, dtype=np.float32))
    return index


def encode(template: Any, block: npt.NDArray[np.floating[Any]]) -> Encoded:
    """Turn vectors into what the template's index keeps of them."""
    vectors: Floats = np.ascontiguousarray(block, dtype=np.float32)
    base, finer = (found := pieces(template)).base, found.finer
    if not isinstance(base, faiss.IndexIVF):
        codes: Codes = vectors.view(np.uint8).reshape(len(vectors), -1)
        return Encoded(lists=np.zeros(len(vectors), np.int32), codes=codes, finer=None, closeness=np.ones(len(vectors)))
    lists = assign(base.quantizer, vectors)
    codes = np.empty((len(vectors), base.code_size), np.uint8)
    if len(vectors):
        numbers = lists.astype(np.int64)
        base.encode_vectors(len(vectors), faiss.swig_ptr(vectors), faiss.swig_ptr(numbers), faiss.swig_ptr(codes), False)  # noqa: FBT003  SWIG takes no names
    closeness = (vectors * centroids_of(base.quantizer)[lists]).sum(axis=1, dtype=np.float64)
    return Encoded(lists=lists, codes=codes, finer=finer.sa_encode(vectors) if finer is not None else None, closeness=closeness)


def assign(quantizer: Any, vectors: Floats) -> npt.NDArray[np.int32]:
    """Return the nearest centroid of each vector; of equally near ones the first."""
    lists = np.zeros(len(vectors), np.int32)
    if not isinstance(faiss.downcast_index(quantizer), faiss.IndexFlat):
        # A graph is walked by each vector alone.
        return quantizer.search(vectors, 1)[1][:, 0].astype(np.int32) if len(vectors) else lists
    centroids = centroids_of(quantizer)
    for start in range(0, len(vectors), _ROWS_AT_ONCE):
        rows = vectors[start : start + _ROWS_AT_ONCE]
        scores = rows @ centroids.T
        near = scores >= scores.max(axis=1, keepdims=True) - _NEAR
        chosen = near.argmax(axis=1)
        for row in np.flatnonzero(near.sum(axis=1) > 1):
            rivals = np.flatnonzero(near[row])
            exact = (centroids[rivals].astype(np.float64) * rows[row].astype(np.float64)).sum(axis=1)
            chosen[row] = rivals[exact.argmax()]
        lists[start : start + len(rows)] = chosen
    return lists


def centroids_of(quantizer: Any) -> Floats:
    """Return the centroids of a template's lists."""
    found: Floats = quantizer.reconstruct_n(0, quantizer.ntotal)
    return found


def fill(template: Any, encoded: Iterable[tuple[int, Numbers, Codes]], *, rows: int) -> Any:
    """Put codes into the lists of an empty template, and return it. Each list comes once, with ascending positions."""
    base = pieces(template).base
    for number, positions, codes in encoded:
        ids, block = np.ascontiguousarray(positions, np.int64), np.ascontiguousarray(codes)
        base.invlists.add_entries(number, len(ids), faiss.swig_ptr(ids), faiss.swig_ptr(block))
    base.ntotal = rows
    return template


def by_list(lists: npt.NDArray[np.int32], codes: Codes) -> Iterator[tuple[int, Numbers, Codes]]:
    """Yield list after list: its number, the positions of its entries, ascending, and their codes. Reads from a mapped file."""
    order = np.argsort(lists, kind="stable")
    numbers, starts = np.unique(lists[order], return_index=True)
    for number, positions in zip(numbers.tolist(), np.split(order, starts[1:]), strict=True):
        yield number, positions, codes[positions]


def append_codes(flat: Any, codes: Codes) -> None:
    """Append codes to an index that compares every vector, which finer codes are as well."""
    for start in range(0, len(codes), 1 << 16):
        block = np.ascontiguousarray(codes[start : start + (1 << 16)])
        flat.add_sa_codes(block)


def codes_of(flat: Any) -> Codes:
    """Return the codes of an index that compares every vector, row by row; a view, valid while the index is not changed."""
    if not flat.ntotal:
        return np.empty((0, flat.code_size), np.uint8)
    found: Codes = faiss.rev_swig_ptr(flat.codes.data(), flat.ntotal * flat.code_size).reshape(flat.ntotal, flat.code_size)
    return found


def list_of(base: Any, number: int) -> tuple[Numbers, Codes]:
    """Return positions and codes of one inverted list; views, valid while the index is not changed."""
    size = base.invlists.list_size(number)
    if not size:
        return np.empty(0, np.int64), np.empty((0, base.code_size), np.uint8)
    positions: Numbers = faiss.rev_swig_ptr(base.invlists.get_ids(number), size)
    codes: Codes = faiss.rev_swig_ptr(base.invlists.get_codes(number), size * base.code_size).reshape(size, base.code_size)
    return positions, codes


def sizes_of(base: Any) -> Numbers:
    """Return how many entries each list has; one number for an index without lists."""
    if not isinstance(base, faiss.IndexIVF):
        return np.array([base.ntotal], np.int64)
    lists: Any = base.invlists
    return np.array([lists.list_size(number) for number in range(base.nlist)], np.int64)


def imbalance(sizes: Numbers) -> float:
    """Return how unequal lists are: how many times more entries a search sees than if all were of one size."""
    total = int(sizes.sum())
    return float(len(sizes) * (sizes.astype(np.float64) ** 2).sum() / total**2) if total else 1.0


def trained_sha256(index: Any) -> str | None:
    """Hash what training made: centroids and quantisers. None for an index that is not trained."""
    base, finer = (found := pieces(index)).base, found.finer
    if not isinstance(base, faiss.IndexIVF):
        return None
    head = {"type": type(base).__name__, "dims": base.d, "lists": base.nlist, "by_residual": bool(base.by_residual)}
    sha = hashlib.sha256(canonical({**head, "bytes": base.code_size}))
    sha.update(faiss.serialize_index(base.quantizer).tobytes())
    for quantizer in _scalars(base, finer):
        sha.update(canonical({"codes": int(quantizer.qtype)}))
        sha.update(faiss.vector_to_array(quantizer.trained).tobytes())
    if isinstance(base, faiss.IndexIVFPQ):
        sha.update(faiss.vector_to_array(base.pq.centroids).tobytes())
    return sha.hexdigest()


def laid_out(base: Any) -> Any:
    """Return an index of small codes in the layout that is scanned fast; the old one may go."""
    if isinstance(base, faiss.IndexIVFPQ):
        return faiss.IndexIVFPQFastScan(base)
    return faiss.IndexIVFRaBitQFastScan(base)


def difference(index: Any, spec: IndexSpec) -> str | None:
    """Say in words where an index is not of its spec, or None."""
    base, finer = (found := pieces(index)).base, found.finer
    if base.metric_type != faiss.METRIC_INNER_PRODUCT:
        return f"expected the inner product, found metric {base.metric_type}"
    if base.d != spec.dims:
        return f"expected {spec.dims} dimensions, found {base.d}"
    right = _is_of(base, spec) and (finer is None) == (spec.refine is None)
    if finer is not None and spec.refine is not None:
        right = right and isinstance(finer, faiss.IndexScalarQuantizer) and finer.sq.qtype == _SCALARS[spec.refine]
    return None if right else f"expected {spec.factory}, found {type(base).__name__}{' with finer codes' if finer is not None else ''}"


def _is_of(base: Any, spec: IndexSpec) -> bool:
    if spec.nlist is None:
        return isinstance(base, faiss.IndexFlat)
    if not isinstance(base, faiss.IndexIVF) or (base.nlist, base.code_size) != (spec.nlist, spec.code_bytes):
        return False
    if isinstance(faiss.downcast_index(base.quantizer), faiss.IndexFlat) != (spec.graph is None):
        return False
    if spec.codes in _SCALARS:
        return isinstance(base, faiss.IndexIVFScalarQuantizer) and base.sq.qtype == _SCALARS[spec.codes]
    kinds = {FLAT: faiss.IndexIVFFlat, "PQ": faiss.IndexIVFPQ, "Ra": faiss.IndexIVFRaBitQ}
    return isinstance(base, kinds[spec.codes if spec.codes == FLAT else spec.codes[:2]])


def _scalars(*indexes: Any) -> Sequence[Any]:
    return [index.sq for index in indexes if isinstance(index, faiss.IndexIVFScalarQuantizer | faiss.IndexScalarQuantizer)]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let FAISS use one thread: k-means amplifies any rounding, though one to five gave equal bytes (65,536 x 384)."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
