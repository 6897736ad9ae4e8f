"""Search over a generation's segments as one index of the live products.

Segments share a template, so a reader merges their lists when it opens them and drops what tombstones hide: a search
costs the same after months of deltas as after a fresh build, and never meets a dead entry.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.contracts import FAISS_INDEX
from pipelines.errors import CorruptObject, InputError, ManifestError
from pipelines.index.compaction import Part
from pipelines.index.lists import Floats, Numbers, append_codes, centroids_of, codes_of, laid_out, sizes_of, trained
from pipelines.index.probe import Scores, best, padded
from pipelines.index.segments import Mask, Vids, check_size, read_tombstones, segments_of
from pipelines.index.spec import IndexSpec, Search
from pipelines.manifest import Manifest
from pipelines.storage import Store

DEFAULT_LIMIT_BYTES = 16 * 1024**3

# Up to so many products that pass a filter are compared one by one: exact, and no slower than probing.
EXACT_ROWS = 50_000
_MORE_PROBES = 4
# Of what passes a filter codes find less: the nearest of it are farther away, and closer to each other.
_FILTERED_REFINE = 4


class Hits(NamedTuple):
    """The answers to each query, best first: ids, and beside them numbers (-1) and scores (-inf) filled up to `k`."""

    ids: list[list[str]]
    vids: Vids
    scores: Scores


class SegmentSearcher:
    """An open index: verified, merged in memory, and safe to ask from several threads."""

    def __init__(self, parts: Sequence[Part], how: Search) -> None:
        self.how = how
        self.spec: IndexSpec | None = parts[0].segment.spec if parts else None
        listed = self.spec is not None and self.spec.nlist is not None
        # Lists lose their dead entries and keep every position; where all vectors are compared, what is dead is left out.
        kept = [np.ones(len(part.live), np.bool_) if listed else part.live for part in parts]
        self._vids: Vids = np.concatenate(
            [np.empty(0, np.int64), *(part.roster.vids[keep] for part, keep in zip(parts, kept, strict=True))]
        )
        names = [part.roster.ids.filter(pa.array(keep)) for part, keep in zip(parts, kept, strict=True)]
        # In one piece: ten ids are taken from one in .007 ms, from several in .06.
        self._ids = pa.chunked_array(
            [chunk.cast(pa.large_string()) for ids in names for chunk in ids.chunks], pa.large_string()
        ).combine_chunks()
        self._mask: Mask = np.concatenate([np.empty(0, np.bool_), *(part.live[keep] for part, keep in zip(parts, kept, strict=True))])
        live = np.flatnonzero(self._mask)
        # Positions of what is live, in the order of its numbers.
        self._places: Numbers = live[np.argsort(self._vids[live], kind="stable")]
        self._live: Vids = self._vids[self._places]
        if (twice := self._live[1:][np.diff(self._live) == 0]).size:
            raise ManifestError(
                f"product number {twice[0]} is live in two segments. Run `catalog-embed rollback`, and build the index again."
            )
        self._loaded = _merged(parts) if parts else None
        self.list_sizes: Numbers = self._loaded.sizes if self._loaded else np.empty(0, np.int64)

    @classmethod
    def open(
        cls,
        store: Store,
        manifest: Manifest,
        *,
        cache: Path | None = None,
        size_limit: int = DEFAULT_LIMIT_BYTES,
        how: Search | None = None,
    ) -> Self:
        """Load a generation's segments, none of which is read before its sha256 is found right.

        `cache` keeps downloads of a remote store between openings; `size_limit` is in bytes, for all segments together.
        Without `how`, the index is asked as the manifest says.
        """
        segments = segments_of(store, manifest)
        check_size(segments, limit_bytes=size_limit)
        tombstones = read_tombstones(store, manifest)
        if unknown := tombstones.keys() - {segment.name for segment in segments}:
            raise ManifestError(f"{manifest.generation}: tombstones for {', '.join(sorted(unknown))}, which it does not have. Roll back.")
        parts = [Part.load(store, segment, tombstones.get(segment.name), cache=cache) for segment in segments]
        return cls(parts, how or search_of(manifest))

    @property
    def num_live(self) -> int:
        """How many products can be found."""
        return len(self._live)

    @cached_property
    def centroids(self) -> Floats | None:
        """The centroids of the lists, or None where every vector is compared."""
        return centroids_of(self._loaded.base.quantizer) if self._loaded and self.spec and self.spec.nlist else None

    def all_live_vids(self) -> Vids:
        """Return the numbers of all products that can be found, ascending."""
        return self._live.copy()

    def contains(self, vids: Vids) -> Mask:
        """Say for each number whether it can be found."""
        return np.isin(vids, self._live)

    def ids_of(self, vids: Vids) -> list[str]:
        """Return the id of each number, or raise `InputError` when no product that can be found has it."""
        at, known = self._position(vids)
        if not known.all():
            raise InputError(f"product number {vids[~known].min()} is not in the index. Ask for numbers that a search returned.")
        return self._ids.take(pa.array(at)).to_pylist()  # type: ignore[no-any-return]

    def search(
        self, vectors: npt.NDArray[np.floating[Any]], k: int, *, allowed: Vids | None = None, how: Search | None = None, exact: bool = False
    ) -> Hits:
        """Return the `k` best live products of each query among `allowed` (all when None), ties by number.

        As many are found as there are, up to `k`. Few enough allowed products are compared one by one. `exact` visits
        every list, and compares by the finest codes there are.
        """
        vids, scores = self.nearest(vectors, k, allowed=allowed, how=how, exact=exact)
        names = iter(self.ids_of(vids[vids >= 0]))
        return Hits([[next(names) for _ in range(int(number))] for number in (vids >= 0).sum(axis=1)], vids, scores)

    def nearest(
        self, vectors: npt.NDArray[np.floating[Any]], k: int, *, allowed: Vids | None = None, how: Search | None = None, exact: bool = False
    ) -> tuple[Vids, Scores]:
        """Do `search`, and leave out the ids."""
        queries = self._checked(vectors, k)
        if self._loaded is None:
            return padded(np.empty((len(queries), 0), np.int64), np.empty((len(queries), 0), np.float32), k)
        mask, count = None, len(self._live)
        if allowed is not None:
            at, known = self._position(np.unique(np.asarray(allowed, dtype=np.int64)))
            mask, count = np.zeros(len(self._vids), np.bool_), int(known.sum())
            mask[at[known]] = True
        places, scores = self._found(queries, k, mask, count, how=how or self.how, exact=exact)
        if places.size and places.max() >= len(self._vids):
            raise CorruptObject("an index holds positions that its id map does not. Run `catalog-embed rollback`.")
        vids = np.where(places >= 0, self._vids[places], -1)
        return padded(*best(vids, np.where(places >= 0, scores, -np.inf).astype(np.float32), k), k)

    def _found(self, queries: Scores, k: int, mask: Mask | None, count: int, *, how: Search, exact: bool) -> tuple[Numbers, Scores]:
        """Return positions and scores of at least the `k` best that pass the mask, or of all there are."""
        want, nlist = min(k, count), self.spec.nlist if self.spec else None
        if not want:
            return np.full((len(queries), 0), -1, np.int64), np.full((len(queries), 0), -np.inf, np.float32)
        assert self._loaded is not None
        chosen = _Chosen(mask)
        if exact or nlist is None or (mask is not None and count <= EXACT_ROWS):
            if self._loaded.finer is not None:
                return self._compare(queries, want, chosen if mask is not None else _Chosen(self._mask))
            return self._ask(queries, want, Search(nprobe=nlist or 1), chosen)
        if mask is None:
            places, scores = self._until_enough(queries, want, how, chosen, nlist)
        else:
            places, scores = self._until_settled(queries, want, how, chosen, nlist, share=count / len(self._live))
        short = np.flatnonzero((places >= 0).sum(axis=1) < want)
        if len(short) and self._loaded.finer is not None:
            # A fast scan leaves out what scores nothing at all.
            chosen = chosen if mask is not None else _Chosen(self._mask)
            places[short], scores[short] = self._compare(queries[short], want, chosen)
        return places, scores

    def _until_enough(self, queries: Scores, want: int, how: Search, chosen: _Chosen, nlist: int) -> tuple[Numbers, Scores]:
        """Search, and visit more lists, in the end all, for queries near which too little is stored."""
        places, scores = self._ask(queries, want, how, chosen)
        while len(short := np.flatnonzero((places >= 0).sum(axis=1) < want)) and how.nprobe < nlist:
            how = replace(how, nprobe=min(how.nprobe * _MORE_PROBES, nlist))
            places[short], scores[short] = self._ask(queries[short], want, how, chosen)
        return places, scores

    def _until_settled(
        self, queries: Scores, want: int, how: Search, chosen: _Chosen, nlist: int, *, share: float
    ) -> tuple[Numbers, Scores]:
        """Search what passes a filter, in more lists until more of them change no answer: it may lie far from the query."""
        nprobe = max(how.nprobe, math.ceil(how.nprobe / math.sqrt(share) / 2))
        how = Search(nprobe=min(nprobe, nlist), refine=how.refine * _FILTERED_REFINE)
        places, scores = self._ask(queries, want, how, chosen)
        open_rows = np.arange(len(queries))
        while len(open_rows) and how.nprobe < nlist:
            how = replace(how, nprobe=min(how.nprobe * _MORE_PROBES, nlist))
            found, found_scores = self._ask(queries[open_rows], want, how, chosen)
            moved = (np.sort(found, axis=1) != np.sort(places[open_rows], axis=1)).any(axis=1) | (found < 0).any(axis=1)
            places[open_rows], scores[open_rows] = found, found_scores
            open_rows = open_rows[moved]
        return places, scores

    def _ask(self, queries: Scores, k: int, how: Search, chosen: _Chosen) -> tuple[Numbers, Scores]:
        """Search the lists once, and score what was found again where there are finer codes."""
        assert self._loaded is not None
        if self.spec is None or self.spec.nlist is None:
            params = _with("SearchParameters", sel=chosen.selector)
        else:
            params = _with("SearchParametersIVF", nprobe=how.nprobe, sel=chosen.selector)
            if self._loaded.finer is not None:
                params = _with("IndexRefineSearchParameters", k_factor=float(how.refine), base_index_params=params)
        scores, places = self._loaded.whole.search(queries, k, params=params)
        return places, scores

    def _compare(self, queries: Scores, k: int, chosen: _Chosen) -> tuple[Numbers, Scores]:
        """Compare the chosen entries one by one, by their finer codes."""
        assert self._loaded is not None
        assert self._loaded.finer is not None
        scores, places = self._loaded.finer.search(queries, k, params=_with("SearchParameters", sel=chosen.selector))
        return places, scores

    def _position(self, vids: Vids) -> tuple[Numbers, Mask]:
        """Return the position of each number, and whether it is live."""
        if not len(self._live):
            return np.zeros(len(vids), np.int64), np.zeros(len(vids), np.bool_)
        at = np.minimum(np.searchsorted(self._live, vids), len(self._live) - 1)
        return self._places[at], self._live[at] == vids

    def _checked(self, vectors: npt.NDArray[np.floating[Any]], k: int) -> Scores:
        if k < 1:
            raise InputError(f"k is {k}; ask for at least one answer.")
        dims = self.spec.dims if self.spec else None
        if vectors.ndim != 2 or (dims is not None and vectors.shape[1] != dims):  # noqa: PLR2004 - queries by dimensions
            raise InputError(f"queries have the shape {vectors.shape}, expected (queries, {dims}). Use the tower of this generation.")
        queries: Scores = np.ascontiguousarray(vectors, dtype=np.float32)
        if not np.isfinite(queries).all():
            raise InputError("a query holds a number that is not finite. Check the tower's output.")
        return queries


class _Chosen:
    """A choice of positions as FAISS takes it: a bit for each. Everything when there is no mask."""

    def __init__(self, mask: Mask | None) -> None:
        self.selector = None
        if mask is not None:
            self._bits = np.packbits(mask, bitorder="little")  # the selector refers to it without keeping it alive
            self.selector = faiss.IDSelectorBitmap(len(self._bits), faiss.swig_ptr(self._bits))


def _with(kind: str, **values: Any) -> Any:
    """Return search parameters of FAISS, whose type hints do not know that their fields may be named."""
    return getattr(faiss, kind)(**values)


def search_of(manifest: Manifest) -> Search:
    """Return how the FAISS index of a generation is asked."""
    use = manifest.indexes.get(FAISS_INDEX)
    return Search(nprobe=use.search.get("nprobe", 1), refine=use.search.get("refine", 1)) if use else Search()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Loaded:
    """The merged index: what is searched, its lists, its finer codes, and how many live entries each list has."""

    whole: Any
    base: Any
    finer: Any | None
    sizes: Numbers
    # Own the memory that the others refer to.
    owners: tuple[Any, ...]


def _merged(parts: Sequence[Part]) -> _Loaded:
    """Merge lists under positions that count through all parts, without what is dead.

    Finer codes keep their dead entries: no list leads to them.
    """
    first = parts[0]
    if first.segment.spec.nlist is None:
        flat = trained(first.segment.spec, np.empty((0, first.segment.spec.dims), np.float32))
        for part in parts:
            append_codes(flat, codes_of(part.base) if part.live.all() else codes_of(part.base)[part.live])
        return _Loaded(whole=flat, base=flat, finer=None, sizes=sizes_of(flat), owners=())
    base, start = first.base, 0
    for part in parts:
        if not part.live.all():
            dead = _Chosen(~part.live)
            part.base.remove_ids(dead.selector)
        if part is not first:
            base.merge_from(part.base, start)
            if first.finer is not None:
                append_codes(first.finer, codes_of(part.finer))
        start += len(part.live)
    sizes, owners = sizes_of(base), (first.owner,)
    if first.segment.spec.fast:
        slow, base = base, laid_out(base)
        slow.reset()
    whole = base
    if first.finer is not None:
        base.ntotal = start  # compared with the number of finer codes
        whole = faiss.IndexRefine(base, first.finer)
    return _Loaded(whole=whole, base=base, finer=first.finer, sizes=sizes, owners=owners)
