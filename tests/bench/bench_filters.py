"""Filtered search: recall@10 and latency of both engines by how many products pass, beside comparing all that pass.

python -m tests.bench.bench_filters --vectors products.npy --categories categories.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.filter_probes import BANDS, TOP, recall_filtered
from pipelines.hashes import id_hashes, vids
from pipelines.index.build import Rows
from pipelines.index.probe import exact_scores, exact_top, recall_at
from pipelines.index.search import SegmentSearcher
from pipelines.index.triggers import RefreshOptions
from pipelines.schema import ProductSchema, table_schema
from pipelines.stores.lance import TableSearcher, TableSpec, build, refresh_indexes
from pipelines.where import Filter, col
from tests.pipelines.index_nights import Shop, named
from tests.pipelines.index_nights import rows as index_rows

Floats = npt.NDArray[np.float32]
FILTERS = {"category": "string", "brand": "string", "price": "float"}


def made(count: int) -> tuple[Floats, list[str]]:
    """Clustered vectors, and the cluster of each as its category: 97 of very different sizes."""
    draw = np.random.default_rng(5)
    category = np.minimum(draw.zipf(1.4, count), 97)
    centres = draw.standard_normal((98, 128)).astype(np.float32)
    vectors = centres[category] + 1.5 * draw.standard_normal((count, 128), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True), [f"category {number}" for number in category]


def table_of(vectors: Floats, categories: list[str], spec: TableSpec) -> pa.Table:
    draw = np.random.default_rng(7)
    count = len(vectors)
    ids = pa.array([*named("p", vectors)])
    hashes = id_hashes(ids)
    columns: dict[str, Any] = {"id": ids, "id_hash": hashes, "vid": pa.array(vids(hashes)), "text_hash": hashes, "attr_hash": hashes}
    columns |= {"locale": pa.array(["en"] * count), "category": pa.array(categories)}
    columns["brand"] = pa.array([f"brand {number}" for number in draw.zipf(1.2, count) % 5000])
    columns["price"] = pa.array(np.round(draw.lognormal(4, 1, count), 2))
    columns["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    return pa.table([columns[name] for name in spec.schema.names], schema=spec.schema)


def opened(folder: Path, vectors: Floats, categories: list[str]) -> tuple[SegmentSearcher, TableSearcher]:
    """Build both indexes as a first run does."""
    dims = vectors.shape[1]
    spec = TableSpec(
        schema=table_schema(ProductSchema(text=("title",), filters=FILTERS), dims=dims, vector="float32"), scalar=(*FILTERS,), text=()
    )
    uri = str(folder / "0123456789abcdef.lance")
    build(uri, [table_of(vectors, categories, spec)], spec, {})
    version = refresh_indexes(uri, spec, {}).version
    shop, products = Shop(folder, options=RefreshOptions()), named("p", vectors)
    batches = index_rows(products, batch=8192)
    shop.next(products, added=batches, live=Rows(pieces=[batches], count=len(products)), dims=dims)
    return SegmentSearcher.open(shop.store, shop.opened()), TableSearcher(uri, version, {})


def filters(table: TableSearcher, low: float, high: float) -> Iterator[tuple[str, Filter]]:
    """Yield one filter that knows nothing of the vectors, and those of the category, which is in them."""
    middle = float(np.sqrt(max(low, high / 5) * high))
    prices = np.sort(table.sample().column("price").to_numpy())
    everything = table.num_rows
    first = int(0.3 * len(prices))
    width = max(1, round(middle * len(prices)))
    yield "price", col("price").between(float(prices[first]), float(prices[first + width])).filter(table.columns)
    counts = sorted((item["counts"], item["values"]) for item in table.sample().column("category").value_counts().to_pylist())
    fitting = [(col("category") == value).filter(table.columns) for _, value in counts]
    fitting = [item for item in fitting if low < table.estimate(item).rows / everything <= high and table.estimate(item).rows >= 2 * TOP]
    yield from (("category", item) for item in fitting[-2:])


def timed(search: Callable[[Floats], npt.NDArray[np.int64]], queries: Floats) -> tuple[npt.NDArray[np.int64], float]:
    """Return the answers and the median of milliseconds."""
    answers, spent = np.full((len(queries), TOP), -1, np.int64), []
    for row, query in enumerate(queries):
        begin = time.perf_counter()
        found = search(query)
        spent.append(time.perf_counter() - begin)
        answers[row, : len(found)] = found
    return answers, float(np.median(spent)) * 1e3


def line(segments: SegmentSearcher, table: TableSearcher, where: Filter, queries: Floats) -> str:
    allowed = table.matching(where)
    held = [*table.vectors(where)]
    exact_vids, exact = exact_top(lambda: iter(held), queries, TOP)
    ways: dict[str, Callable[[Floats], npt.NDArray[np.int64]]] = {
        "faiss": lambda query: segments.search(query[None], TOP, allowed=allowed).vids[0],
        "lance": lambda query: table.nearest(query, TOP, where=where).column("vid").to_numpy(),
        "scan": lambda query: table.nearest(query, TOP, where=where, exact=True).column("vid").to_numpy(),
    }
    shown = [f"{len(allowed):>7,}"]
    for search in ways.values():
        found, spent = timed(search, queries)
        recall = recall_at(found, exact_scores(lambda: iter(held), queries, found), exact_vids, exact, TOP).mean()
        shown.append(f"{recall:.3f} {spent:6.1f} ms")
    return " | ".join(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vectors", type=Path, help="a .npy of unit vectors")
    parser.add_argument("--categories", type=Path, help="a .json list with the category of each")
    parser.add_argument("--queries", type=Path, help="a .npy of query vectors; default: products")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--asked", type=int, default=40)
    given = parser.parse_args()
    if given.vectors:
        vectors, categories = np.load(given.vectors), json.loads(given.categories.read_text())
    else:
        vectors, categories = made(given.rows)
    order = np.random.default_rng(1).permutation(len(vectors))
    chosen = order[: given.rows]
    vectors, categories = np.ascontiguousarray(vectors[chosen]), [categories[at] for at in chosen]
    queries = np.load(given.queries) if given.queries else vectors
    queries = queries[np.linspace(0, len(queries) - 1, given.asked).astype(int)]
    with tempfile.TemporaryDirectory() as folder:
        segments, table = opened(Path(folder), vectors, categories)
        print(f"{len(vectors):,} vectors of {vectors.shape[1]}, {len(queries)} queries; recall@{TOP} and median of one query")
        print("band | filter | pass | faiss | lance | scan")
        for band in BANDS:
            for kind, where in filters(table, band.low, band.high):
                print(f"{band.name} | {kind} | {line(segments, table, where, queries)} | {where.text[:60]}", flush=True)
        begin = time.perf_counter()
        found = recall_filtered(segments, TableSearcher(table._uri, table._dataset.version, {}), vectors[:128], {})
        print(f"probes: {time.perf_counter() - begin:.2f} s")
        for engine, bands in found["recall_filtered"].items():
            for item in bands:
                print(f"  {engine} {item}")


if __name__ == "__main__":
    main()
