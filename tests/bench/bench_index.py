"""What autofaiss makes of a budget, and what we make of what it reached, on the same vectors in one run.

autofaiss finds as much as memory and time allow; we take as little as a recall allows. So autofaiss goes first with the
memory and the time; then ours is asked for the recall that it had on real queries, within the bytes that it took.

python -m tests.bench.bench_index --vectors products.npy --queries queries.npy --rows 100000 --memory 300 --memory 1000 --work /tmp/bench

Vectors and queries are float32 matrices of unit length. Queries are for the comparison alone: neither side sees them
before. Past the number of real vectors, more are made of them. autofaiss is optional, because it pins old packages:
`pip install --no-deps autofaiss==2.18.0 && pip install numpy faiss-cpu==1.15.1 pyarrow pandas fsspec tqdm psutil fire embedding-reader obstore`.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from pipelines.index.choosing import SAMPLE_PER_LIST, Budget, ranked
from pipelines.index.spec import IndexSpec, Search
from pipelines.index.tuning import Exam, Tuned, border, tune

Matrix = npt.NDArray[np.float32]
Numbers = npt.NDArray[np.int64]
K, HELD, MOST_TRIED = 10, 256, 3
# No margin is left above this.
_MOST_RECALL = 0.998


@dataclass(frozen=True, kw_only=True)
class Built:
    """A built index: how it is asked, what it takes, and what it says of itself."""

    name: str
    ask: Callable[[Matrix], Numbers]
    num_bytes: int
    build_s: float
    note: str
    keep: Any


def corpus(real: Matrix, rows: int, work: Path) -> Matrix:
    """Return so many vectors: the real ones, then mixtures of them in a file.

    A made vector is a real one moved towards one of its ten nearest among 20,000 others, by a share between .2 and .5, and
    by noise as long as a tenth of it: such pairs are as near to each other as variants of a product are. Seeded by its block.
    """
    if rows <= len(real):
        return real[:rows]
    path = work / f"vectors-{rows}-{real.shape[1]}.f32"
    made = np.memmap(path, np.float32, "w+", shape=(rows, real.shape[1]))
    made[: len(real)] = real
    block = 20_000
    for start in range(len(real), rows, block):
        random = np.random.default_rng([11, start])
        size = min(block, rows - start)
        origin = real[random.integers(0, len(real), size)]
        others = real[random.choice(len(real), min(20_000, len(real)), replace=False)]
        near = others[faiss.knn(origin, others, K, metric=faiss.METRIC_INNER_PRODUCT)[1][np.arange(size), random.integers(0, K, size)]]
        share = random.uniform(0.2, 0.5, (size, 1)).astype(np.float32)
        noise = random.standard_normal(origin.shape, dtype=np.float32)
        block_of = (1 - share) * origin + share * near + 0.1 * noise / np.linalg.norm(noise, axis=1, keepdims=True)
        made[start : start + size] = block_of / np.linalg.norm(block_of, axis=1, keepdims=True)
    made.flush()
    return made


def exact(vectors: Matrix, queries: Matrix) -> tuple[Numbers, Matrix]:
    """Return the ten best of each query."""
    best: list[tuple[Matrix, Numbers]] = []
    for start in range(0, len(vectors), 100_000):
        scores, at = faiss.knn(queries, np.ascontiguousarray(vectors[start : start + 100_000]), K, metric=faiss.METRIC_INNER_PRODUCT)
        best.append((scores, at + start))
    scores, at = np.hstack([part[0] for part in best]), np.hstack([part[1] for part in best])
    order = np.argsort(-scores, axis=1, kind="stable")[:, :K]
    return np.take_along_axis(at, order, 1), np.take_along_axis(scores, order, 1)


def recall(vectors: Matrix, queries: Matrix, found: Numbers, wanted: Numbers, scores: Matrix) -> float:
    """Return the mean share of the ten exact answers that were found; within 1e-6 of the tenth is as good."""
    shares = []
    for query, row, want, limit in zip(queries, found, wanted, scores[:, -1], strict=True):
        answers = np.unique(row[row >= 0])
        right = np.isin(answers, want) | (vectors[answers] @ query >= limit - 1e-6)
        shares.append(min(K, int(right.sum())) / K)
    return float(np.mean(shares))


def raw(spec: IndexSpec, vectors: Matrix) -> tuple[Any, Any]:
    """Build what a spec says with FAISS alone: lists of codes, laid out for fast scans, and the finer codes."""
    index: Any = faiss.index_factory(spec.dims, spec.template, faiss.METRIC_INNER_PRODUCT)
    if spec.nlist:
        if spec.parts:
            index.do_polysemous_training = False
        index.cp.max_points_per_centroid = SAMPLE_PER_LIST
        if spec.graph:
            index.quantizer_trains_alone = 2
        chosen = np.random.default_rng(3).permutation(len(vectors))[: SAMPLE_PER_LIST * spec.nlist]
        index.train(np.ascontiguousarray(vectors[np.sort(chosen)]))
    finer = None
    if spec.refine:
        kind = faiss.ScalarQuantizer.QT_8bit if spec.refine == "SQ8" else faiss.ScalarQuantizer.QT_fp16
        finer = faiss.IndexScalarQuantizer(spec.dims, kind, faiss.METRIC_INNER_PRODUCT)
        finer.train(np.ascontiguousarray(vectors[:100_000]))
    for start in range(0, len(vectors), 50_000):
        block = np.ascontiguousarray(vectors[start : start + 50_000])
        index.add(block)
        if finer is not None:
            finer.add(block)
    if spec.fast:
        fast: Any = faiss.IndexIVFPQFastScan if spec.parts else faiss.IndexIVFRaBitQFastScan
        index = fast(index)
    return index, finer


def asked(index: Any, finer: Any, queries: Matrix, k: int, how: Search) -> tuple[Numbers, Matrix]:
    """Ask an index built by `raw`."""
    if not isinstance(index, faiss.IndexIVF | faiss.IndexIVFFastScan):
        scores, found = index.search(queries, k)
        return found, scores
    params: Any = faiss.SearchParametersIVF
    base = params(nprobe=how.nprobe)
    if finer is None:
        scores, found = index.search(queries, k, params=base)
        return found, scores
    refined: Any = faiss.IndexRefineSearchParameters
    scores, found = faiss.IndexRefine(index, finer).search(queries, k, params=refined(k_factor=float(how.refine), base_index_params=base))
    return found, scores


def ours(vectors: Matrix, held: Matrix, budget: Budget, *, margin: float | None) -> Built:
    """Choose for the budget, build and tune; go on to the next choice where tuning cannot reach the recall."""
    began = time.perf_counter()
    best: tuple[Tuned, IndexSpec, Any, Any] | None = None
    for choice in ranked(len(vectors), vectors.shape[1], budget)[:MOST_TRIED]:
        index, finer = raw(choice.spec, vectors)
        centroids = faiss.downcast_index(index.quantizer).reconstruct_n(0, choice.spec.nlist) if choice.spec.nlist else None
        queries = border(held, centroids)
        wanted, scores = exact(vectors, queries)
        exam = Exam(queries=queries, vids=wanted, scores=scores, score_of=partial(scored, vectors, queries))
        tuned = tune(partial(asked, index, finer), exam, spec=choice.spec, n=len(vectors), target=budget.recall, margin=margin)
        if best is None or tuned.recall > best[0].recall:
            best = tuned, choice.spec, index, finer
        if tuned.reached:
            break
    assert best is not None
    tuned, spec, index, finer = best
    num_bytes = len(faiss.serialize_index(index)) + (len(faiss.serialize_index(finer)) if finer is not None else 0)
    return Built(
        name="ours",
        ask=lambda queries: asked(index, finer, queries, K, tuned.search)[0],
        num_bytes=num_bytes,
        build_s=time.perf_counter() - began,
        note=f"{spec.factory} nprobe {tuned.search.nprobe} refine {tuned.search.refine}, {len(tuned.trials)} trials: {tuned.reason}",
        keep=(index, finer),
    )


def scored(vectors: Matrix, queries: Matrix, found: Numbers) -> Matrix:
    """Return the exact score of each found product for its query; -inf for a gap."""
    scores = np.einsum("qd,qkd->qk", queries, vectors[np.maximum(found, 0)])
    return np.where(found >= 0, scores, -np.inf).astype(np.float32)


def theirs(vectors: Matrix, budget: Budget, *, cores: int) -> Built | None:
    """Let autofaiss choose, build and tune its own way with the same budget. None where it is not installed."""
    try:
        autofaiss = importlib.import_module("autofaiss")
    except ImportError as error:
        print(f"autofaiss is left out: {error}. See the head of this file.")
        return None
    assert budget.memory_bytes is not None
    # autofaiss 2.18 names arguments that FAISS 1.15 takes by position only.
    engine: Any = faiss
    rotation = engine.OPQMatrix
    engine.OPQMatrix = lambda d, M=1, d2=-1: rotation(d, M, d2)  # noqa: N803
    began = time.perf_counter()
    index, info = autofaiss.build_index(
        embeddings=np.ascontiguousarray(vectors),
        save_on_disk=False,
        max_index_memory_usage=f"{budget.memory_bytes / 1e6:.0f}MB",
        current_memory_available="8GB",
        max_index_query_time_ms=budget.latency_ms or 10.0,
        metric_type="ip",
        nb_cores=cores,
        verbose=30,
    )
    took = time.perf_counter() - began
    return Built(
        name="autofaiss",
        ask=lambda queries: index.search(queries, K)[1],
        num_bytes=len(faiss.serialize_index(index)),
        build_s=took,
        note=f"{info.get('index_key')} {info.get('index_param')}",
        keep=index,
    )


def timed(indexes: Sequence[Built], queries: Matrix, *, rounds: int, cores: int) -> dict[str, tuple[float, float]]:
    """Return the median ms of single queries with one thread, and of a query in a batch with all threads; the sides alternate."""
    singles: dict[str, list[float]] = {built.name: [] for built in indexes}
    batches: dict[str, list[float]] = {built.name: [] for built in indexes}
    for number in range(rounds):
        for built in indexes if number % 2 else indexes[::-1]:
            faiss.omp_set_num_threads(1)
            for at in range(len(queries)):
                began = time.perf_counter()
                built.ask(queries[at : at + 1])
                singles[built.name].append((time.perf_counter() - began) * 1000)
            faiss.omp_set_num_threads(cores)
            began = time.perf_counter()
            built.ask(queries)
            batches[built.name].append((time.perf_counter() - began) * 1000 / len(queries))
    return {name: (float(np.median(singles[name])), float(np.median(batches[name]))) for name in singles}


def compare(vectors: Matrix, held: Matrix, queries: Matrix, budget: Budget, *, rounds: int, cores: int) -> None:
    """Build both sides for one budget, and print a table."""
    faiss.omp_set_num_threads(cores)
    memory = budget.memory_bytes or 0
    print(
        f"\n{len(vectors):,} x {vectors.shape[1]}: {memory / len(vectors):.0f} bytes a vector, {budget.latency_ms or 10:g} ms, recall {budget.recall:g}"
    )
    wanted, scores = exact(vectors, queries)
    other = theirs(vectors, budget, cores=cores)
    faiss.omp_set_num_threads(cores)
    if other is not None:
        reached = recall(vectors, queries, other.ask(queries), wanted, scores)
        print(f"autofaiss built {other.note} in {other.build_s:.0f} s: recall {reached:.4f}, {other.num_bytes / 1e6:.1f} MB", flush=True)
        budget = replace(budget, recall=min(reached, _MOST_RECALL), memory_bytes=other.num_bytes, latency_ms=None)
    sides = [built for built in (ours(vectors, held, budget, margin=None if other is None else 0.0), other) if built is not None]
    times = timed(sides, queries[:300], rounds=rounds, cores=cores)
    print("| side | recall@10 of queries | p50 ms, 1 thread | ms in a batch | MB | build s |\n|---|---|---|---|---|---|")
    for built in sides:
        found = recall(vectors, queries, built.ask(queries), wanted, scores)
        single, batch = times[built.name]
        print(f"| {built.name} | {found:.4f} | {single:.3f} | {batch:.3f} | {built.num_bytes / 1e6:.1f} | {built.build_s:.1f} |")
    for built in sides:
        print(f"{built.name}: {built.note}")
    if len(sides) > 1:
        (single, batch), (their_single, their_batch) = times[sides[0].name], times[sides[1].name]
        memory_ratio = sides[0].num_bytes / sides[1].num_bytes
        print(f"ours / autofaiss: time {single / their_single:.2f}, in a batch {batch / their_batch:.2f}, memory {memory_ratio:.2f}")


def main() -> None:
    """Run the comparison for each memory budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=Path, required=True)
    parser.add_argument("--queries", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--memory", type=float, action="append", help="bytes a vector; may be repeated", required=True)
    parser.add_argument("--latency-ms", type=float)
    parser.add_argument("--recall", type=float, default=0.97)
    parser.add_argument("--num-queries", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("bench-work"))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(1)
    real, queries = np.load(args.vectors), np.load(args.queries)
    real, queries = real[random.permutation(len(real))], queries[random.permutation(len(queries))[: args.num_queries]]
    held, real = real[:HELD], real[HELD:]
    vectors = corpus(real, args.rows, args.work)
    for share in args.memory:
        budget = Budget(recall=args.recall, memory_bytes=int(share * len(vectors)), latency_ms=args.latency_ms, id_bytes=0)
        compare(vectors, held, queries, budget, rounds=args.rounds, cores=args.cores)


if __name__ == "__main__":
    main()
