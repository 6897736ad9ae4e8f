"""A catalog of vectors that lives through nights: the model that the index is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.disk import NO_FAULTS, Faults
from pipelines.hashes import id_hashes, vids
from pipelines.index.build import Batches
from pipelines.index.segments import Vids
from pipelines.index.spec import RefreshOptions
from pipelines.index.update import NextIndex, next_index
from pipelines.manifest import Manifest
from pipelines.schema import HASH, ID, ID_HASH, VECTOR, VECTOR_TYPES, VID
from pipelines.storage import Store
from tests.generations import sample_manifest

DIMS = 16
# Everything stays incremental: what a test about deltas and tombstones wants.
PATIENT = RefreshOptions(delta_until=1.0, tombstones_until=1.0, max_segments=1000)

Floats = npt.NDArray[np.float32]


def unit(rng: np.random.Generator, count: int, dims: int = DIMS) -> Floats:
    """Random vectors of length one, in a few clusters, so that inverted lists mean something."""
    centres = rng.standard_normal((12, dims))
    vectors = centres[rng.integers(0, 12, count)] + 0.6 * rng.standard_normal((count, dims))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(np.float32)


def vid_of(product: str) -> int:
    return int(vids(id_hashes(pa.array([product])))[0])


def rows(products: dict[str, Floats], *, batch: int = 7, order: Sequence[int] | None = None, kind: str = "float32") -> Batches:
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
        """Live through one night; `other` replaces arguments of `next_index`."""
        self.night += 1
        new = {**(add or {}), **(change or {})}
        self.live = {name: vector for name, vector in self.live.items() if name not in delete} | new
        arguments: dict[str, Any] = {
            "base": self.manifest,
            "run_id": f"run-{self.night}",
            "generation": f"g{self.night:06d}",
            "added": rows(new),
            "touched": np.array([vid_of(name) for name in (*(change or {}), *delete)], np.int64),
            "live": rows(self.live),
            "num_live": len(self.live),
            "options": self.options,
            "dims": DIMS,
            "work": self.root / "work",
        }
        found = next_index(self.store, **(arguments | other))
        self.manifest = sample_manifest(f"g{self.night:06d}", segments=found.segments, tombstones=found.tombstones)
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
    return np.array([vid_of(name) for name in products], np.int64)


def named(prefix: str, vectors: Floats) -> dict[str, Floats]:
    return {f"{prefix}{number:05d}": vector for number, vector in enumerate(vectors)}
