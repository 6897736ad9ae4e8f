"""A full build of the FAISS index beside plain faiss, and over one and two workers: seconds, in one run, and the same bytes.

python -m tests.bench.bench_build --vectors FILE.npy --factory IVF1024,SQ8

Plain is `index_factory`, `train` and `add_with_ids` on the whole matrix, and `write_index`, with all threads. Ours reads the
rows twice as Arrow batches, trains on a sample, encodes, and stores the segment with its id map, verified by sha256.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import ray

from pipelines.contracts import one_by_one
from pipelines.index.build import Rows, build_base
from pipelines.index.lists import laid_out
from pipelines.index.spec import IndexSpec, Segment
from pipelines.schema import ID, VECTOR, VID
from pipelines.storage import Store
from pipelines.workers import spread

_PIECE, _BATCH = 1 << 17, 1 << 14


@dataclass(frozen=True)
class Slice:
    """Rows of a matrix file."""

    path: Path
    start: int
    end: int

    def __call__(self) -> Iterator[pa.Table]:
        vectors = np.load(self.path, mmap_mode="r")
        for start in range(self.start, self.end, _BATCH):
            block = np.ascontiguousarray(vectors[start : min(start + _BATCH, self.end)])
            vids = np.arange(start, start + len(block), dtype=np.int64) * 7_919 + 1
            names = pa.array([f"product-{vid}" for vid in vids.tolist()], pa.string())
            column = pa.FixedSizeListArray.from_arrays(pa.array(block.ravel()), block.shape[1])
            yield pa.table({ID: names, VID: vids, VECTOR: column})


def plain(path: Path, spec: IndexSpec, folder: Path) -> None:
    """What a script would do."""
    vectors = np.load(path)
    index = faiss.index_factory(spec.dims, spec.template, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add_with_ids(vectors, np.arange(len(vectors)))
    if spec.fast:
        index = laid_out(index)
    faiss.write_index(index, str(folder / "plain.faiss"))


def timed(name: str, build: Callable[[], object]) -> tuple[float, object]:
    begin = time.perf_counter()
    found = build()
    seconds = time.perf_counter() - begin
    print(f"{name:<24} {seconds:8.1f} s", flush=True)
    return seconds, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=Path, required=True)
    parser.add_argument("--factory", default="IVF1024,SQ8")
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    count, dims = np.load(given.vectors, mmap_mode="r").shape
    spec = IndexSpec(factory=given.factory, dims=dims)
    pieces = [Slice(given.vectors, start, min(start + _PIECE, count)) for start in range(0, count, _PIECE)]
    seconds: dict[str, list[float]] = {}
    hashes = set()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        ways = {"here": (one_by_one, 1), "one worker": (spread, 1), "two workers": (spread, 2)}
        for number in range(given.rounds):
            found, _ = timed("plain faiss", partial(plain, given.vectors, spec, folder))
            seconds.setdefault("plain faiss", []).append(found)
            for way, (spreading, in_flight) in ways.items():
                rows = Rows(pieces=pieces, count=count, spread=spreading, in_flight=in_flight)
                store = Store.open(folder / f"{way}-{number}")
                found, segment = timed(way, partial(build_base, store, "base", rows, spec, work=folder / "work"))
                assert isinstance(segment, Segment)
                seconds.setdefault(way, []).append(found)
                hashes.add(tuple(item.sha256 for item in segment.objects))
        ray.shutdown()
    best = {way: min(found) for way, found in seconds.items()}
    for way, found in best.items():
        print(f"{way:<24} {found:8.1f} s  {found / best['plain faiss']:.2f} of plain")
    print(f"two workers against one  {best['two workers'] / best['one worker']:.2f}; distinct bytes: {len(hashes)} (one is asked)")


if __name__ == "__main__":
    main()
