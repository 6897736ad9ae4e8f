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
from pipelines.index.lists import difference, pieces, trained_sha256
from pipelines.index.segments import FAISS
from pipelines.index.spec import IndexSpec, Segment
from pipelines.manifest import ManifestObject
from pipelines.storage import Store

# The limits of the FAISS reader belong to the process.
_READER = threading.Lock()
_LOOPS = 1 << 24


def load_segment(store: Store, segment: Segment, *, cache: Path | None = None) -> Any:
    """Return the index of a segment, as its card describes it, or raise `CorruptObject`."""
    trained = segment.trained.sha256 if segment.trained else None
    return _load(store, segment.object(FAISS), segment.spec, trained=trained, rows=segment.rows, cache=cache)


def load_template(store: Store, item: ManifestObject, spec: IndexSpec, *, trained: str) -> Any:
    """Return the trained, empty index that is stored under `item`."""
    return _load(store, item, spec, trained=trained, rows=0, cache=None)


def _load(store: Store, item: ManifestObject, spec: IndexSpec, *, trained: str | None, rows: int, cache: Path | None) -> Any:
    with _verified_file(store, item, cache) as path:
        index = _read(path, item, room=_table_bytes(spec))
    where = store.uri(item.key)
    if problem := difference(index, spec):
        raise CorruptObject(f"{where}: {problem}. Run `catalog-embed rollback`.")
    parts = pieces(index)
    counts = {parts.base.ntotal} if parts.finer is None else {parts.base.ntotal, parts.finer.ntotal}
    if counts != {rows}:
        raise CorruptObject(f"{where}: expected {rows} vectors, found {sorted(counts)}. Run `catalog-embed rollback`.")
    if trained_sha256(index) != trained:
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


def _read(path: Path, item: ManifestObject, *, room: int) -> Any:
    """Parse a verified file, within limits that follow from its size."""
    with _READER:
        before = faiss.get_deserialization_vector_byte_limit(), faiss.get_deserialization_loop_limit()
        faiss.set_deserialization_vector_byte_limit(max(4 * item.size, 1 << 20) + room)
        faiss.set_deserialization_loop_limit(_LOOPS)
        try:
            return faiss.read_index(os.fspath(path))
        except RuntimeError as error:
            raise CorruptObject(f"{item.key} is not readable as a FAISS index. Run `catalog-embed rollback`.") from error
        finally:
            faiss.set_deserialization_vector_byte_limit(before[0])
            faiss.set_deserialization_loop_limit(before[1])


def _table_bytes(spec: IndexSpec) -> int:
    """Return the size of the table of products between lists and code words, which the reader makes room for."""
    return 4 * 16 * (spec.parts or 0) * (spec.nlist or 0) + 4


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
