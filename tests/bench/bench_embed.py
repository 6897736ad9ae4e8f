"""A whole run against the bare tower: the same texts, encoded in one process and by a full build, in the same minutes.

python -m tests.bench.bench_embed --rows 200000
python -m tests.bench.bench_embed --rows 10000 --tower minilm

Bare is `Encoder.encode` of all texts at once, the tower loaded, on as many threads; it runs before and after the build, and
the mean counts. The build's time is that of `run` in a process that has run before, Ray started, from the lease to the published generation. What it takes
beyond the bare encode, at two sizes, is split into fixed and per-row overhead.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.cluster import connected
from jobs.nightly import Night, open_source_of, run_night, tower_directory
from jobs.project import CATALOG
from jobs.settings import load
from pipelines.contracts import Window
from pipelines.parts import distinct
from pipelines.prepare import Preparer
from pipelines.sample.catalog import write
from pipelines.sample.spec import SampleSpec
from pipelines.schema import RENDERED, TEXT_HASH
from tests.bench.bench_night import Cpu
from tests.shops import closing, configure, make_shop

LIMIT = 0.9


@dataclass(frozen=True, kw_only=True)
class Found:
    """Times of one size."""

    rows: int
    texts: int
    bare: float
    bare_cpu: float
    stage: float
    forward: float
    whole: float
    whole_cpu: float

    def show(self) -> None:
        """Print rates, and each as a share of the bare one."""
        print(f"{self.rows:,} rows, {self.texts:,} texts")
        for name, seconds in (("bare", self.bare), ("forward", self.forward), ("embed stage", self.stage), ("whole run", self.whole)):
            print(f"  {name:<12} {seconds:8.2f} s {self.texts / seconds:9.1f} texts/s  {self.bare / seconds:.3f} of bare")
        print(f"  CPU seconds  {self.bare_cpu:.1f} bare, {self.whole_cpu:.1f} whole run: {self.bare_cpu / self.whole_cpu:.3f}")


def texts_of(config: Path, target: Path) -> int:
    """Write every text that a full build embeds, each once; return how many."""
    settings = load(config)
    window = Window(since=None, until=datetime.now(tz=UTC))
    preparer = Preparer(normalizing=settings.normalizing(window), template=settings.template)
    hashes, texts = [], []
    for shard in open_source_of(settings).read(window):
        for batch in shard.open():
            rows, rendered = preparer.rendered(batch, shard=shard.name)
            hashes.append(rows.select([TEXT_HASH]))
            texts.append(rendered)
    first, _ = distinct(pa.concat_tables(hashes).column(TEXT_HASH))
    found = pa.concat_arrays(texts).take(pa.array(first))
    pq.write_table(pa.table({RENDERED: found}), target)
    return len(found)


def bare(texts: Path, tower: Path, threads: int) -> None:
    """Encode texts here, and print the seconds and the CPU seconds that it took."""
    from encoder.inference import EncodeOptions, Encoder

    encoder = Encoder(tower, options=EncodeOptions(threads=threads))
    found = pq.read_table(texts).column(0).to_pylist()
    encoder.encode(found[:64])
    begin, cpu = time.perf_counter(), time.process_time()
    encoder.encode(found)
    print(time.perf_counter() - begin, time.process_time() - cpu)


def bare_apart(texts: Path, tower: Path, threads: int) -> tuple[float, float]:
    """Encode texts in a process of their own."""
    command = [sys.executable, "-m", "tests.bench.bench_embed", "--bare", str(texts), str(tower), "--threads", str(threads)]
    seconds, cpu = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(seconds), float(cpu)


def measure(config: Path, folder: Path, *, rows: int, threads: int) -> Found:
    """Encode bare, build, and encode bare again."""
    write(config.parent / CATALOG, SampleSpec(products=rows), night=0)
    texts = folder / f"texts-{rows}.parquet"
    count = texts_of(config, texts)
    settings = load(config, overrides={"store.root": str(folder / f"store-{rows}")})
    before = bare_apart(texts, tower_directory(settings), threads)
    begin = time.perf_counter()
    with Cpu() as cpu:
        record = run_night(settings, Night(now=closing(0)))
    whole = time.perf_counter() - begin
    after = bare_apart(texts, tower_directory(settings), threads)
    assert record.facts.outcome == "published", record.facts
    assert record.ran is not None
    assert record.ran.embedded is not None
    assert record.ran.embedded.texts == count
    return Found(
        rows=rows,
        texts=count,
        bare=(before[0] + after[0]) / 2,
        bare_cpu=(before[1] + after[1]) / 2,
        stage=next(stage.seconds for stage in record.facts.stages if stage.name == "embed"),
        forward=record.ran.embedded.seconds,
        whole=whole,
        whole_cpu=cpu.seconds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--tower", choices=["tiny", "minilm"], default="tiny")
    parser.add_argument("--threads", type=int, help="of the tower, bare and in the run; default 1 for tiny, else all cores")
    parser.add_argument("--smaller", type=int, default=4, help="the other size is this many times smaller; 0 for no other")
    parser.add_argument("--bare", nargs=2, type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.bare:
        bare(given.bare[0], given.bare[1], given.threads)
        return
    threads = given.threads or (1 if given.tower == "tiny" else os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as name:
        config = make_shop(Path(name) / "shop", products=100, tower=given.tower == "tiny")
        # Vectors of 32 random-weight dimensions are harder to tell apart from one-byte codes than a trained tower's.
        configure(config, embed={"threads": threads}, gates={"recall_floor": 0.8, "parity": 0.8} if given.tower == "tiny" else {})
        sizes = [given.rows // given.smaller, given.rows] if given.smaller else [given.rows]
        with connected("local"):
            # What the first run of a process loads once is no part of the overhead of a size.
            run_night(load(config, overrides={"store.root": str(Path(name) / "warm-up")}), Night(now=closing(0)))
            found = [measure(config, Path(name), rows=rows, threads=threads) for rows in sizes]
    for size in found:
        size.show()
    if given.smaller:
        small, large = found
        for unit, over in (
            ("s", [size.whole - size.bare for size in found]),
            ("CPU s", [size.whole_cpu - size.bare_cpu for size in found]),
        ):
            per_row = (over[1] - over[0]) / (large.rows - small.rows)
            print(f"overhead {over[0] - per_row * small.rows:.2f} {unit} fixed, {per_row * 1e6:.1f} micro{unit} a row")
    ratio = found[-1].bare / found[-1].whole
    print(f"throughput {ratio:.3f} of the bare encode  {'PASS' if ratio >= LIMIT else 'FAIL'} (limit {LIMIT})")


if __name__ == "__main__":
    main()
