"""What a night costs beside the full build: both, then a night without changes, in one process with one Ray.

python -m tests.bench.bench_night --rows 200000
python -m tests.bench.bench_night --rows 10000 --tower minilm

Fixed start-up is what a night with a few changed texts takes in a shop of 300 products: workers, imports and the tower are
loaded for it, and nothing in it grows with the catalog. `share` is (night - fixed) / (full - fixed), of seconds and of CPU
seconds; the latter count this process and every process that Ray started, dead ones too. `whole` is night / full.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from jobs.cluster import connected
from jobs.nightly import Night, run_night
from jobs.project import CATALOG
from jobs.records import Record
from jobs.settings import load
from pipelines.sample.catalog import write
from pipelines.sample.spec import SampleSpec
from tests.shops import closing, configure, make_shop

LIMIT = 0.05
_LOOK_EVERY_S = 0.25


@dataclass
class Cpu:
    """CPU seconds of this process and of all below it while the block runs, looked at again and again: Ray's workers come and go."""

    seconds: float = 0.0
    _seen: dict[tuple[int, float], float] = field(default_factory=dict)

    def __enter__(self) -> Self:
        self._begin = self._look()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self.seconds = self._look() - self._begin

    def _watch(self) -> None:
        while not self._stop.wait(_LOOK_EVERY_S):
            self._look()

    def _look(self) -> float:
        me = psutil.Process()
        for process in [me, *me.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                self._seen[process.pid, process.create_time()] = times.user + times.system
        return sum(self._seen.values())


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one run took."""

    name: str
    record: Record
    seconds: float
    cpu: float

    def show(self) -> None:
        """Print the run, and where its time went. `search` and `replay` are parts of `gates`."""
        facts = self.record.facts
        ran = self.record.ran
        texts = ran.embedded.texts if ran and ran.embedded else 0
        print(
            f"{self.name:<10} {self.seconds:8.2f} s {self.cpu:8.2f} CPU s  {facts.outcome}, {texts} texts embedded, planned {facts.planned}"
        )
        stages = sorted(((stage.seconds, stage.name) for stage in facts.stages), reverse=True)
        print("           " + "  ".join(f"{name} {seconds:.2f}" for seconds, name in stages))
        print(f"           index {facts.index_action}, recall { ({name: round(value, 4) for name, value in facts.recall.items()}) }")


def timed(name: str, config: Path, *, night: int) -> Cost:
    """Run a night and time it."""
    begin = time.perf_counter()
    with Cpu() as cpu:
        record = run_night(load(config), Night(now=closing(night)))
    return Cost(name=name, record=record, seconds=time.perf_counter() - begin, cpu=cpu.seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--tower", choices=["tiny", "minilm"], default="tiny")
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    # One of a hundred products changes: two in ten of those are new, three have another text, four other attributes, one goes.
    spec = SampleSpec(
        products=given.rows, add_rate=0.002, text_rate=0.003, price_rate=0.003, stock_rate=0.001, tombstone_rate=0.0005, absence_rate=0.0005
    )
    with tempfile.TemporaryDirectory() as name, connected("local"):
        folder = Path(name)
        small = shop(folder / "small", SampleSpec(products=300), given)
        timed("warm-up", small, night=0)
        write(small.parent / CATALOG, SampleSpec(products=300, text_rate=0.05), night=1)
        fixed = timed("fixed", small, night=1)
        fixed.show()
        config = shop(folder / "shop", spec, given)
        full = timed("full", config, night=0)
        full.show()
        write(config.parent / CATALOG, spec, night=1)
        night = timed("night 1 %", config, night=1)
        night.show()
        nothing = timed("unchanged", config, night=1)
        nothing.show()
    changed = sum(night.record.facts.planned[name] for name in ("add", "text", "attr", "delete"))
    print(f"{changed} of {given.rows:,} products changed, {changed / given.rows:.2%}")
    for unit in ("seconds", "cpu"):
        whole, part, start = (getattr(cost, unit) for cost in (full, night, fixed))
        share = (part - start) / (whole - start)
        print(f"{unit:<8} share {share:6.2%}  {'PASS' if share <= LIMIT else 'FAIL'} (limit {LIMIT:.0%})  whole {part / whole:.2%}")
    outcomes = [cost.record.facts.outcome for cost in (full, night, nothing)]
    assert outcomes == ["published", "published", "nothing"], outcomes


def shop(directory: Path, spec: SampleSpec, given: argparse.Namespace) -> Path:
    """Make a shop with the catalog of night 0."""
    tiny = given.tower == "tiny"
    config = make_shop(directory, products=100, tower=tiny)
    write(directory / CATALOG, spec, night=0)
    if given.threads is not None:
        configure(config, embed={"threads": given.threads})
    if tiny:
        # Vectors of 32 random-weight dimensions are harder to tell apart from one-byte codes than a trained tower's.
        configure(config, gates={"recall_floor": 0.8, "parity": 0.8, "recall_max_drop": 0.1})
    return config


if __name__ == "__main__":
    main()
