"""The diff against the bare DuckDB join of the same two files, in alternating rounds, each in a process of its own.

python -m tests.bench.bench_diff --rows 10000000
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.diff import count_texts, diff
from pipelines.diff.dealing import with_rows
from pipelines.diff.engine import DiffOptions
from pipelines.hashes import as_uuids
from pipelines.schema import HASH, ID, PUBLISHED, SCANNED, SHARD
from tests.memory import peak_mb

CHUNK = 1 << 20
BARE = """
    SELECT CASE WHEN p.id_hash IS NULL THEN 'add' WHEN c.id_hash IS NULL THEN 'delete' WHEN c.text_hash <> p.text_hash THEN 'text'
                WHEN c.attr_hash <> p.attr_hash THEN 'attr' ELSE 'same' END AS action, count(*)
    FROM read_parquet('{folder}/current.parquet') c FULL OUTER JOIN read_parquet('{folder}/previous.parquet') p ON c.id_hash = p.id_hash GROUP BY 1
"""


def make(folder: Path, rows: int) -> None:
    """Write two sides that differ in 1 %: a third text, a third attributes, a sixth each added and deleted; shuffled."""
    random = np.random.default_rng(7)
    ids, texts, attrs = (random.integers(0, 2**63, (rows, 2), dtype=np.uint64) for _ in range(3))
    names = np.arange(rows)
    _write(folder / "previous.parquet", PUBLISHED, ids, texts, attrs, names)
    changed = rows // 100
    texts[: changed // 3] ^= np.uint64(1)
    attrs[changed // 3 : 2 * changed // 3] ^= np.uint64(1)
    ids[2 * changed // 3 : 2 * changed // 3 + changed // 6] ^= np.uint64(1)
    order = random.permutation(rows)
    _write(folder / "current.parquet", SCANNED, ids[order], texts[order], attrs[order], names[order])


def _write(path: Path, schema: pa.Schema, *sides: np.ndarray) -> None:
    with pq.ParquetWriter(
        path, as_uuids(schema.empty_table()).schema, compression="none", use_dictionary=[SHARD] if SHARD in schema.names else False
    ) as writer:
        for start in range(0, len(sides[0]), CHUNK):
            count = len(sides[0][start : start + CHUNK])
            columns = [
                pa.FixedSizeBinaryArray.from_buffers(HASH, count, [None, pa.py_buffer(np.ascontiguousarray(side[start : start + CHUNK]))])
                for side in sides[:3]
            ]
            filled = dict(zip(schema.names[:3], columns, strict=True))
            filled[ID] = pa.array(sides[3][start : start + CHUNK]).cast(pa.string())
            rest = [filled[field.name] if field.name in filled else _constant(field, count) for field in schema]
            writer.write_table(as_uuids(pa.Table.from_arrays(rest, schema=schema)), row_group_size=1 << 17)


def _constant(field: pa.Field, count: int) -> pa.Array:
    values = {"state": 0, "text_bytes": 300, "shard": "catalog/part-00000.parquet", "row": 0}
    return pa.repeat(pa.scalar(values.get(field.name), field.type), count)


def measure(what: str, folder: Path, memory_mb: int) -> dict[str, float]:
    """Time one side here, in this process."""
    begin = time.perf_counter()
    previous, current = [folder / "previous.parquet"], [folder / "current.parquet"]
    options = DiffOptions(memory_mb=memory_mb)
    if what == "bare":
        with duckdb.connect(config={"memory_limit": f"{memory_mb}MB", "threads": 2, "temp_directory": str(folder / "bare.spill")}) as db:
            actions = dict(db.execute(BARE.format(folder=folder)).fetchall())
    else:
        outcome = diff(previous, current, outcome=folder / "changes.parquet", options=options)
        if what == "plan":
            count_texts(outcome.changes, previous, options=options)
            with_rows(outcome.changes, previous, current, outcome=folder / "named.parquet", options=options)
        changed = sum(outcome.actions[action] for action in ("text", "attr", "delete"))
        actions = {**outcome.actions, "same": pq.read_metadata(previous[0]).num_rows - changed}
    return {"seconds": time.perf_counter() - begin, "rss_mb": peak_mb(), **actions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-mb", type=int, default=1024)
    parser.add_argument("--one", choices=["bare", "diff", "plan"])
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.one, given.folder, given.memory_mb)))
        return
    with tempfile.TemporaryDirectory() as name:
        make(Path(name), given.rows)
        found: dict[str, list[dict[str, float]]] = {"bare": [], "diff": [], "plan": []}
        for _ in range(given.rounds):
            for what, results in found.items():
                command = [
                    sys.executable,
                    "-m",
                    "tests.bench.bench_diff",
                    "--one",
                    what,
                    "--folder",
                    name,
                    "--memory-mb",
                    str(given.memory_mb),
                ]
                results.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    counts = [{key: value for key, value in results[0].items() if key not in ("seconds", "rss_mb")} for results in found.values()]
    assert counts[0] == counts[1] == counts[2], counts
    print(f"{given.rows:,} rows, {counts[0]}")
    for what, results in found.items():
        seconds = [result["seconds"] for result in results]
        ratios = [result["seconds"] / bare["seconds"] for result, bare in zip(results, found["bare"], strict=True)]
        spread = f"{min(seconds):.2f} {statistics.median(seconds):.2f} {max(seconds):.2f} s (min median max)"
        print(
            f"{what:<5} {spread}  x{statistics.median(ratios):.2f} of bare  peak RSS {max(result['rss_mb'] for result in results):.0f} MB"
        )


if __name__ == "__main__":
    main()
