"""Months of an index, in any order: whatever came before, it holds the live products and nothing else, and the past stays."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pipelines.disk import NO_FAULTS, Faults
from pipelines.index.search import SegmentSearcher
from pipelines.index.spec import Search
from pipelines.index.triggers import RefreshOptions
from pipelines.index.update import NextIndex
from pipelines.manifest import Manifest
from pipelines.publish import current, publish, read_manifest, rollback, write_generation
from pipelines.retention import RetentionOptions, apply_gc, plan_gc
from pipelines.storage import Store
from tests.faults import Strike, Vanished
from tests.generations import START
from tests.pipelines.index_nights import PATIENT, Floats, Shop, numbers, unit, used
from tests.pipelines.test_retention import MEMORY, NOW, nothing_to_clean

POOL = unit(np.random.default_rng(77), 3000)
FIRST = 330  # eight lists take 312 products: a catalog that shrinks below gets exact search, and lists when it grows again
SIZES = st.integers(0, 12)
SEEDS = st.integers(0, 2**16)


@dataclass(frozen=True, kw_only=True)
class Past:
    """A generation as it was written, and what was live in it."""

    manifest: Manifest
    live: dict[str, Floats]


class Months(RuleBasedStateMachine):
    """A shop whose index goes through nights, collections, crashes and rollbacks; `known` are the generations it must keep."""

    factory: ClassVar[str]
    atol: ClassVar[float] = 2e-6

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(dir=MEMORY))
        self.store = Store.open(self.root / "store")
        self.options = replace(PATIENT, factory=self.factory, recall_at_10=0.7, max_segments=5, delta_until=0.6, tombstones_until=0.4)
        self.known: dict[str, Past] = {}
        self.published: list[str] = []
        self.number = self.drawn = 0
        self.latest: Past | None = None

    def teardown(self) -> None:
        shutil.rmtree(self.root)

    @property
    def head(self) -> Past | None:
        """What the next night builds on."""
        return self.known[self.published[-1]] if self.published else None

    @property
    def live(self) -> dict[str, Floats]:
        return self.head.live if self.head else {}

    def fresh(self, names: Iterable[str]) -> dict[str, Floats]:
        """Give products vectors that none had; every seventh is the twin of the one before."""
        found = {}
        for name in names:
            self.drawn += 1
            found[name] = POOL[(self.drawn - (self.drawn % 7 == 0)) % len(POOL)]
        return found

    def run(self, root: Path, work: tuple[Any, ...], *, faults: Faults = NO_FAULTS, **other: Any) -> tuple[Shop, NextIndex]:
        """Do the work of one night in a store, as often as it takes."""
        options, *changes = work
        base = self.head.manifest if self.head else None
        shop = Shop(root, options, live=dict(self.live), manifest=base, night=self.number - 1, faults=faults)
        return shop, shop.next(*changes, **other)

    def night(
        self,
        *,
        add: int = 0,
        change: int = 0,
        delete: int = 0,
        seed: int = 0,
        options: RefreshOptions | None = None,
        live: bool = True,
        strike: int | None = None,
        **other: Any,
    ) -> NextIndex:
        """Draw a night's changes, build its generation, and publish it when it is to go live."""
        rng, old = np.random.default_rng(seed), sorted(self.live)
        chosen = rng.permutation(np.array(old, dtype=object)).tolist()
        gone, changed = chosen[:delete], chosen[delete : delete + change]
        names = [f"p{number:05d}" for number in rng.permutation(len(self.live) + 400).tolist() if f"p{number:05d}" not in self.live]
        self.number += 1
        work = (options or self.options, self.fresh(names[:add]), self.fresh(changed), gone)
        if strike is not None:
            calm = self.root / "calm"
            shutil.copytree(self.root / "store", calm / "store")
            _, want = self.run(calm, work, **other)
            shutil.rmtree(calm)
            with contextlib.suppress(Vanished):  # the machine died; the next attempt has its name
                self.run(self.root, work, faults=Strike(strike, "vanish"), **other)
        shop, found = self.run(self.root, work, **other)
        event(f"{found.action}: {found.use.trigger}")
        if strike is not None:
            assert found == want
        written = write_generation(self.store, shop.opened(), {})
        assert written == read_manifest(self.store, written.generation)
        assert used(shop) == found.use
        self.latest = self.known[written.generation] = Past(manifest=written, live=shop.live)
        if live:
            self.publish()
        return found

    @initialize()
    def begin(self) -> None:
        found = self.night(add=FIRST)
        assert (found.use.action, found.use.trigger) == ("rebuild", "first")

    @rule(add=SIZES, change=SIZES, delete=SIZES, seed=SEEDS, live=st.booleans())
    def extend(self, add: int, change: int, delete: int, seed: int, live: bool) -> None:
        self.night(add=add, change=change, delete=delete, seed=seed, live=live)

    @rule(live=st.booleans())
    def change_nothing(self, live: bool) -> None:
        before = self.head
        assert before is not None
        found = self.night(live=live)
        assert found.segments == before.manifest.segments
        assert found.action == "none" or not before.live

    @rule(delete=st.integers(20, 340), seed=SEEDS)
    def shrink(self, delete: int, seed: int) -> None:
        self.night(delete=min(delete, len(self.live)), seed=seed)

    @rule(add=st.integers(60, 200), seed=SEEDS)
    def grow(self, add: int, seed: int) -> None:
        self.night(add=add, seed=seed)

    @rule(add=SIZES, delete=SIZES, seed=SEEDS)
    def compact(self, add: int, delete: int, seed: int) -> None:
        found = self.night(add=add + 1, delete=delete, seed=seed, options=replace(self.options, delta_until=0.0))
        assert found.action in ("compact", "rebuild")
        assert not found.tombstones

    @rule(add=SIZES, change=SIZES, delete=SIZES, seed=SEEDS)
    def fold(self, add: int, change: int, delete: int, seed: int) -> None:
        options = replace(self.options, max_segments=1, delta_until=1.0, tombstones_until=1.0)
        found = self.night(add=add + 1, change=change, delete=delete, seed=seed, options=options)
        assert found.action in ("fold", "compact", "rebuild")  # dead entries count: deltas can hold more than is live

    @rule(add=SIZES, delete=SIZES, seed=SEEDS)
    def rebuild(self, add: int, delete: int, seed: int) -> None:
        found = self.night(add=add, delete=delete, seed=seed, base=None)
        assert found.use.trigger in ("first", "empty")
        assert len(found.rows) <= 1

    @rule(add=SIZES, delete=SIZES, seed=SEEDS)
    def want_more(self, add: int, delete: int, seed: int) -> None:
        """Limits so strict that lists are asked and trained anew at the least change."""
        options = replace(self.options, recall_at_10=0.99, imbalance_until=1.0, drift_until=1.0, probes_until=1.0)
        self.night(add=add, delete=delete, seed=seed, options=options)

    @rule(add=SIZES, delete=SIZES, seed=SEEDS, strike=st.integers(0, 90), merge=st.booleans())
    def crash(self, add: int, delete: int, seed: int, strike: int, merge: bool) -> None:
        options = replace(self.options, delta_until=0.0) if merge else self.options
        self.night(add=add, change=delete // 2, delete=delete, seed=seed, strike=strike, options=options)

    @rule()
    def publish(self) -> None:
        """Make the newest generation live, unless it was already."""
        if self.latest is None or self.latest.manifest.generation in self.published:
            return
        manifest, head = self.latest.manifest, current(self.store, "prod")
        sequence = head.seq if head else 0
        publish(
            self.store,
            alias="prod",
            generation=manifest.generation,
            expected_seq=sequence,
            run_id=manifest.run_id,
            clock=lambda: START,
            verify="full",
        )
        self.published.append(manifest.generation)

    @rule(back=st.integers(1, 6))
    def roll_back(self, back: int) -> None:
        older = [generation for generation in dict.fromkeys(self.published[::-1]) if generation in self.known]
        target = older[min(back, len(older) - 1)]
        if target == self.published[-1]:
            return
        run_id = f"person-{len(self.published)}"
        rollback(self.store, alias="prod", to=target, run_id=run_id, reason="test", clock=lambda: START, verify="full")
        self.published.append(target)
        self.check(self.known[target])

    @rule(keep=st.integers(1, 3))
    def collect(self, keep: int) -> None:
        plan = plan_gc(self.store, now=NOW, options=RetentionOptions(keep=keep))
        apply_gc(self.store, plan, sweep_table=nothing_to_clean, clock=lambda: NOW)
        assert {*plan.keep} <= self.known.keys()
        assert self.published[-1] in plan.keep
        self.known = {generation: past for generation, past in self.known.items() if generation in plan.keep}
        if self.latest and self.latest.manifest.generation not in self.known:
            self.latest = None
        listed = {item.key for past in self.known.values() for item in past.manifest.objects}
        assert {info.key for info in self.store.list("segments")} == {key for key in listed if key.startswith("segments/")}

    @invariant()
    def the_past_is_unchanged(self) -> None:
        for past in self.known.values():
            assert read_manifest(self.store, past.manifest.generation) == past.manifest
        for item in {item.key: item for past in self.known.values() for item in past.manifest.objects}.values():
            self.store.verify(item)

    @invariant()
    def what_is_live_is_found(self) -> None:
        for past in {id(past): past for past in (self.head, self.latest) if past is not None}.values():
            self.check(past)

    def check(self, past: Past) -> None:
        """Compare with all scores: every product by its own vector, through the lists, and among a third of them; ties allowed."""
        searcher = SegmentSearcher.open(self.store, past.manifest)
        names = sorted(past.live)
        vids = numbers(names)
        assert searcher.all_live_vids().tolist() == sorted(vids.tolist())
        if not names:
            assert searcher.search(POOL[:2], 3).ids == [[], []]
            return
        assert searcher.ids_of(vids) == names
        vectors = np.stack([past.live[name] for name in names])
        scores, every = vectors @ vectors.T, Search(nprobe=8, refine=len(names) // 3 + 1)
        self.compare(searcher.nearest(vectors, 3, exact=True), vids, scores, 3)
        self.compare(searcher.nearest(vectors[::6], 3, how=every), vids, scores[::6], 3)
        self.compare(searcher.nearest(vectors[::4], 3, allowed=vids[::3]), vids[::3], scores[::4, ::3], 3)
        # Few probes, and as many answers as there are products.
        found, _ = searcher.nearest(vectors[:4], len(names) + 2, how=Search())
        assert [sorted(row.tolist()) for row in found] == [sorted([*vids.tolist(), -1, -1])] * len(found)

    def compare(self, found: tuple[Any, Any], vids: Any, truth: Floats, k: int) -> None:
        """The best scores there are, each with a product that has it, none twice."""
        answers, reported = found
        want = min(k, truth.shape[1])
        assert ((answers >= 0).sum(axis=1) == want).all()
        best = -np.sort(-truth, axis=1)[:, :want]
        np.testing.assert_allclose(reported[:, :want], best, atol=self.atol)
        order = np.argsort(vids)
        at = order[np.searchsorted(vids[order], answers[:, :want])]
        assert (vids[at] == answers[:, :want]).all()
        np.testing.assert_allclose(np.take_along_axis(truth, at, axis=1), best, atol=2 * self.atol)
        assert all(len(set(row.tolist())) == want for row in answers[:, :want])


class FlatMonths(Months):
    factory = "Flat"


class ListMonths(Months):
    factory = "IVF8,Flat"


class CodeMonths(Months):
    factory = "IVF8,RaBitQfs,Refine(SQfp16)"
    atol = 6e-4  # half precision: 2**-11 of each of 16 products of numbers below one


TestFlatMonths, TestListMonths, TestCodeMonths = FlatMonths.TestCase, ListMonths.TestCase, CodeMonths.TestCase
TestFlatMonths.settings = TestListMonths.settings = TestCodeMonths.settings = settings(
    max_examples=4, stateful_step_count=16, deadline=None
)
