"""Sixty nights in minutes: an index that follows its catalog, against a fresh build every night, on the same vectors.

python -m tests.bench.bench_months --vectors FILE.npy --categories FILE.json --queries FILE.npy --out build/months

Every night 1 to 5 % of the products change: some go, some get another text, new ones come. What comes drifts: a third of
the categories is empty on the first night and opens one after the other, another third dies out. New products are real
vectors that are not in the catalog, moved a little towards another of their category, so that none comes twice. Both sides
are the product's own `next_index` over a store on disk, with the same options, in one process and in turns; what a side
costs is its CPU seconds, and the bytes of the files that it added. Recall@10 is that of real queries that nobody tuned on,
against exact search; latency is the median of single queries on one thread, both sides in turns.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.contracts import FAISS_INDEX
from pipelines.index.build import Rows
from pipelines.index.probe import exact_top, recall_at
from pipelines.index.search import SegmentSearcher
from pipelines.index.segments import Vids
from pipelines.index.spec import Search
from pipelines.index.triggers import RefreshOptions
from pipelines.index.tuning import Exam, border
from pipelines.index.update import Night, next_index
from pipelines.manifest import Manifest
from pipelines.schema import ID, VECTOR, VID
from pipelines.storage import Store
from tests.generations import sample_manifest

Floats = npt.NDArray[np.float32]
_TIMED = 100
_BATCH = 8192


@dataclass
class Catalog:
    """Live products, and the stream of what comes and goes."""

    vectors: Floats
    groups: npt.NDArray[np.int64]
    rng: np.random.Generator
    live: dict[int, Floats] = field(default_factory=dict)
    group_of: dict[int, int] = field(default_factory=dict)
    num_made: int = 0

    def weights(self, night: int, nights: int) -> Floats:
        """How likely a new product is of each group: a third of them opens over the nights, a third closes."""
        count = int(self.groups.max()) + 1
        kind, opens = np.arange(count) % 3, self.rng.permutation(count) / count * nights
        weights = np.ones(count, np.float32)
        weights[kind == 1] = opens[kind == 1] <= night
        weights[kind == 2] = opens[kind == 2] > night
        return weights

    def make(self, number: int, weights: Floats) -> dict[int, Floats]:
        """Return so many new products: numbers and vectors."""
        chance = weights[self.groups]
        chosen = self.rng.choice(len(self.vectors), number, p=chance / chance.sum())
        made = {}
        for row in chosen.tolist():
            mates = self._mates[int(self.groups[row])]
            other = self.vectors[mates[self.rng.integers(len(mates))]]
            vector = self.vectors[row] + np.float32(self.rng.uniform(0.05, 0.3)) * other
            vid = int(self.rng.integers(1, 2**62))
            made[vid] = vector / np.linalg.norm(vector)
            self.group_of[vid] = int(self.groups[row])
        return made

    def __post_init__(self) -> None:
        order = np.argsort(self.groups, kind="stable")
        cuts = np.flatnonzero(np.diff(self.groups[order])) + 1
        self._mates = {int(self.groups[rows[0]]): rows for rows in np.split(order, cuts)}


@dataclass
class Side:
    """One way of keeping an index: its store, its generation, and what it has cost."""

    root: Path
    manifest: Manifest | None = None
    cpu: float = 0.0
    seconds: float = 0.0
    bytes: int = 0
    counted: set[str] = field(default_factory=set)

    @property
    def store(self) -> Store:
        return Store.open(self.root)

    def night(self, number: int, night: Night) -> str:
        """Carry a night out, and return what was done and why."""
        cpu, begin = time.process_time(), time.perf_counter()
        found = next_index(night)
        self.cpu, self.seconds = time.process_time() - cpu, time.perf_counter() - begin
        keys = {str(path): path.stat().st_size for path in self.root.rglob("*") if path.is_file()}
        self.bytes = sum(size for key, size in keys.items() if key not in self.counted)
        self.counted |= keys.keys()
        made = sample_manifest(f"g{number + 1:06d}", segments=found.segments, tombstones=found.tombstones)
        self.manifest = replace(made, indexes={FAISS_INDEX: found.use})
        return f"{found.action}{f' ({found.use.trigger})' if found.use.trigger else ''}"


@dataclass(frozen=True, kw_only=True)
class Line:
    """One night of both sides."""

    night: int
    churn: float
    action: str
    live: int
    nprobe: int
    nprobe_fresh: int
    recall: float
    recall_fresh: float
    p50_ms: float
    p50_fresh_ms: float
    recall_same: float
    p50_same_ms: float
    mb: float
    mb_fresh: float
    cpu_s: float
    cpu_fresh_s: float


@dataclass(frozen=True, kw_only=True)
class Exact:
    """Exact answers over the live products of a night."""

    vids: Vids
    vectors: Floats
    samples: int = 128

    @cached_property
    def exam(self) -> Exam:
        return self.exam_for(self._questions)

    @cached_property
    def probe(self) -> Exam:
        return self.exam_for(self._questions[: self.samples // 2])

    @cached_property
    def _questions(self) -> Floats:
        order = np.argsort(self.vids * np.int64(-7046029254386353131))
        held, context = np.split(self.vectors[order[: 2 * self.samples + 4096]], [2 * self.samples])
        return border(held, context)

    def exam_for(self, queries: Floats) -> Exam:
        vids, scores = exact_top(lambda: iter([(self.vids, self.vectors)]), queries, 10)

        def score_of(found: Vids) -> Floats:
            at = np.minimum(np.searchsorted(self.vids, found), len(self.vids) - 1)
            exact = np.einsum("qd,qkd->qk", queries, self.vectors[at])
            return np.where(self.vids[at] == found, exact, -np.inf).astype(np.float32)

        return Exam(queries=queries, vids=vids, scores=scores, score_of=score_of)


def rows(products: dict[int, Floats]) -> Rows:
    """The products as the index reads them."""
    vids = np.array(list(products), np.int64)
    vectors = np.stack(list(products.values())) if products else np.empty((0, 1), np.float32)

    def piece() -> Iterator[pa.Table]:
        for start in range(0, len(vids), _BATCH):
            block = vids[start : start + _BATCH]
            flat = pa.array(vectors[start : start + _BATCH].ravel(), pa.float32())
            names = pa.array([f"product-{vid}" for vid in block.tolist()], pa.string())
            yield pa.table({ID: names, VID: block, VECTOR: pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])})

    return Rows(pieces=[piece], count=len(vids))


def simulate(catalog: Catalog, queries: Floats, *, nights: int, products: int, options: RefreshOptions, work: Path) -> Iterator[Line]:
    """Live through the nights, and yield what each was like."""
    sides = {name: Side(work / name) for name in ("nightly", "fresh")}
    state = catalog.rng.bit_generator.state
    for number in range(nights + 1):
        catalog.rng.bit_generator.state = state
        weights = catalog.weights(number, nights)
        catalog.rng = np.random.default_rng(number + 1)
        churn = 0.0 if not number else float(catalog.rng.uniform(0.01, 0.05))
        added, gone = _moved(catalog, weights, churn=churn, products=products, first=not number)
        live = dict(sorted(catalog.live.items()))
        exact = Exact(vids=np.array(list(live), np.int64), vectors=np.stack(list(live.values())))
        night = Night(
            store=sides["nightly"].store,
            base=sides["nightly"].manifest,
            run_id=f"night-{number}",
            generation=f"g{number + 1:06d}",
            added=rows(added).pieces[0] if number else lambda: iter(()),
            touched=np.array(sorted(gone), np.int64),
            live=rows(live),
            truth=exact,
            options=options,
            dims=exact.vectors.shape[1],
            work=work / "scratch",
        )
        action = sides["nightly"].night(number, night)
        sides["fresh"].night(number, replace(night, store=sides["fresh"].store, base=None))
        yield _line(sides, exact, queries, number=number, churn=churn, action=action)
        shutil.rmtree(sides["fresh"].root / "segments")


def _moved(catalog: Catalog, weights: Floats, *, churn: float, products: int, first: bool) -> tuple[dict[int, Floats], set[int]]:
    """Take out, change and add products: of a night's churn two fifths go, two fifths come, a fifth gets another text."""
    if first:
        catalog.live = catalog.make(products, weights)
        return catalog.live, set()
    count = int(churn * len(catalog.live))
    names = np.array(list(catalog.live))
    # What has closed goes three times as often as the rest.
    odds = np.where(weights[[catalog.group_of[int(name)] for name in names]] > 0, 1.0, 3.0)
    chosen = catalog.rng.choice(names, int(count * 0.6), replace=False, p=odds / odds.sum()).tolist()
    gone, changed = chosen[: int(count * 0.4)], chosen[int(count * 0.4) :]
    for name in gone:
        del catalog.live[name]
    fresh = catalog.make(int(count * 0.4), weights)
    again = dict(zip(changed, catalog.make(len(changed), weights).values(), strict=True)) if changed else {}
    catalog.live |= fresh | again
    return fresh | again, {*gone, *changed}


def _line(sides: dict[str, Side], exact: Exact, queries: Floats, *, number: int, churn: float, action: str) -> Line:
    opened = {name: SegmentSearcher.open(side.store, side.manifest) for name, side in sides.items() if side.manifest}
    exam = exact.exam_for(queries)
    # Tuning meets other questions every night; asked as the fresh index is, the nightly one shows what its lists are worth.
    asked = {name: (searcher, searcher.how) for name, searcher in opened.items()} | {"same": (opened["nightly"], opened["fresh"].how)}
    recall = {}
    for name, (searcher, how) in asked.items():
        found = searcher.search(queries, 10, how=how).vids
        recall[name] = float(recall_at(found, exam.score_of(found), exam.vids, exam.scores, 10).mean())
    p50 = _latencies(asked, queries)
    one, other = sides["nightly"], sides["fresh"]
    return Line(
        night=number,
        churn=churn,
        action=action,
        live=len(exact.vids),
        nprobe=opened["nightly"].how.nprobe,
        nprobe_fresh=opened["fresh"].how.nprobe,
        recall=recall["nightly"],
        recall_fresh=recall["fresh"],
        p50_ms=p50["nightly"],
        p50_fresh_ms=p50["fresh"],
        recall_same=recall["same"],
        p50_same_ms=p50["same"],
        mb=one.bytes / 1e6,
        mb_fresh=other.bytes / 1e6,
        cpu_s=one.cpu,
        cpu_fresh_s=other.cpu,
    )


def _latencies(asked: dict[str, tuple[SegmentSearcher, Search]], queries: Floats) -> dict[str, float]:
    """Return the median milliseconds of a single query on one thread, the searchers in turns."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    spent: dict[str, list[float]] = {name: [] for name in asked}
    for query in queries[:_TIMED]:
        for name, (searcher, how) in asked.items():
            begin = time.perf_counter()
            searcher.search(query[None, :], 10, how=how)
            spent[name].append(time.perf_counter() - begin)
    faiss.omp_set_num_threads(before)
    return {name: float(np.median(times)) * 1e3 for name, times in spent.items()}


def verdict(lines: Sequence[Line]) -> str:
    """Compare what was asked for with what was measured; the first night is a build on both sides."""
    nights = lines[1:]
    worst = max(line.recall_fresh - line.recall for line in nights)
    shares = {
        "bytes written": (sum(line.mb for line in nights) / sum(line.mb_fresh for line in nights), 0.10),
        "CPU seconds": (sum(line.cpu_s for line in nights) / sum(line.cpu_fresh_s for line in nights), 0.10),
        "recall below fresh, worst night": (worst, 0.005),
        "recall below fresh, mean": (float(np.mean([line.recall_fresh - line.recall for line in nights])), 0.005),
        "recall below fresh, asked the same, worst": (max(line.recall_fresh - line.recall_same for line in nights), 0.005),
        "p50 against fresh, asked the same, worst": (max(line.p50_same_ms / line.p50_fresh_ms for line in nights), 1.3),
        "p50 against fresh, worst night": (max(line.p50_ms / line.p50_fresh_ms for line in nights), 1.3),
        "p50 against fresh, median": (float(np.median([line.p50_ms / line.p50_fresh_ms for line in nights])), 1.3),
    }
    return "\n".join(
        f"{name:<42} {value:8.4f}  asked {asked:g}  {'holds' if value <= asked else 'MISSED'}" for name, (value, asked) in shares.items()
    )


def table(lines: Sequence[Line]) -> str:
    """The nights as Markdown."""
    head = (
        "| night | churn | done | live | probes | fresh | recall | asked the same | fresh | p50 ms | asked the same | fresh | MB | fresh | CPU s | fresh |\n"
        + "|---" * 16
        + "|"
    )
    body = [
        f"| {line.night} | {line.churn:.1%} | {line.action} | {line.live:,} | {line.nprobe} | {line.nprobe_fresh} | {line.recall:.4f} | {line.recall_same:.4f} | {line.recall_fresh:.4f} "
        f"| {line.p50_ms:.2f} | {line.p50_same_ms:.2f} | {line.p50_fresh_ms:.2f} | {line.mb:.1f} | {line.mb_fresh:.1f} | {line.cpu_s:.2f} | {line.cpu_fresh_s:.2f} |"
        for line in lines
    ]
    return "\n".join([head, *body])


def plot(lines: Sequence[Line]) -> str:
    """The nights as an SVG page: recall, latency, bytes and CPU seconds of both sides."""
    panels = [
        ("recall@10", [line.recall for line in lines], [line.recall_fresh for line in lines]),
        ("p50, ms", [line.p50_ms for line in lines], [line.p50_fresh_ms for line in lines]),
        ("MB written", [line.mb for line in lines], [line.mb_fresh for line in lines]),
        ("CPU seconds", [line.cpu_s for line in lines], [line.cpu_fresh_s for line in lines]),
    ]
    width, height, pad = 760, 150, 46
    body = []
    for number, (title, nightly, fresh) in enumerate(panels):
        top, values = number * height, [*nightly[1:], *fresh[1:]]
        low, high = (min(values), max(values)) if title == "recall@10" else (0.0, max(values))
        span = (high - low) or 1.0
        body.append(f'<text x="{pad}" y="{top + 14}">{title}</text>')
        for value in (low, high):
            y = top + height - 14 - (value - low) / span * (height - 40)
            body.append(f'<text x="{pad - 6}" y="{y + 4:.1f}" text-anchor="end" fill="#777">{value:.3g}</text>')
            body.append(f'<line x1="{pad}" x2="{width}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        for series, colour in ((fresh, "#b0622c"), (nightly, "#1f6f8b")):
            points = " ".join(
                f"{pad + at / len(series) * (width - pad):.1f},{top + height - 14 - (value - low) / span * (height - 40):.1f}"
                for at, value in enumerate(series[1:], 1)
            )
            body.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
    legend = f'<text x="{width - 330}" y="14" fill="#1f6f8b">extended every night</text><text x="{width - 150}" y="14" fill="#b0622c">built anew every night</text>'
    size = f'width="{width}" height="{height * len(panels)}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">{legend}{"".join(body)}</svg>\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=Path, required=True, help="unit vectors of real products (.npy)")
    parser.add_argument("--categories", type=Path, required=True, help="a category for each (.json list)")
    parser.add_argument("--queries", type=Path, required=True, help="unit vectors of real queries (.npy)")
    parser.add_argument("--products", type=int, default=100_000)
    parser.add_argument("--nights", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("build/months"))
    given = parser.parse_args()
    names = json.loads(given.categories.read_text())
    groups = np.unique(names, return_inverse=True)[1].astype(np.int64)
    rng = np.random.default_rng(0)
    queries = np.load(given.queries).astype(np.float32)
    queries = queries[rng.permutation(len(queries))[:400]]
    catalog = Catalog(np.load(given.vectors).astype(np.float32), groups, rng)
    lines: list[Line] = []
    with tempfile.TemporaryDirectory() as folder:
        for line in simulate(catalog, queries, nights=given.nights, products=given.products, options=RefreshOptions(), work=Path(folder)):
            lines.append(line)
            print(line, flush=True)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "months.svg").write_text(plot(lines))
    (given.out / "months.json").write_text(json.dumps([asdict(line) for line in lines]))
    (given.out / "months.md").write_text(f"{table(lines)}\n\n```\n{verdict(lines)}\n```\n")
    print(verdict(lines))


if __name__ == "__main__":
    main()
