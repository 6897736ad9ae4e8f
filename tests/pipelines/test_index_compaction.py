"""Merging lists: in memory or for good, the result is that of filling the template with the live rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from pipelines.errors import ManifestError
from pipelines.index.build import build_base, build_delta
from pipelines.index.compaction import Part, compact
from pipelines.index.search import Hits, SegmentSearcher
from pipelines.index.segments import FAISS, IDS, TRAINED, Mask, read_roster, segments_of
from pipelines.index.spec import IndexSpec, Search, Segment
from pipelines.storage import Store
from tests.generations import sample_manifest
from tests.pipelines.index_nights import DIMS, FACTORIES, Floats, named, numbers, of, unit

RNG = np.random.default_rng(31)
OLD, NEW, LATE = named("p", unit(RNG, 400)), named("q", unit(RNG, 60)), named("r", unit(RNG, 25))
AGAIN = {f"p{number:05d}": vector for number, vector in enumerate(unit(RNG, 20))}
QUERIES = unit(RNG, 8)


@dataclass(frozen=True, kw_only=True)
class Months:
    """A base and two deltas, each with dead entries, and what is live over all of them."""

    store: Store
    work: Path
    segments: tuple[Segment, ...]
    dead: dict[str, Mask]
    live: dict[str, Floats]

    def parts(self, chosen: Sequence[Segment] | None = None) -> list[Part]:
        return [Part.load(self.store, segment, self.dead.get(segment.name)) for segment in chosen or self.segments]

    def merged(self) -> SegmentSearcher:
        return SegmentSearcher(self.parts(), Search(nprobe=2, refine=3))

    def of(self, *segments: Segment) -> SegmentSearcher:
        return SegmentSearcher([Part.load(self.store, segment, None) for segment in segments], Search(nprobe=2, refine=3))


def months(root: Path, factory: str) -> Months:
    """The first delta changes 20 products of the base and adds 60; a hundred go, from everywhere, and 25 come."""
    store, work = Store.open(root / "store"), root / "work"
    base = build_base(store, "base", of(OLD), IndexSpec(factory=factory, dims=DIMS), work=work)
    first = build_delta(store, "first", of(AGAIN | NEW), base, work=work)
    second = build_delta(store, "second", of(LATE), base, work=work)
    gone = {*[*OLD][20:100], *[*NEW][:15], *[*LATE][:5]}
    dead = {}
    for segment, hidden in ((base, gone | AGAIN.keys()), (first, gone), (second, gone)):
        dead[segment.name] = np.array([name in hidden for name in read_roster(store, segment).ids.to_pylist()])
    live = {name: vector for name, vector in (OLD | AGAIN | NEW | LATE).items() if name not in gone}
    return Months(store=store, work=work, segments=(base, first, second), dead=dead, live=live)


@pytest.fixture(scope="module", params=FACTORIES)
def every(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Months:
    return months(tmp_path_factory.mktemp("months"), request.param)


def files(segment: Segment, *roles: str) -> list[str]:
    return [segment.object(role).sha256 for role in roles]


def test_compaction_equals_filling_the_template_with_the_live_rows(every: Months) -> None:
    found, base = every, every.segments[0]
    whole = compact(found.store, "whole", found.parts(), owner=None, work=found.work)
    fresh = build_delta(found.store, "fresh", of(found.live), base, work=found.work)
    assert files(whole, FAISS, IDS) == files(fresh, FAISS, IDS)
    assert (whole.kind, whole.rows, whole.trained, whole.template) == ("base", len(found.live), base.trained, None)
    if base.trained is not None:
        assert files(whole, TRAINED) == files(base, TRAINED)
    # The order of the parts does not matter.
    other = compact(found.store, "other", found.parts(found.segments[::-1]), owner=None, work=found.work)
    assert files(other, FAISS, IDS) == files(whole, FAISS, IDS)
    assert segments_of(found.store, sample_manifest(segments=whole.objects)) == [whole]


def test_folding_equals_one_delta_of_the_live_rows(every: Months) -> None:
    found = every
    base, *deltas = found.segments
    folded = compact(found.store, "folded", found.parts(deltas), owner=base, work=found.work)
    live = {name: vector for name, vector in found.live.items() if name in AGAIN.keys() | NEW.keys() | LATE.keys()}
    fresh = build_delta(found.store, "fresh-delta", of(live), base, work=found.work)
    assert files(folded, FAISS, IDS) == files(fresh, FAISS, IDS)
    assert (folded.kind, folded.template, folded.trained) == ("delta", base.name, base.trained)
    assert TRAINED not in [item.role for item in folded.objects]
    assert segments_of(found.store, sample_manifest(segments=(*base.objects, *folded.objects))) == [base, folded]
    # Compacted at once or in two steps: the same.
    base_again = Part.load(found.store, base, found.dead["base"])
    twice = compact(found.store, "twice", [base_again, Part.load(found.store, folded, None)], owner=None, work=found.work)
    once = compact(found.store, "once", found.parts(), owner=None, work=found.work)
    assert files(twice, FAISS, IDS, *([TRAINED] if base.trained else [])) == files(once, FAISS, IDS, *([TRAINED] if base.trained else []))


def test_merged_search_equals_search_after_compaction(every: Months, monkeypatch: pytest.MonkeyPatch) -> None:
    found, merged = every, every.merged()
    compacted = found.of(compact(found.store, "whole", found.parts(), owner=None, work=found.work))
    assert merged.all_live_vids().tolist() == compacted.all_live_vids().tolist() == sorted(numbers([*found.live]).tolist())
    assert merged.list_sizes.tolist() == compacted.list_sizes.tolist()
    # Product codes are few, and which of two equal ones is scored again depends on the order in a list: score all again.
    rng, refine = np.random.default_rng(0), 400 if "PQ" in found.segments[0].spec.factory else 2
    for exact_rows in (50_000, 0):
        monkeypatch.setattr("pipelines.index.search.EXACT_ROWS", exact_rows)
        for share in (None, 1, 100, len(found.live)):
            allowed = None if share is None else numbers(rng.permutation(np.array([*found.live]))[:share].tolist())
            for k, how in ((1, Search(refine=refine)), (10, Search(nprobe=2, refine=refine)), (400, Search(nprobe=4))):
                one, other = (each.search(QUERIES, k, allowed=allowed, how=how) for each in (merged, compacted))
                assert {len(ids) for ids in one.ids} == {min(k, len(found.live) if share is None else share)}
                same(one, other)
    same(*(each.search(QUERIES, 20, exact=True) for each in (merged, compacted)))


def same(one: Hits, other: Hits) -> None:
    """The same scores, and the same products but for those that tie with the last one."""
    np.testing.assert_array_equal(one.scores, other.scores)
    certain = one.scores > one.scores.min(axis=1, keepdims=True)
    assert (one.vids == other.vids)[certain].all()


def test_foreign_templates_are_never_merged(tmp_path: Path) -> None:
    found = months(tmp_path, "IVF4,SQ8")
    spec = IndexSpec(factory="IVF4,SQ8", dims=DIMS)
    other = build_base(found.store, "other", of(NEW), spec, work=found.work)
    foreign = build_delta(found.store, "foreign", of(named("s", unit(RNG, 4))), other, work=found.work)
    kind = build_base(found.store, "kind", of(LATE), IndexSpec(factory="Flat", dims=DIMS), work=found.work)
    before = {info.key for info in found.store.list()}
    for stranger in (foreign, kind):
        parts = [*found.parts(), Part.load(found.store, stranger, None)]
        with pytest.raises(ManifestError, match="different templates, and their lists mean different things"):
            compact(found.store, "mixture", parts, owner=None, work=found.work)
    assert {info.key for info in found.store.list()} == before
    with pytest.raises(ManifestError, match="another template"):
        SegmentSearcher.open(found.store, sample_manifest(segments=(*found.segments[0].objects, *foreign.objects)))


def test_a_product_that_is_live_twice_is_never_merged(tmp_path: Path) -> None:
    found = months(tmp_path, "IVF4,SQ8")
    lax = replace(found, dead={name: mask for name, mask in found.dead.items() if name != "base"})
    with pytest.raises(ManifestError, match="live in two segments"):
        compact(found.store, "whole", lax.parts(), owner=None, work=found.work)
    with pytest.raises(ManifestError, match="live in two segments"):
        lax.merged()


def test_tombstones_of_another_segment_are_refused(tmp_path: Path) -> None:
    found = months(tmp_path, "Flat")
    with pytest.raises(ManifestError, match="80 tombstones for 400 entries"):
        Part.load(found.store, found.segments[0], found.dead["first"])


@pytest.mark.parametrize("factory", ["Flat", "IVF4,SQ8", "IVF4,RaBitQ2fs,Refine(SQfp16)"])
def test_deltas_without_a_live_entry_fold_to_nothing(tmp_path: Path, factory: str) -> None:
    found = months(tmp_path, factory)
    base, *deltas = found.segments
    gone = replace(found, dead=found.dead | {segment.name: np.ones(segment.rows, np.bool_) for segment in deltas})
    empty = compact(found.store, "empty", gone.parts(deltas), owner=base, work=found.work)
    assert empty.rows == 0
    searcher = SegmentSearcher([*gone.parts([base]), Part.load(found.store, empty, None)], Search(nprobe=4))
    assert searcher.num_live == 300
    assert {len(ids) for ids in searcher.search(QUERIES, 500).ids} == {300}
    whole = compact(found.store, "whole", [*gone.parts([base]), Part.load(found.store, empty, None)], owner=None, work=found.work)
    alone = compact(found.store, "alone", gone.parts([base]), owner=None, work=found.work)
    assert files(whole, FAISS, IDS) == files(alone, FAISS, IDS)


def test_spread_after_compaction_is_that_of_what_was_merged(tmp_path: Path) -> None:
    found = months(tmp_path, "IVF4,Flat")
    whole = compact(found.store, "whole", found.parts(), owner=None, work=found.work)
    live = [int((~found.dead[segment.name]).sum()) for segment in found.segments]
    want = sum(rows * segment.spread for rows, segment in zip(live, found.segments, strict=True)) / sum(live)
    assert whole.spread == pytest.approx(want, abs=1e-6)
    fresh = build_delta(found.store, "fresh", of(found.live), found.segments[0], work=found.work)
    # Segments report the mean over all of their entries, so dead ones leave a small difference.
    assert whole.spread == pytest.approx(fresh.spread, abs=0.02)
