"""Rows per second and peak memory of writing a sample catalog: `python -m tests.bench.bench_sample --rows 1000000`."""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

from pipelines.sample.catalog import SampleSpec, write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--night", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        start = time.perf_counter()
        paths = write(Path(directory), SampleSpec(products=options.rows), night=options.night)
        elapsed_s = time.perf_counter() - start
        size = sum(path.stat().st_size for path in paths)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{options.rows:,} rows, night {options.night}: {options.rows / elapsed_s:,.0f} rows/s ({elapsed_s:.1f} s)")
    print(f"{len(paths)} files, {size / 1e6:,.0f} MB; peak RSS {peak_mb:,.0f} MiB")


if __name__ == "__main__":
    main()
