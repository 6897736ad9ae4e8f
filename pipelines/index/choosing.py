"""Which index fits a budget of recall, memory and time: a predictor over curves that were measured, and a rule over it.

All curves: FAISS 1.15.1, one query at a time, one thread, AVX-512; 25,000 to 100,000 product texts and 10,000 real search
queries for them, 384 dimensions (all-MiniLM-L6-v2); recall of the ten exact answers of the real queries. Times vary by a
factor of two from machine to machine and hour to hour: they rank indexes, and no promise is made from them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from pipelines.errors import InputError
from pipelines.index.spec import FLAT, MIN_ROWS_PER_LIST, IndexSpec, Search

# Points that k-means sees for each list. With 39, 64, 128 and 256 at 256 lists, .97 of the answers took 22, 27, 24 and 26
# probes; with 39 and 64 at 1,024 lists 31 and 40: more only costs time, which grows with the square of the lists.
SAMPLE_PER_LIST = 64

# Lists that a query visits to meet this share of its answers: at 1,024 lists, and by which power of the lists it grows.
# Fitted to the measurements below within a quarter. The number of products hardly matters.
PROBES: Mapping[float, tuple[float, float]] = {
    0.90: (9.2, 0.09),
    0.95: (22.5, 0.19),
    0.97: (41.6, 0.27),
    0.98: (63.9, 0.36),
    0.99: (119.4, 0.50),
    0.995: (199.4, 0.62),
}
# What 10,000 queries took, by products and lists, in the order of PROBES.
MEASURED_PROBES: Mapping[tuple[int, int], tuple[int, ...]] = {
    (12_500, 32): (7, 11, 14, 16, 18, 20),
    (25_000, 64): (7, 13, 18, 22, 28, 34),
    (100_000, 64): (6, 13, 21, 25, 31, 36),
    (12_500, 128): (9, 18, 27, 35, 49, 59),
    (25_000, 256): (9, 20, 33, 46, 72, 102),
    (100_000, 256): (7, 15, 26, 37, 58, 87),
    (50_000, 1024): (10, 26, 46, 68, 125, 210),
    (100_000, 1024): (8, 20, 39, 61, 119, 201),
    (100_000, 2048): (10, 24, 45, 73, 144, 256),
}
# Lists with more entries are nearer to more queries.
_FULLER = 1.08

# How many candidates for each answer wanted are scored again.
REFINES = (1, 2, 3, 5, 10, 20, 50)


@dataclass(frozen=True)
class _Codes:
    """What a code does: recall of all lists by REFINES, then microseconds an entry, a list visited and a candidate kept."""

    ceiling: tuple[float, ...]
    entry_us: float
    list_us: float
    kept_us: float


# By bits a number for product codes and RaBitQ. 100,000 products in 256 lists; 1,024 lists add up to .02 at the low end.
# RaBitQ with more than one bit scores each candidate it keeps by its finer bits, one by one: 1 to 4 us each.
_EXACT = (1.0,) * len(REFINES)
_PRODUCT: Mapping[float, _Codes] = {
    0.5: _Codes((0.483, 0.640, 0.711, 0.785, 0.848, 0.896, 0.942), 0.0019, 0.45, 0.08),
    1.0: _Codes((0.664, 0.830, 0.879, 0.922, 0.960, 0.980, 0.992), 0.0029, 0.45, 0.08),
    4 / 3: _Codes((0.728, 0.892, 0.939, 0.970, 0.986, 0.995, 0.999), 0.0043, 0.45, 0.08),
    2.0: _Codes((0.820, 0.963, 0.985, 0.994, 0.999, 1.0, 1.0), 0.0046, 0.45, 0.08),
}
_RABITQ: Mapping[int, _Codes] = {
    1: _Codes((0.770, 0.932, 0.967, 0.987, 0.997, 0.999, 1.0), 0.0135, 1.4, 0.2),
    2: _Codes((0.882, 0.988, 0.996, 1.0, 1.0, 1.0, 1.0), 0.018, 1.4, 0.75),
    3: _Codes((0.929, 0.998, 1.0, 1.0, 1.0, 1.0, 1.0), 0.023, 4.2, 4.0),
    4: _Codes((0.958, 0.999, 1.0, 1.0, 1.0, 1.0, 1.0), 0.028, 4.2, 4.0),
    5: _Codes((0.977, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0), 0.033, 4.2, 4.0),
    6: _Codes((0.988, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0), 0.036, 4.2, 4.0),
    8: _Codes((0.996, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0), 0.050, 4.2, 4.0),
}
_PLAIN: Mapping[str, _Codes] = {
    "Flat": _Codes(_EXACT, 0.067, 0.5, 0.05),
    "SQfp16": _Codes(_EXACT, 0.033, 0.5, 0.05),
    "SQ8": _Codes((0.993, *_EXACT[1:]), 0.046, 1.0, 0.05),
}
# What the finer codes themselves tell apart, and what one candidate costs that they score again.
_FINER: Mapping[str, float] = {"SQ8": 0.9937, "SQfp16": 0.9994}
_REFINED_US = 0.45
# A comparison with a whole vector, in the cache and out of it: 10,000 vectors took .30 ms, 20,000 took 1.14 ms.
_ROW_US, _FAR_ROW_US, _CACHE_BYTES = 0.029, 0.063, 16 << 20
_QUERY_US = 15.0
_MEASURED_DIMS, _ANSWERS = 384, 10

# Below this, comparing every vector is best: it is exact, needs no training, never decays, and is still in the cache.
# That is up to 10,900 products of 384 dimensions. Lists win by the clock from 2,000 on, by less than anybody waits for.
_FLAT_MS = 0.35
# Training time grows with the square of the lists: five times the square root of the products is where it stays small.
_MOST_LISTS_A_ROOT, _FEWEST_LISTS, _MOST_LISTS = 5.0, 16, 1 << 16
# From here a graph finds the nearest centroids faster than comparing all of them: .20 instead of .87 ms at 16,384.
_GRAPH_FROM_LISTS, _GRAPH_LINKS = 4096, 32
# Predicted times are within a half of measured ones: indexes nearer to each other are as fast, and the smaller one is
# better. Numbers of lists share their errors: there a tenth counts, and fewer train faster.
_AS_FAST, _AS_FAST_LISTS = 1.5, 1.1
# A kind of codes that misses more than this share of what an earlier one misses is not worth a second training.
_FINER_SHARE = 0.6
_TYPICAL_REFINE = 5
# The share of what lies between the target and the best that the codes can do which is kept as a margin, because held-out
# vectors are few, and not queries: 300 tunings on 128 vectors each for nine indexes, judged by 10,000 queries. For .97 this asks .985 and 88 %
# of the tunings held (79 % at a share of .4, 95 % at .6; on 256 vectors 85, 93 and 98 %).
MARGIN_SHARE = 0.5
_VID_BYTES, _ID_BYTES = 8, 12


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What an index has to reach, and what it may take: the recall of ten answers, bytes of memory, and time a query.

    `id_bytes` is the mean length of a product id. None is no limit.
    """

    recall: float = 0.97
    memory_bytes: int | None = None
    latency_ms: float | None = None
    id_bytes: float = _ID_BYTES

    def __post_init__(self) -> None:
        if not 0 <= self.recall <= 1:
            raise InputError(f"a recall of {self.recall} is none; it is a share, from 0 to 1.")
        for name, value in (("memory_bytes", self.memory_bytes), ("latency_ms", self.latency_ms)):
            if value is not None and not value > 0:
                raise InputError(f"`{name}` is {value}; a budget is more than nothing. Leave it out for no limit.")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """An index for a budget, how to ask it first, and what is predicted of it."""

    spec: IndexSpec
    search: Search
    memory_bytes: int
    latency_ms: float
    recall: float


def choose_spec(n: int, dims: int, *, recall: float = 0.97, memory_bytes: int | None = None, latency_ms: float | None = None) -> IndexSpec:
    """Return the best index for `n` vectors."""
    return ranked(n, dims, Budget(recall=recall, memory_bytes=memory_bytes, latency_ms=latency_ms))[0].spec


def ranked(n: int, dims: int, budget: Budget) -> tuple[Choice, ...]:
    """Return the indexes that should fit the budget, best first: to be tried in turn, each with finer codes than the last.

    Best is the fastest, and among those as fast the smallest; but while vectors are few, comparing every one.
    """
    if n < 1 or dims < 1:
        raise InputError(f"no index is chosen for {n} vectors of {dims} dimensions. Give at least one of each.")
    every = list(_choices(n, dims, budget))
    fit = [choice for choice in every if _fits(choice, budget)]
    if not fit:
        raise InputError(_nearest(every, n, dims, budget))
    kinds: dict[tuple[str, str | None], Choice] = {}
    for choice in sorted(fit, key=_lists_order):
        kinds.setdefault((choice.spec.codes if choice.spec.nlist else "", choice.spec.refine), choice)
    tried: list[Choice] = []
    for choice in sorted(kinds.values(), key=lambda choice: (not _small(choice), _order(choice))):
        if not tried or _missed(choice.spec) < _FINER_SHARE * _missed(tried[-1].spec):
            tried.append(choice)
    return tuple(tried)


def fitting(spec: IndexSpec, rows: int) -> IndexSpec:
    """Return the index asked for, or Flat, which is exact, where so few rows cannot train its lists."""
    return spec if rows >= (spec.nlist or 0) * MIN_ROWS_PER_LIST else replace(spec, factory=FLAT)


def goal_of(spec: IndexSpec, target: float) -> float:
    """Return what held-out vectors must see so that shoppers see the target."""
    return target + MARGIN_SHARE * max(0.0, ceiling_of(spec) - target)


def ceiling_of(spec: IndexSpec) -> float:
    """Return the recall that the codes leave when every list is visited."""
    return 1.0 if spec.nlist is None else max(_ceiling(spec, refine) for refine in _refines(spec))


def predicted_ms(spec: IndexSpec, n: int, search: Search) -> float:
    """Return what one query for ten answers takes. The same numbers on every machine: it orders searches, it times none."""
    scale = spec.dims / _MEASURED_DIMS
    if spec.nlist is None:
        return (_QUERY_US + n * _compared_us(n, spec.dims)) / 1000
    codes, probes = _codes(spec), min(search.nprobe, spec.nlist)
    entries = min(float(n), n * probes / spec.nlist * _FULLER)
    kept = _ANSWERS * search.refine
    micros = _QUERY_US + _centroids_us(spec, probes) + probes * codes.list_us + entries * codes.entry_us * scale
    return (micros + kept * (codes.kept_us + (_REFINED_US * scale if spec.refine else 0.0))) / 1000


def predicted_recall(spec: IndexSpec, search: Search) -> float:
    """Return the recall to expect of real queries: what the visited lists hold, and what the codes can tell apart."""
    if spec.nlist is None:
        return 1.0
    return _covered(search.nprobe, spec.nlist) * _ceiling(spec, search.refine)


def first_search(spec: IndexSpec, n: int, recall: float) -> Search:
    """Return the cheapest search that should reach this recall; where none should, the one that finds most."""
    if spec.nlist is None:
        return Search()
    found = []
    for refine in _refines(spec):
        ceiling = _ceiling(spec, refine)
        if ceiling >= recall:
            found.append(Search(nprobe=_probes(recall / ceiling, spec.nlist), refine=refine))
    if not found:
        return Search(nprobe=_probes(max(PROBES), spec.nlist), refine=REFINES[-1] if spec.refine else 1)
    return min(found, key=lambda search: predicted_ms(spec, n, search))


def memory_bytes(spec: IndexSpec, n: int, *, id_bytes: float = _ID_BYTES) -> int:
    """Return what a reader holds of `n` products: entries, the id map, and the centroids with their graph."""
    centroids = (spec.nlist or 0) * (spec.dims * 4 + (spec.graph or 0) * 2 * 4)
    return math.ceil(n * (spec.entry_bytes + _VID_BYTES + id_bytes)) + centroids


def _choices(n: int, dims: int, budget: Budget) -> Iterator[Choice]:
    for factory in (FLAT, *_factories(n, dims)):
        spec = IndexSpec(factory=factory, dims=dims)
        search = first_search(spec, n, goal_of(spec, budget.recall))
        yield Choice(
            spec=spec,
            search=search,
            memory_bytes=memory_bytes(spec, n, id_bytes=budget.id_bytes),
            latency_ms=predicted_ms(spec, n, search),
            recall=predicted_recall(spec, search),
        )


def _factories(n: int, dims: int) -> Iterator[str]:
    products = [f"PQ{parts}x4fs" for bits in _PRODUCT if (parts := round(bits * dims / 4)) and dims % parts == 0]
    bits = [f"RaBitQ{bits if bits > 1 else ''}fs" for bits in _RABITQ]
    kinds = ["Flat", "SQfp16", "SQ8", "SQ8,Refine(SQfp16)", *bits]
    kinds += [f"{codes},Refine({finer})" for codes in (*products, *bits[:2]) for finer in _FINER]
    nlist = _FEWEST_LISTS
    while nlist <= min(n / MIN_ROWS_PER_LIST, _MOST_LISTS_A_ROOT * math.sqrt(n), _MOST_LISTS):
        graphs = ("", f"_HNSW{_GRAPH_LINKS}") if nlist >= _GRAPH_FROM_LISTS else ("",)
        yield from (f"IVF{nlist}{graph},{kind}" for graph in graphs for kind in kinds)
        nlist *= 2


def _fits(choice: Choice, budget: Budget) -> bool:
    within = budget.memory_bytes is None or choice.memory_bytes <= budget.memory_bytes
    in_time = budget.latency_ms is None or choice.latency_ms <= budget.latency_ms
    return within and in_time and _enough(choice, budget)


def _enough(choice: Choice, budget: Budget) -> bool:
    return choice.recall >= goal_of(choice.spec, budget.recall) - 1e-9 and ceiling_of(choice.spec) >= budget.recall


def _order(choice: Choice) -> tuple[float, ...]:
    return (math.floor(math.log(choice.latency_ms, _AS_FAST)), choice.memory_bytes, choice.latency_ms)


def _lists_order(choice: Choice) -> tuple[float, ...]:
    return (math.floor(math.log(choice.latency_ms, _AS_FAST_LISTS)), choice.spec.nlist or 0, choice.latency_ms)


def _small(choice: Choice) -> bool:
    return choice.spec.nlist is None and choice.latency_ms <= _FLAT_MS


def _missed(spec: IndexSpec) -> float:
    return 0.0 if spec.nlist is None else 1 - _ceiling(spec, _TYPICAL_REFINE if spec.refine else 1)


def _nearest(every: list[Choice], n: int, dims: int, budget: Budget) -> str:
    """Say what is missing: the smallest and the fastest index of this recall, and the most that the memory allows."""
    memory, time = budget.memory_bytes, budget.latency_ms
    asked = [f"a recall of {budget.recall:g}"]
    asked += [f"{memory / 1e6:.3g} MB"] if memory is not None else []
    asked += [f"{time:g} ms"] if time is not None else []
    enough = [choice for choice in every if _enough(choice, budget)]
    within = [choice for choice in every if memory is None or choice.memory_bytes <= memory]
    fast = [choice for choice in enough if time is None or choice.latency_ms <= time]
    near = {"The smallest that finds enough": min(enough, key=_size_order)}
    if time is not None and fast:
        near["The smallest that is fast enough too"] = min(fast, key=_size_order)
    near["The fastest"] = min(enough, key=lambda choice: choice.latency_ms)
    if memory is not None and within:
        near["The most that the memory allows"] = max(within, key=lambda choice: (choice.recall, -choice.latency_ms))
    words = ". ".join(f"{what}: {_told(choice)}" for what, choice in near.items())
    return f"no index of {n:,} vectors of {dims} dimensions has {', '.join(asked)}. {words}. Raise the budget, or ask for less recall."


def _size_order(choice: Choice) -> tuple[float, ...]:
    return (math.floor(math.log(max(choice.memory_bytes, 1), _AS_FAST_LISTS)), choice.latency_ms)


def _told(choice: Choice) -> str:
    return (
        f"{choice.spec.factory} takes {choice.memory_bytes / 1e6:.3g} MB and {choice.latency_ms:.2f} ms for a recall of {choice.recall:.3f}"
    )


def _codes(spec: IndexSpec) -> _Codes:
    """Return the measured codes, or the nearest coarser ones."""
    if spec.codes in _PLAIN:
        return _PLAIN[spec.codes]
    if spec.parts is not None:
        bits = 4 * spec.parts / spec.dims
        return _PRODUCT[max((known for known in _PRODUCT if known <= bits), default=min(_PRODUCT))]
    bits = int(spec.codes.removeprefix("RaBitQ") or 1)
    return _RABITQ[max(known for known in _RABITQ if known <= bits)]


def _refines(spec: IndexSpec) -> tuple[int, ...]:
    return REFINES if spec.refine else REFINES[:1]


def _ceiling(spec: IndexSpec, refine: int) -> float:
    ceiling = _codes(spec).ceiling
    if spec.refine is None:
        return ceiling[0]
    return float(np.interp(math.log(refine), np.log(REFINES), ceiling)) * _FINER[spec.refine]


def _curve(nlist: int) -> tuple[list[float], list[float]]:
    """Return logarithms of probes and of the share of answers that they miss."""
    probes = [math.log(at * (nlist / 1024) ** power) for at, power in PROBES.values()]
    return probes, [math.log(1 - share) for share in PROBES]


def _probes(share: float, nlist: int) -> int:
    """Return how many lists hold this share of the answers."""
    probes, misses = _curve(nlist)
    if share >= 1:
        return nlist
    return max(1, min(nlist, math.ceil(math.exp(_line(math.log(1 - share), misses[::-1], probes[::-1])) - 1e-9)))


def _covered(nprobe: int, nlist: int) -> float:
    """Return the share of the answers in the nearest `nprobe` lists."""
    if nprobe >= nlist:
        return 1.0
    return max(0.0, 1 - math.exp(_line(math.log(nprobe), *_curve(nlist))))


def _line(x: float, xs: list[float], ys: list[float]) -> float:
    """Interpolate between ascending `xs`, and go on beyond the last ones as between them."""
    at = min(max(int(np.searchsorted(xs, x)), 1), len(xs) - 1)
    return ys[at - 1] + (x - xs[at - 1]) * (ys[at] - ys[at - 1]) / (xs[at] - xs[at - 1])


def _compared_us(count: int, dims: int) -> float:
    return (_ROW_US if count * dims * 4 <= _CACHE_BYTES else _FAR_ROW_US) * dims / _MEASURED_DIMS


def _centroids_us(spec: IndexSpec, probes: int) -> float:
    """Return the time to find the nearest centroids. By the graph: fitted to 1,024 to 65,536 of them and 8 to 256 probes."""
    nlist = spec.nlist or 0
    if spec.graph is None:
        return nlist * _compared_us(nlist, spec.dims)
    return 5 + max(1.0, math.log2(nlist) - 8) * (5 + 0.2 * probes) * spec.dims / _MEASURED_DIMS
