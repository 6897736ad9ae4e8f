"""The indexes of a generation in numbers: how they came about, how even their lists are, and how well these fit what they hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from pipelines.contracts import FAISS_INDEX, LANCE_INDEX, IndexUse
from pipelines.health.questions import Subject
from pipelines.index.lists import Numbers, imbalance
from pipelines.index.search import SegmentSearcher, search_of
from pipelines.index.segments import read_tombstones, segments_of
from pipelines.index.spec import Segment
from pipelines.stores import lance

# Lists are counted by their size in quarters of the mean, up to three times the mean.
_BARS_A_MEAN, _BARS = 4, 12
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One column of a histogram: what it counts, as a person reads it, and how much."""

    label: str
    count: int


@dataclass(frozen=True, kw_only=True)
class Lists:
    """How even the lists of an index are. `imbalance` is 1 where all are of one size, and tells how much more a search compares."""

    count: int
    empty: int | None
    largest: int
    mean: float
    quantiles: Mapping[str, int]
    imbalance: float
    trained_imbalance: float | None
    bars: tuple[Bar, ...]


@dataclass(frozen=True, kw_only=True)
class SegmentHealth:
    """One segment: how many of its entries are live, its bytes, and how far these lie from their centroids (None without lists)."""

    name: str
    kind: str
    rows: int
    live: int
    bytes: int
    spread: float | None

    @property
    def dead(self) -> int:
        """How many entries tombstones hide."""
        return self.rows - self.live


@dataclass(frozen=True, kw_only=True)
class Drift:
    """How far live entries lie from their centroids (one minus the cosine, on average): now, at training, those of the deltas alone."""

    now: float
    trained: float
    deltas: float | None

    def times(self, spread: float) -> float | None:
        """Return a distance as a multiple of what training left."""
        return spread / self.trained if self.trained > 0 else None


@dataclass(frozen=True, kw_only=True)
class FaissHealth:
    """The FAISS index: its segments in the order of their age, how it is asked, its lists and their drift."""

    factory: str | None
    use: IndexUse | None
    nprobe: int
    refine: int
    segments: tuple[SegmentHealth, ...]
    trained_rows: int | None
    trained_sha256: str | None
    lists: Lists | None
    drift: Drift | None

    @property
    def entries(self) -> int:
        """How many entries the segments hold."""
        return sum(segment.rows for segment in self.segments)

    @property
    def live(self) -> int:
        """How many of them can be found."""
        return sum(segment.live for segment in self.segments)


@dataclass(frozen=True, kw_only=True)
class LanceHealth:
    """The table: rows, files, bytes, and its vector index (`kind` is None where a search compares all rows)."""

    use: IndexUse | None
    version: int
    rows: int
    deleted_rows: int
    fragments: int
    data_bytes: int
    index_bytes: int
    kind: str | None
    piece_rows: tuple[int, ...]
    unindexed: int
    lists: Lists | None


def faiss_health(subject: Subject, searcher: SegmentSearcher) -> FaissHealth:
    """Measure the FAISS index of a generation."""
    manifest = subject.manifest
    cards = segments_of(subject.store, manifest)
    dead = {name: int(mask.sum()) for name, mask in read_tombstones(subject.store, manifest).items()}
    segments = tuple(_segment(card, card.rows - dead.get(card.name, 0)) for card in cards)
    training, how = cards[0].trained if cards else None, search_of(manifest)
    lists = drift = None
    if training is not None:
        lists = _lists(searcher.list_sizes, training.imbalance)
        deltas = [segment for segment in segments if segment.kind == "delta"]
        drift = Drift(now=_spread(segments) or 0.0, trained=training.spread, deltas=_spread(deltas))
    return FaissHealth(
        factory=cards[0].spec.factory if cards else None,
        use=manifest.indexes.get(FAISS_INDEX),
        nprobe=how.nprobe,
        refine=how.refine,
        segments=segments,
        trained_rows=training.rows if training else None,
        trained_sha256=training.sha256 if training else None,
        lists=lists,
        drift=drift,
    )


def lance_health(subject: Subject) -> LanceHealth:
    """Measure the table of a generation and its vector index."""
    sizes = lance.sizes(subject.uri, version=subject.pin.version, options=subject.options)
    found = lance.vector_health(subject.uri, subject.pin.version, subject.options)
    return LanceHealth(
        use=subject.manifest.indexes.get(LANCE_INDEX),
        version=subject.pin.version,
        **sizes,
        kind=found.kind if found else None,
        piece_rows=found.piece_rows if found else (),
        unindexed=found.unindexed if found else 0,
        lists=_partitions(found) if found else None,
    )


def bytes_by_kind(subject: Subject) -> Mapping[str, int]:
    """Return the bytes that a generation refers to, by what they are for, the most first."""
    found: Counter[str] = Counter()
    for item in subject.manifest.objects:
        found[item.role] += item.size
    return dict(found.most_common())


def _segment(card: Segment, live: int) -> SegmentHealth:
    return SegmentHealth(
        name=card.name,
        kind=card.kind,
        rows=card.rows,
        live=live,
        bytes=sum(item.size for item in card.objects),
        spread=card.spread if card.trained else None,
    )


def _spread(segments: tuple[SegmentHealth, ...] | list[SegmentHealth]) -> float | None:
    """Return the mean distance over the live entries of segments; None without any."""
    live = sum(segment.live for segment in segments)
    return sum(segment.live * (segment.spread or 0.0) for segment in segments) / live if live else None


def _lists(sizes: Numbers, trained: float) -> Lists:
    mean = float(sizes.mean())
    at = np.minimum((sizes * _BARS_A_MEAN / max(mean, 1e-9)).astype(np.int64), _BARS)
    counts = np.bincount(at, minlength=_BARS + 1).tolist()
    edges = [number / _BARS_A_MEAN for number in range(_BARS + 1)]
    labels = [f"{edge:.2f}-{edge + 1 / _BARS_A_MEAN:.2f}" for edge in edges[:-1]] + [f"{edges[-1]:.2f}+"]
    return Lists(
        count=len(sizes),
        empty=int((sizes == 0).sum()),
        largest=int(sizes.max()),
        mean=mean,
        quantiles={f"{share:.0%}": int(np.quantile(sizes, share, method="nearest")) for share in _QUANTILES},
        imbalance=imbalance(sizes),
        trained_imbalance=trained,
        bars=tuple(Bar(label=label, count=count) for label, count in zip(labels, counts, strict=True)),
    )


def _partitions(found: lance.VectorHealth) -> Lists:
    """Return what is known of a table's partitions: how many hold up to each power of two rows."""
    edges = [1 << power for power in range(len(found.sizes))]
    labels = ["0-1", *(f"{low + 1}-{high}" if high > low + 1 else f"{high}" for low, high in pairwise(edges))]
    return Lists(
        count=found.partitions,
        empty=None,
        largest=found.largest,
        mean=sum(found.piece_rows) / max(found.partitions, 1),
        quantiles={},
        imbalance=found.imbalance,
        trained_imbalance=None,
        bars=tuple(Bar(label=label, count=count) for label, count in zip(labels, found.sizes, strict=False)),
    )
