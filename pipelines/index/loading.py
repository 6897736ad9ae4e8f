"""From a stored object to a FAISS index in memory: hashed before it is parsed, parsed within limits, compared with its card.

The reader of FAISS turns most damage into wrong answers and some into memory errors, so it sees only bytes that are
exactly those that were written.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss

from pipelines.disk import CHUNK_BYTES, TEMPORARY
from pipelines.errors import CorruptObject
from pipelines.index.segments import FAISS, TRAINED
from pipelines.index.spec import FLAT, Segment
from pipelines.manifest import ManifestObject, canonical
from pipelines.storage import Store

# The limits of the FAISS reader belong to the process.
_READER = threading.Lock()
_LOOPS = 1 << 24
_CODES = {"Flat": None, "SQ8": faiss.ScalarQuantizer.QT_8bit, "SQfp16": faiss.ScalarQuantizer.QT_fp16}


def load_segment(store: Store, segment: Segment, *, cache: Path | None) -> Any:
    """Return the index of a segment, as its card describes it, or raise `CorruptObject`."""
    return _load(store, segment.object(FAISS), segment, rows=segment.rows, cache=cache)


def load_template(store: Store, segment: Segment) -> Any:
    """Return the trained, empty index that a base was filled from."""
    return _load(store, segment.object(TRAINED), segment, rows=0, cache=None)


def trained_sha256(index: Any) -> str | None:
    """Hash what training made: the centroids, and the ranges of the codes. None for an index that is not trained."""
    if not isinstance(index, faiss.IndexIVF):
        return None
    head = {"type": type(index).__name__, "dims": index.d, "lists": index.nlist, "by_residual": bool(index.by_residual)}
    sha = hashlib.sha256(canonical(head))
    sha.update(faiss.serialize_index(index.quantizer).tobytes())
    if isinstance(index, faiss.IndexIVFScalarQuantizer):
        sha.update(canonical({"codes": int(index.sq.qtype)}))
        sha.update(faiss.vector_to_array(index.sq.trained).tobytes())
    return sha.hexdigest()


def _load(store: Store, item: ManifestObject, segment: Segment, *, rows: int, cache: Path | None) -> Any:
    with _verified_file(store, item, cache) as path:
        index = _read(path, item)
    where = store.uri(item.key)
    if problem := _difference(index, segment, rows=rows):
        raise CorruptObject(f"{where}: {problem}. Run `catalog-embed rollback`.")
    if trained_sha256(index) != segment.trained_sha256:
        raise CorruptObject(f"{where}: centroids and codes are not those of the template on its card. Run `catalog-embed rollback`.")
    return index


@contextlib.contextmanager
def _verified_file(store: Store, item: ManifestObject, cache: Path | None) -> Iterator[Path]:
    """Yield a local file with exactly the recorded bytes: the object itself, or a copy that `cache` keeps under its sha256."""
    if "://" not in store.root:
        store.verify(item)
        yield Path(store.uri(item.key))
        return
    if cache is None:
        with tempfile.TemporaryDirectory() as folder:
            yield _download(store, item, Path(folder) / item.sha256)
        return
    cache.mkdir(parents=True, exist_ok=True)
    kept = cache / item.sha256
    if not kept.is_file() or _sha256(kept) != item.sha256:
        _download(store, item, kept)
    yield kept


def _download(store: Store, item: ManifestObject, path: Path) -> Path:
    """Copy an object to a local file in pieces; the file appears only when its sha256 is right."""
    part = path.parent / f"{TEMPORARY}{secrets.token_hex(8)}"
    try:
        sha = hashlib.sha256()
        with part.open("xb") as stream:
            for start in range(0, item.size, CHUNK_BYTES):
                piece = store.get_range(item.key, start=start, length=min(CHUNK_BYTES, item.size - start))
                sha.update(piece)
                stream.write(piece)
        if sha.hexdigest() != item.sha256:
            raise CorruptObject(
                f"{store.uri(item.key)}: expected sha256 {item.sha256}, found {sha.hexdigest()}. Run `catalog-embed rollback`."
            )
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _read(path: Path, item: ManifestObject) -> Any:
    """Parse a verified file, within limits that follow from its size."""
    with _READER:
        before = faiss.get_deserialization_vector_byte_limit(), faiss.get_deserialization_loop_limit()
        faiss.set_deserialization_vector_byte_limit(max(4 * item.size, 1 << 20))
        faiss.set_deserialization_loop_limit(_LOOPS)
        try:
            return faiss.read_index(os.fspath(path))
        except RuntimeError as error:
            raise CorruptObject(f"{item.key} is not readable as a FAISS index. Run `catalog-embed rollback`.") from error
        finally:
            faiss.set_deserialization_vector_byte_limit(before[0])
            faiss.set_deserialization_loop_limit(before[1])


def _difference(index: Any, segment: Segment, *, rows: int) -> str | None:
    """Say in words where an index differs from its card."""
    spec = segment.spec
    if (index.d, index.ntotal) != (spec.dims, rows):
        return f"expected {rows} vectors of {spec.dims} dimensions, found {index.ntotal} of {index.d}"
    if index.metric_type != faiss.METRIC_INNER_PRODUCT:
        return f"expected the inner product, found metric {index.metric_type}"
    if spec.factory == FLAT:
        right = isinstance(index, faiss.IndexIDMap2) and isinstance(faiss.downcast_index(index.index), faiss.IndexFlat)
    else:
        codes = _CODES[spec.factory.partition(",")[2]]
        right = isinstance(index, faiss.IndexIVFFlat if codes is None else faiss.IndexIVFScalarQuantizer)
        right = right and index.nlist == spec.nlist and (codes is None or index.sq.qtype == codes)
    return None if right else f"expected {spec.factory}, found {type(index).__name__}"


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
