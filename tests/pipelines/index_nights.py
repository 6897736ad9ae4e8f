"""A catalog of vectors that lives through nights: the model that the index is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.contracts import FAISS_INDEX, IndexUse
from pipelines.disk import NO_FAULTS, Faults
from pipelines.hashes import id_hashes, vids
from pipelines.index.build import Piece, Rows
from pipelines.index.probe import exact_top
from pipelines.index.segments import CARD, Vids
from pipelines.index.triggers import RefreshOptions
from pipelines.index.tuning import Exam
from pipelines.index.update import NextIndex, Night, next_index
from pipelines.manifest import Manifest
from pipelines.schema import HASH, ID, ID_HASH, VECTOR, VECTOR_TYPES, VID
from pipelines.storage import Store
from tests.generations import sample_manifest

DIMS = 16
# Everything stays incremental: what a test about deltas and tombstones wants.
PATIENT = RefreshOptions(delta_until=1.0, tombstones_until=1.0, max_segments=1000, imbalance_until=1000, drift_until=1000, recall_at_10=0.0)
# One index of every kind: each way to keep codes, with and without finer ones, and a graph over the centroids.
FACTORIES = (
    "Flat",
    "IVF4,Flat",
    "IVF4,SQ8",
    "IVF4,SQfp16",
    "IVF4,SQ8,Refine(SQfp16)",
    "IVF4,PQ4x4fs",
    "IVF4,PQ4x4fs,Refine(SQfp16)",
    "IVF4,RaBitQfs",
    "IVF4,RaBitQ2fs",
    "IVF4,RaBitQ4fs",
    "IVF4,RaBitQfs,Refine(SQ8)",
    "IVF4,RaBitQ4fs,Refine(SQfp16)",
    "IVF8_HNSW4,SQ8",
    "IVF8_HNSW4,RaBitQ2fs,Refine(SQfp16)",
)

Floats = npt.NDArray[np.float32]


def unit(rng: np.random.Generator, count: int, dims: int = DIMS) -> Floats:
    """Random vectors of length one, in a few clusters, so that inverted lists mean something."""
    centres = rng.standard_normal((12, dims))
    vectors = centres[rng.integers(0, 12, count)] + 0.6 * rng.standard_normal((count, dims))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(np.float32)


@cache
def vid_of(product: str) -> int:
    return int(vids(id_hashes(pa.array([product])))[0])


def rows(products: dict[str, Floats], *, batch: int = 7, order: Sequence[int] | None = None, kind: str = "float32") -> Piece:
    """The rows of these products, in batches."""
    names = [*products] if order is None else [[*products][at] for at in order]

    def batches() -> Iterator[pa.Table]:
        for start in range(0, len(names), batch):
            ids = pa.array(names[start : start + batch], pa.string())
            hashes = id_hashes(ids)
            flat = np.concatenate([products[name] for name in names[start : start + batch]])
            values = pa.array(flat.astype(np.float16 if kind == "float16" else np.float32), VECTOR_TYPES[kind])
            vectors = pa.FixedSizeListArray.from_arrays(values, len(flat) // len(ids))
            yield pa.table({ID: ids, VID: vids(hashes), ID_HASH: hashes.cast(HASH), VECTOR: vectors})

    return batches


def of(products: dict[str, Floats], *, cuts: int = 1, order: Sequence[int] | npt.NDArray[np.int64] | None = None, batch: int = 64) -> Rows:
    """The rows of these products in this order, cut into pieces, one of them empty where there are several."""
    names = [*products] if order is None else [[*products][at] for at in order]
    shares = [names[at::cuts] for at in range(cuts)] + [[]] * (cuts > 1)
    return Rows(pieces=[rows({name: products[name] for name in share}, batch=batch) for share in shares], count=len(products))


@dataclass(frozen=True)
class Oracle:
    """Exact answers over the live products, by comparing all of them."""

    live: dict[str, Floats]
    samples: int = 64

    @property
    def held(self) -> Floats:
        names = sorted(self.live)[: self.samples]
        return np.stack([self.live[name] for name in names]).astype(np.float32)

    @property
    def exam(self) -> Exam:
        return self.exam_for(self.held)

    @property
    def probe(self) -> Exam:
        return self.exam

    def exam_for(self, queries: Floats) -> Exam:
        names = [*self.live]
        vids_, vectors = numbers(names), np.stack([self.live[name] for name in names]).astype(np.float32)
        vids, scores = exact_top(lambda: iter([(vids_, vectors)]), queries, 10)
        row = {int(vid): at for at, vid in enumerate(vids_)}

        def score_of(found: Vids) -> Floats:
            at = np.array([[row.get(int(vid), -1) for vid in line] for line in found])
            exact = np.einsum("qd,qkd->qk", queries, vectors[at])
            return np.where(at >= 0, exact, -np.inf).astype(np.float32)

        return Exam(queries=queries, vids=vids, scores=scores, score_of=score_of)


@dataclass
class Shop:
    """A store, the live products, and the generation that should hold them."""

    root: Path
    options: RefreshOptions = PATIENT
    live: dict[str, Floats] = field(default_factory=dict)
    manifest: Manifest | None = None
    night: int = 0
    faults: Faults = NO_FAULTS

    @property
    def store(self) -> Store:
        return Store.open(self.root / "store", faults=self.faults)

    def next(
        self, add: dict[str, Floats] | None = None, change: dict[str, Floats] | None = None, delete: Sequence[str] = (), **other: Any
    ) -> NextIndex:
        """Live through one night; `other` replaces fields of the night."""
        self.night += 1
        new = {**(add or {}), **(change or {})}
        self.live = {name: vector for name, vector in self.live.items() if name not in delete} | new
        night = Night(
            store=self.store,
            base=self.manifest,
            run_id=f"run-{self.night}",
            generation=f"g{self.night:06d}",
            added=rows(new),
            touched=np.array([vid_of(name) for name in (*(change or {}), *delete)], np.int64),
            live=Rows(pieces=[rows(self.live)], count=len(self.live)),
            truth=Oracle(self.live),
            options=self.options,
            dims=DIMS,
            work=self.root / "work",
        )
        found = next_index(replace(night, **other))
        self.manifest = sample_manifest(
            night.generation,
            run_id=night.run_id,
            segments=found.segments,
            tombstones=found.tombstones,
            indexes={FAISS_INDEX: found.use},
        )
        return found

    def opened(self) -> Manifest:
        assert self.manifest is not None
        return self.manifest

    def truth(self, queries: Floats, *, allowed: Sequence[str] | None = None) -> list[list[tuple[float, str]]]:
        """Every (allowed) live product with its exact score, best first, ties by number."""
        names = [name for name in self.live if allowed is None or name in set(allowed)]
        if not names:
            return [[] for _ in queries]
        scores = queries @ np.stack([self.live[name] for name in names]).T
        numbers = {name: vid_of(name) for name in names}
        return [sorted(zip(row.tolist(), names, strict=True), key=lambda pair: (-pair[0], numbers[pair[1]])) for row in scores]


def numbers(products: Sequence[str]) -> Vids:
    return np.array([vid_of(name) for name in products], np.int64) if products else np.empty(0, np.int64)


def sealed(shop: Shop) -> Manifest:
    """The generation as its bytes in the store would bring it back."""
    return Manifest.from_json(shop.opened().to_json())


def used(shop: Shop) -> IndexUse:
    """What the manifest's bytes say about the index."""
    return sealed(shop).indexes[FAISS_INDEX]


def content(manifest: Manifest) -> list[tuple[str, str]]:
    """The files of an index, by role, without the names of the runs that wrote them. A card names its run."""
    return sorted((item.role, item.sha256) for item in manifest.segments if item.role != CARD)


def named(prefix: str, vectors: Floats) -> dict[str, Floats]:
    return {f"{prefix}{number:05d}": vector for number, vector in enumerate(vectors)}
