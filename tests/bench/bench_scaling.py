"""How the embed stage scales with its actors, with a tower that costs time and no processor.

    python -m tests.bench.bench_scaling --actors 1 2 4 8

Every text costs the same sleep, so what is missing to n times the pace of one actor is the pipeline's: readers, writers,
the driver, the moments in which an actor waits for its next part. Nodes are told of more CPUs than the machine has.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jobs.cluster import connected
from pipelines.capacity import Patience
from pipelines.embed import run_parts
from tests.cluster import loopback
from tests.embedding import Floats, TableShard, WordEncoder, catalog, changes, dealt, setup, titles

LIMIT = 0.9


class Sleeping(WordEncoder):
    """A tower whose every text takes the same time."""

    def __init__(self, text_s: float) -> None:
        super().__init__()
        self._text_s = text_s

    def encode(self, texts: Sequence[str]) -> Floats:
        time.sleep(self._text_s * len(texts))
        return super().encode(texts)


@dataclass(frozen=True)
class Open:
    """Opens sleeping towers."""

    text_s: float

    def __call__(self, _: Path, **__: Any) -> Sleeping:
        return Sleeping(self.text_s)


def measure(folder: Path, *, actors: int, parts: int, part_rows: int, text_s: float) -> tuple[float, float]:
    """Embed `parts` parts for each actor; return seconds a part between the first and the last, and of the whole."""
    count = parts * actors * part_rows
    rows = catalog(titles(count))
    step = part_rows * 8
    shards = [TableShard.of(f"s{first}", rows.slice(first, step), part_rows) for first in range(0, count, step)]
    folder.mkdir()
    env = setup(folder, shards)
    job = replace(env.job, encoder_factory=Open(text_s), resources={"embedder": 1.0}, actors=actors, threads=1)
    work = dealt(changes(shards), part_rows)
    begin = time.perf_counter()
    ends = [time.perf_counter() for _ in run_parts(work, job, patience=Patience(limit_s=120, tell=print))]
    # The first part of each actor carries its start, and the last ones have no other beside them.
    steady = ends[actors : -actors or None]
    return (steady[-1] - steady[0]) / (len(steady) - 1), (ends[-1] - begin) / len(ends)


def on(address: str, given: argparse.Namespace, folder: Path) -> None:
    """Measure every number of actors on a cluster, and print the table."""
    ideal = given.part_rows * given.text_ms / 1000
    with connected(address):
        measure(folder / "warm-up", actors=max(given.actors), parts=3, part_rows=given.part_rows, text_s=given.text_ms / 1000)
        found = {
            n: measure(folder / str(n), actors=n, parts=given.parts, part_rows=given.part_rows, text_s=given.text_ms / 1000)
            for n in given.actors
        }
    print(f"{given.parts} parts of {given.part_rows} rows for each actor, {ideal:.2f} s of sleep a part")
    print("actors   rows/s steady   efficiency   of the ideal   rows/s whole   efficiency")
    for n, (steady, whole) in found.items():
        first, first_whole = found[given.actors[0]]
        base = given.actors[0]
        print(
            f"{n:6}   {given.part_rows / steady:13.0f}   {first * base / (steady * n):10.3f}   {ideal / (steady * n):12.3f}   "
            f"{given.part_rows / whole:12.0f}   {first_whole * base / (whole * n):10.3f}"
        )
    last = given.actors[-1]
    efficiency = found[given.actors[0]][0] * given.actors[0] / (found[last][0] * last)
    print(f"efficiency at {last} actors {efficiency:.3f}  {'PASS' if efficiency >= LIMIT else 'FAIL'} (limit {LIMIT})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--parts", type=int, default=8, help="for each actor")
    parser.add_argument("--part-rows", type=int, default=2048)
    parser.add_argument("--text-ms", type=float, default=2.0, help="the sleep that a text costs")
    parser.add_argument("--cpus", type=int, default=3, help="of the node that reads and writes; logical ones")
    parser.add_argument("--address", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.address:
        with tempfile.TemporaryDirectory() as name:
            on(given.address, given, Path(name))
        return
    with loopback(cpus=given.cpus) as cluster:
        cluster.start(cpus=1, resources={"embedder": max(given.actors)})
        # Ray reads the token when it is imported.
        command = [sys.executable, "-m", "tests.bench.bench_scaling", *sys.argv[1:], "--address", cluster.address]
        subprocess.run(command, check=True, env=cluster.environment)


if __name__ == "__main__":
    main()
