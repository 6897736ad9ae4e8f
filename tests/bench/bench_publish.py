"""Publish, roll back and open a generation of a million products, and of one night after it. Vectors are random: no tower runs.

python -m tests.bench.bench_publish --rows 1000000

What readers wait for is timed: every object's size is checked and synced, and one entry is created.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.contracts import FAISS_INDEX
from pipelines.hashes import id_hashes, vids
from pipelines.index.build import Rows
from pipelines.index.triggers import RefreshOptions
from pipelines.index.update import Night, next_index
from pipelines.manifest import Manifest, ManifestObject
from pipelines.publish import current, publish, rollback, write_generation
from pipelines.reader import open_generation
from pipelines.schema import ACTION, ADD, ATTR_HASH, HASH, ID, ID_HASH, LOCALE, TEXT_HASH, VECTOR, VID, ProductSchema, table_schema
from pipelines.storage import Store
from pipelines.stores import lance
from pipelines.stores.parquet import write_part
from pipelines.truth import Truth
from tests.generations import sample_manifest

DIMS, LIMIT_S = 16, 1.0
PART_ROWS = 1 << 15
SCHEMA = table_schema(ProductSchema(text=("title",), filters={"price": "float"}), dims=DIMS, vector="float32")


def rows(start: int, stop: int) -> pa.Table:
    """Return products numbered so, each with a random vector."""
    count = stop - start
    random = np.random.default_rng([7, start])
    ids = pa.array([f"P{number:09d}" for number in range(start, stop)])
    hashes = id_hashes(ids)
    vectors = random.standard_normal((count, DIMS), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    digests = [pa.FixedSizeBinaryArray.from_buffers(HASH, count, [None, pa.py_buffer(random.bytes(16 * count))]) for _ in range(2)]
    columns: dict[str, Any] = {
        ID: ids,
        ID_HASH: hashes,
        VID: pa.array(vids(hashes)),
        TEXT_HASH: digests[0],
        ATTR_HASH: digests[1],
        LOCALE: pa.repeat("en", count),
        "price": pa.array(random.random(count)),
        VECTOR: pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), DIMS),
    }
    return pa.table([columns[name] for name in SCHEMA.names], names=SCHEMA.names).cast(SCHEMA)


def pieces(start: int, stop: int) -> Iterator[pa.Table]:
    """Return products in pieces of a part's size."""
    return (rows(first, min(first + PART_ROWS, stop)) for first in range(start, stop, PART_ROWS))


def parts(store: Store, run_id: str, tables: Iterator[pa.Table]) -> tuple[ManifestObject, ...]:
    """Write a run's part of the vector log."""
    made = []
    for number, table in enumerate(tables):
        data = write_part(table.append_column(ACTION, pa.repeat(ADD, table.num_rows)), metadata={"kind": "embed"})
        made.append(ManifestObject.of(store.put(f"vectors/{run_id}/part-{number:05d}.parquet", data), role="vectors", rows=table.num_rows))
    return tuple(made)


def generation(store: Store, base: Manifest | None, *, start: int, stop: int, work: Path) -> Manifest:
    """Write a generation that adds products to the base, unpublished."""
    name = f"g{int(base.generation[1:]) + 1:06d}" if base else "g000001"
    key = "tables/bench.lance"
    uri, spec = store.uri(key), lance.TableSpec(schema=SCHEMA, scalar=("price",))
    if base is None:
        # A fragment for every part, as in a run.
        fragments = [fragment for piece in pieces(start, stop) for fragment in lance.write_fragments(uri, piece, spec, {})]
        lance.commit_build(uri, fragments, spec, {})
    else:
        lance.apply(uri, upserts=pieces(start, stop), attrs=(), deletes=(), spec=spec, options={}, expect_live=stop)
    state = lance.refresh_indexes(uri, spec, {})
    pin = lance.pin(uri, version=state.version, tag=name, previous=base.table if base else None, store=store, key=key, options={})
    index = next_index(
        Night(
            store=store,
            base=base,
            run_id=name,
            generation=name,
            added=partial(pieces, start, stop),
            touched=np.empty(0, np.int64),
            live=Rows(pieces=[partial(pieces, 0, stop)], count=stop),
            truth=Truth(uri=uri, version=state.version, options={}, samples=128),
            options=RefreshOptions(),
            dims=DIMS,
            work=work,
        )
    )
    made = parts(store, f"run-{name}", pieces(start, stop))
    manifest = replace(
        sample_manifest(name),
        run_id=f"run-{name}",
        parent=base.generation if base else None,
        table=pin,
        parts=(*(base.parts if base else ()), *made),
        segments=index.segments,
        tombstones=index.tombstones,
        indexes={FAISS_INDEX: index.use},
        counts={"live": stop},
    )
    return write_generation(store, manifest, {"gates.json": b"{}\n"})


def clocked(action: Callable[[], Any]) -> tuple[float, Any]:
    """Time one action."""
    begin = time.perf_counter()
    result = action()
    return time.perf_counter() - begin, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    found: dict[str, list[float]] = {"publish": [], "rollback": [], "open": [], "reader moves": []}
    with tempfile.TemporaryDirectory() as name:
        root, work = Path(name) / "store", Path(name) / "work"
        root.mkdir()
        store = Store.open(root)
        first = generation(store, None, start=0, stop=given.rows, work=work)
        second = generation(store, first, start=given.rows, stop=given.rows + given.rows // 100, work=work)
        for made in (first, second):
            bytes_ = sum(item.size for item in made.objects)
            print(f"{made.generation}: {made.counts['live']:,} products, {len(made.objects)} objects, {bytes_ >> 20} MiB")
        move = partial(publish, store, alias="prod", clock=lambda: datetime.now(tz=UTC))
        found["publish"].append(clocked(lambda: move(generation=first.generation, expected_seq=0, run_id="run-0"))[0])
        with open_generation(root, reload_s=None) as reader:
            for number in range(given.rounds):
                head = current(store, "prod")
                assert head is not None
                again = partial(move, generation=second.generation, expected_seq=head.seq, run_id=f"run-{number + 1}")
                found["publish"].append(clocked(again)[0])
                found["reader moves"].append(clocked(reader.refresh)[0])
                assert reader.generation == second.generation
                back = partial(rollback, store, alias="prod", run_id=f"back-{number}", reason="bench", clock=lambda: datetime.now(tz=UTC))
                found["rollback"].append(clocked(back)[0])
                found["reader moves"].append(clocked(reader.refresh)[0])
                assert reader.generation == first.generation
                seconds, opened = clocked(lambda: open_generation(root, reload_s=None))
                opened.close()
                found["open"].append(seconds)
    for what, times in found.items():
        verdict = ("PASS" if max(times) < LIMIT_S else "FAIL") if what in ("publish", "rollback") else ""
        print(f"{what:<13} {min(times):.3f} {statistics.median(times):.3f} {max(times):.3f} s (min median max)  {verdict}")


if __name__ == "__main__":
    main()
