"""Search over a generation's segments: what they have in common with one index of the live products, up to ties.

Where few entries are hidden, more are fetched than asked for and the hidden ones dropped; where many are, FAISS gets a
selector. On 100,000 x 64 fetching more was 2 to 3 times as fast while up to half were hidden, and half as fast at 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import faiss
import numpy as np
import numpy.typing as npt

from pipelines.errors import CorruptObject, InputError, ManifestError
from pipelines.index.loading import load_segment
from pipelines.index.probe import Scores, best, padded
from pipelines.index.segments import Roster, Vids, check_size, read_roster, read_tombstones, segments_of
from pipelines.index.spec import Segment
from pipelines.manifest import Manifest
from pipelines.storage import Store

DEFAULT_LIMIT_BYTES = 16 * 1024**3

# Above this share of visible entries, the hidden ones among more answers are dropped; below it, a selector is cheaper.
_OVERFETCH_FROM = 0.5
_MARGIN, _SLACK = 1.25, 8
_MORE_PROBES = 4


class Hits(NamedTuple):
    """The answers to each query, best first: ids, and beside them numbers (-1) and scores (-inf) filled up to `k`."""

    ids: list[list[str]]
    vids: Vids
    scores: Scores


@dataclass(frozen=True, kw_only=True, eq=False)
class _View:
    """Which entries of a segment a search may return."""

    vids: Vids
    mask: npt.NDArray[np.bool_]

    @cached_property
    def share(self) -> float:
        """How much of the segment is visible."""
        return self.count / len(self.vids)

    @cached_property
    def count(self) -> int:
        """How many entries are visible."""
        return int(self.mask.sum())

    @property
    def selector(self) -> Any:
        """The same for FAISS; made when first needed, because it costs 80 ns an entry."""
        return self._selectors[-1]

    @cached_property
    def _selectors(self) -> tuple[Any, ...]:
        if self.share < _OVERFETCH_FROM:
            return (faiss.IDSelectorBatch(self.vids[self.mask]),)
        hidden = faiss.IDSelectorBatch(self.vids[~self.mask])
        return hidden, faiss.IDSelectorNot(hidden)  # the second refers to the first without keeping it alive


class _Open:
    """A loaded segment: its index, its roster, and what is live in it."""

    def __init__(self, segment: Segment, index: Any, roster: Roster, tombstones: Vids) -> None:
        self.segment, self.roster, self.live = segment, roster, np.ones(segment.rows, np.bool_)
        at, held = roster.position(tombstones)
        if not held.all():
            raise ManifestError(f"segment {segment.name}: {int((~held).sum())} tombstones are for entries it does not have. Roll back.")
        self.live[at] = False
        self.view = _View(vids=roster.vids, mask=self.live)
        self._index = index

    def allowed(self, vids: Vids) -> _View:
        """Return the view on the live entries among these."""
        at, held = self.roster.position(vids)
        mask = np.zeros(self.segment.rows, np.bool_)
        mask[at[held]] = True
        return _View(vids=self.roster.vids, mask=mask & self.live)

    def best(self, queries: Scores, k: int, view: _View) -> tuple[Vids, Scores]:
        """Return the `k` best visible entries of each query, or all there are, and possibly more; gaps are -1 and -inf."""
        want, lists = min(k, view.count), self.segment.spec.nlist
        if not want:
            return np.full((len(queries), 0), -1, np.int64), np.full((len(queries), 0), -np.inf, np.float32)
        probes, selecting = self._probes(view.share), view.share < _OVERFETCH_FROM
        fetch = want if selecting else math.ceil(k / view.share * _MARGIN)
        vids, scores = self._ask(queries, min(self.segment.rows, fetch + _SLACK), probes, view, selecting=selecting)
        while len(short := np.flatnonzero((vids >= 0).sum(axis=1) < want)) and not (selecting and probes == lists):
            if selecting:
                probes = min((probes or 0) * _MORE_PROBES, lists or 0)
            selecting = True
            vids[short], scores[short] = self._ask(queries[short], vids.shape[1], probes, view, selecting=True)
        return vids, scores

    def _probes(self, share: float) -> int | None:
        """Visit more lists where fewer entries are visible, so that as many are compared as without a filter."""
        spec = self.segment.spec
        return None if spec.nprobe is None or spec.nlist is None else min(spec.nlist, math.ceil(spec.nprobe / share))

    def _ask(self, queries: Scores, k: int, probes: int | None, view: _View, *, selecting: bool) -> tuple[Vids, Scores]:
        """Search once, and blank what is hidden."""
        choice: dict[str, Any] = {"sel": view.selector if selecting else None}
        parameters: Any = faiss.SearchParameters if probes is None else faiss.SearchParametersIVF
        params = parameters(**choice) if probes is None else parameters(nprobe=probes, **choice)
        scores, vids = self._index.search(queries, k, params=params)
        at, known = self.roster.position(vids.ravel())
        if not (known | (vids.ravel() < 0)).all():
            raise CorruptObject(
                f"segment {self.segment.name}: its index holds numbers that its id map does not. Run `catalog-embed rollback`."
            )
        shown = (known & view.mask[at]).reshape(vids.shape)
        return np.where(shown, vids, -1), np.where(shown, scores, -np.inf).astype(np.float32)


class SegmentSearcher:
    """An open index: verified, loaded, and safe to ask from several threads."""

    def __init__(self, segments: Sequence[_Open], *, dims: int | None) -> None:
        self._segments, self._dims = segments, dims
        self._live: Vids = np.sort(np.concatenate([np.empty(0, np.int64), *(item.roster.vids[item.live] for item in segments)]))
        if (twice := self._live[1:][np.diff(self._live) == 0]).size:
            raise ManifestError(
                f"product number {twice[0]} is live in two segments. Run `catalog-embed rollback`, and build the index again."
            )

    @classmethod
    def open(cls, store: Store, manifest: Manifest, *, cache: Path | None = None, size_limit: int = DEFAULT_LIMIT_BYTES) -> Self:
        """Load a generation's segments, none of which is read before its sha256 is found right.

        `cache` keeps downloads of a remote store between openings; `size_limit` is in bytes, for all segments together.
        """
        segments = segments_of(store, manifest)
        check_size(segments, limit_bytes=size_limit)
        tombstones = read_tombstones(store, manifest)
        if unknown := tombstones.keys() - {segment.name for segment in segments}:
            raise ManifestError(f"{manifest.generation}: tombstones for {', '.join(sorted(unknown))}, which it does not have. Roll back.")
        loaded = []
        for segment in segments:
            index, roster = load_segment(store, segment, cache=cache), read_roster(store, segment)
            loaded.append(_Open(segment, index, roster, tombstones.get(segment.name, np.empty(0, np.int64))))
        return cls(loaded, dims=segments[0].spec.dims if segments else None)

    @property
    def num_live(self) -> int:
        """How many products can be found."""
        return len(self._live)

    def all_live_vids(self) -> Vids:
        """Return the numbers of all products that can be found, ascending."""
        return self._live.copy()

    def contains(self, vids: Vids) -> npt.NDArray[np.bool_]:
        """Say for each number whether it can be found."""
        return np.isin(vids, self._live)

    def ids_of(self, vids: Vids) -> list[str]:
        """Return the id of each number, or raise `InputError` when an index never had it."""
        found: dict[int, str] = {}
        for item in self._segments:
            at, held = item.roster.position(vids)
            found |= zip(vids[held].tolist(), item.roster.ids.take(at[held]).to_pylist(), strict=True)
        if missing := set(vids.tolist()) - found.keys():
            raise InputError(f"product number {min(missing)} is in no segment. Ask for numbers that a search returned.")
        return [found[vid] for vid in vids.tolist()]

    def search(self, vectors: npt.NDArray[np.floating[Any]], k: int, *, allowed: Vids | None = None) -> Hits:
        """Return the `k` best live products of each query among `allowed` (all when None), ties by number."""
        queries = self._checked(vectors, k)
        numbers = None if allowed is None else np.unique(np.asarray(allowed, dtype=np.int64))
        vids, scores = np.full((len(queries), 0), -1, np.int64), np.full((len(queries), 0), -np.inf, np.float32)
        for item in self._segments:
            view = item.view if numbers is None else item.allowed(numbers)
            more_vids, more_scores = item.best(queries, k, view)
            vids, scores = best(np.hstack([vids, more_vids]), np.hstack([scores, more_scores]), k)
        vids, scores = padded(vids, scores, k)
        names = iter(self.ids_of(vids[vids >= 0]))
        return Hits([[next(names) for _ in range(int(count))] for count in (vids >= 0).sum(axis=1)], vids, scores)

    def _checked(self, vectors: npt.NDArray[np.floating[Any]], k: int) -> Scores:
        if k < 1:
            raise InputError(f"k is {k}; ask for at least one answer.")
        if vectors.ndim != 2 or (self._dims is not None and vectors.shape[1] != self._dims):  # noqa: PLR2004 - queries by dimensions
            raise InputError(f"queries have the shape {vectors.shape}, expected (queries, {self._dims}). Use the tower of this generation.")
        queries: Scores = np.ascontiguousarray(vectors, dtype=np.float32)
        if not np.isfinite(queries).all():
            raise InputError("a query holds a number that is not finite. Check the tower's output.")
        return queries
