"""The next generation's index: extended by what changed, measured, and made anew as far as the measurement asks for it.

A night adds a delta segment and tombstones. Past a share of either, segments are merged; where lists no longer fit what
they hold, or a search on vectors held out of the training finds too little, the same run goes on: more probes, then new
lists. What is still too little after that is for the gates to refuse.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.contracts import FAISS_INDEX, IndexUse
from pipelines.errors import OldFormat, PlanError
from pipelines.index.build import Piece, Rows, build_base, build_delta, clash, gather
from pipelines.index.choosing import REFINES, goal_of, predicted_ms
from pipelines.index.compaction import Part, compact
from pipelines.index.lists import imbalance
from pipelines.index.search import SegmentSearcher, search_of
from pipelines.index.segments import Mask, Roster, Vids, read_roster, read_tombstones, segments_of, write_tombstones
from pipelines.index.spec import IndexSpec, Search, Segment
from pipelines.index.triggers import Change, Decision, Fit, RefreshOptions, candidates, decide, decide_fit
from pipelines.index.tuning import Ask, Exam, Tuned, recall_of, tune
from pipelines.manifest import Manifest, ManifestObject
from pipelines.storage import Store

# How many kinds of index a rebuild tries before it leaves the verdict to the gates.
_MOST_REBUILDS = 3
# A night that finds more than enough tries so many of the probes.
_EASED = 0.75
# Without this, 60 nights searched less and more again six times, and lost up to .0085 of recall.
_AMPLE = 0.005


class Truth(Protocol):
    """What a search is compared with."""

    @property
    def exam(self) -> Exam:
        """Queries with their exact answers over all live products, enough to tune on."""
        ...

    @property
    def probe(self) -> Exam:
        """Fewer of them, for a look every night."""
        ...


@dataclass(frozen=True, kw_only=True)
class NextIndex:
    """What the manifest of the new generation lists, and how it came about. `rows` counts the entries of each segment."""

    segments: tuple[ManifestObject, ...]
    tombstones: tuple[ManifestObject, ...]
    use: IndexUse
    rows: Mapping[str, int]
    num_hidden: int
    fit: Fit | None = None

    @property
    def action(self) -> str:
        """What was done."""
        return self.use.action

    @property
    def reason(self) -> str:
        """Why, in words, with the trigger."""
        return f"{self.use.reason} (trigger: {self.use.trigger})" if self.use.trigger else self.use.reason

    @property
    def report(self) -> dict[str, Any]:
        """What the report of a run says of it, as JSON types."""
        fit = asdict(self.fit) if self.fit else None
        return {**asdict(self.use), "segments": dict(self.rows), "hidden": self.num_hidden, "fit": fit}


@dataclass(frozen=True, kw_only=True)
class Night:
    """What a run brings to the index.

    `base` is None for a first run, and for another tower: its vectors mean other things. `added` gives the rows with new
    vectors (actions add and text), `touched` the numbers whose older entries no longer count (text and delete), `live`
    all live rows, which are read for a rebuild alone.
    """

    store: Store
    base: Manifest | None
    run_id: str
    generation: str
    added: Piece
    touched: Vids
    live: Rows
    truth: Truth
    options: RefreshOptions
    dims: int
    work: Path


def next_index(night: Night) -> NextIndex:
    """Build what is missing for the new generation, and say what it consists of. Writes under the run and the generation only."""
    before = _Before.read(night)
    decision = _decided(night, before)
    if decision.action == "rebuild":
        return _rebuilt(night, decision)
    assert before is not None
    if decision.action == "none":
        return _carried(night, before, decision)
    extended = _extended(night, before, decision)
    parts = [before.part(night.store, segment, extended.dead.get(segment.name)) for segment in extended.segments]
    searcher = SegmentSearcher(parts, before.search)
    fit = fit_of(searcher, extended.segments, extended.dead)
    if fit and (unfit := decide_fit(fit, night.options)):
        return _rebuilt(night, unfit)
    use = _probed(night, searcher, before, decision)
    if use is None:
        return _rebuilt(night, _missed(night, decision))
    return _result(night, extended, use, fit)


def fit_of(searcher: SegmentSearcher, segments: Sequence[Segment], dead: Mapping[str, Mask]) -> Fit | None:
    """Measure how well lists fit their live entries; None where there are no lists."""
    trained = segments[0].trained if segments else None
    if trained is None:
        return None
    live = [segment.rows - int(dead[segment.name].sum()) if segment.name in dead else segment.rows for segment in segments]
    spread = sum(rows * segment.spread for rows, segment in zip(live, segments, strict=True)) / max(sum(live), 1)
    return Fit(imbalance=imbalance(searcher.list_sizes), trained_imbalance=trained.imbalance, spread=spread, trained_spread=trained.spread)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Before:
    """The index of the base: its segments, what they hide, how they are asked; and what the night adds and hides."""

    segments: list[Segment]
    rosters: Mapping[str, Roster]
    dead: Mapping[str, Mask]
    search: Search
    use: IndexUse | None
    fresh: Roster
    num_before: int

    @classmethod
    def read(cls, night: Night) -> _Before | None:
        """Read the base's index and set it beside the night's rows; None where there is none to extend."""
        base = night.base
        try:
            segments = segments_of(night.store, base) if base else []
        except OldFormat:
            return None
        if base is None or not segments or not night.live.count:
            return None
        tombstones = read_tombstones(night.store, base)
        fresh = gather(night.added)
        rosters = {segment.name: read_roster(night.store, segment) for segment in segments}
        dead = {name: _hidden(roster, night.touched, fresh, tombstones.get(name)) for name, roster in rosters.items()}
        hidden = sum(int(mask.sum()) for mask in tombstones.values())
        return cls(
            segments=segments,
            rosters=rosters,
            dead={name: mask for name, mask in dead.items() if mask.any()},
            search=search_of(base),
            use=base.indexes.get(FAISS_INDEX),
            fresh=fresh,
            num_before=hidden,
        )

    def part(self, store: Store, segment: Segment, dead: Mask | None) -> Part:
        """Load a segment, with the id map that was read already."""
        return Part.load(store, segment, dead, roster=self.rosters.get(segment.name))

    @property
    def num_hidden(self) -> int:
        """How many entries of older segments no longer count."""
        return sum(int(mask.sum()) for mask in self.dead.values())


@dataclass(frozen=True, kw_only=True, eq=False)
class _Extended:
    """The index with the night's changes, before it is measured."""

    segments: list[Segment]
    dead: Mapping[str, Mask]


def _decided(night: Night, before: _Before | None) -> Decision:
    if before is None:
        old = night.base is not None and bool(night.base.segments) and bool(night.live.count)
        if old:
            return Decision(action="rebuild", trigger="format", reason="the base's index is of an older format")
        counts = Change(num_added=night.live.count, num_gone=0, num_hidden=0, num_live=night.live.count)
        found = decide([], counts, options=night.options, dims=night.dims)
        return replace(found, action="rebuild")
    counts = Change(
        num_added=len(before.fresh.vids),
        num_gone=before.num_hidden - before.num_before,
        num_hidden=before.num_before,
        num_live=night.live.count,
    )
    decision = decide(before.segments, counts, options=night.options, dims=night.dims)
    if decision.action != "rebuild":
        entries = sum(segment.rows for segment in before.segments) + len(before.fresh.vids)
        _check_live(entries - before.num_hidden, night.live.count)
    return decision


def _hidden(roster: Roster, touched: Vids, fresh: Roster, before: Mask | None) -> Mask:
    """Return which entries of an older segment no longer count, and refuse a new row whose number is live there."""
    dead: Mask = np.zeros(len(roster.vids), np.bool_) if before is None else before.copy()
    at, held = roster.position(touched)
    dead[at[held]] = True
    at, found = roster.position(fresh.vids)
    clashing = found & ~dead[at]
    clashing[found] |= np.asarray(pc.not_equal(roster.ids.take(pa.array(at[found])), fresh.ids.filter(pa.array(found))))
    for new in np.flatnonzero(clashing).tolist():
        raise clash(int(fresh.vids[new]), roster.ids[int(at[new])].as_py(), fresh.ids[new].as_py())
    return dead


def _extended(night: Night, before: _Before, decision: Decision) -> _Extended:
    """Add the night's rows as a delta, and merge segments as far as was decided."""
    owner, segments = before.segments[0], before.segments
    rows = Rows(pieces=[night.added], count=len(before.fresh.vids))
    if decision.action == "delta":
        if rows.count:
            segments = [*segments, build_delta(night.store, f"{night.run_id}-delta", rows, owner, work=night.work / "index")]
        return _Extended(segments=segments, dead=before.dead)
    folded = segments if decision.action == "compact" else segments[1:]
    with tempfile.TemporaryDirectory(dir=_made(night.work)) as folder:
        parts = [before.part(night.store, segment, before.dead.get(segment.name)) for segment in folded]
        if rows.count:  # merged at once, so it never reaches the store
            scratch = Store.open(Path(folder) / "store")
            delta = build_delta(night.store, "tonight", rows, owner, work=night.work / "index", into=scratch)
            parts.append(Part.load(scratch, delta, None))
        name, base = (f"{night.run_id}-merged", None) if decision.action == "compact" else (f"{night.run_id}-delta", owner)
        merged = compact(night.store, name, parts, owner=base, work=night.work / "index")
    kept = [] if decision.action == "compact" else [owner]
    dead = {segment.name: before.dead[segment.name] for segment in kept if segment.name in before.dead}
    return _Extended(segments=[*kept, merged], dead=dead)


def _rebuilt(night: Night, decision: Decision) -> NextIndex:
    """Build one base of all live rows and tune its search; try the next kind where the first cannot find enough."""
    if not night.live.count:
        use = IndexUse(action=decision.action, trigger=decision.trigger, reason=decision.reason)
        return NextIndex(segments=(), tombstones=(), use=use, rows={}, num_hidden=0)
    best: tuple[Segment, SegmentSearcher, Tuned | None] | None = None
    for number, spec in enumerate(candidates(night.live.count, night.dims, night.options)[:_MOST_REBUILDS]):
        name = f"{night.run_id}-base" + (f"-{number + 1}" if number else "")
        segment = build_base(night.store, name, night.live, spec, work=night.work / "index")
        _check_live(segment.rows, night.live.count)
        searcher = SegmentSearcher([Part.load(night.store, segment, None)], Search())
        tuned = _tuned(night, searcher, spec) if spec.nlist else None
        if best is None or tuned is None or (best[2] is not None and tuned.recall > best[2].recall):
            best = segment, searcher, tuned
        if tuned is None or tuned.reached:
            break
    assert best is not None
    segment, searcher, tuned = best
    use = _used(decision, tuned, options=night.options)
    return _result(night, _Extended(segments=[segment], dead={}), use, fit_of(searcher, [segment], {}))


def _tuned(night: Night, searcher: SegmentSearcher, spec: IndexSpec) -> Tuned:
    """Find the cheapest search that finds enough of what exact search finds."""
    return tune(_asking(searcher), night.truth.exam, spec=spec, n=searcher.num_live, target=night.options.recall_at_10)


def _probed(night: Night, searcher: SegmentSearcher, before: _Before, decision: Decision) -> IndexUse | None:
    """Measure the extended index, with more probes where it needs them; None where only new lists would help."""
    if searcher.spec is None or searcher.spec.nlist is None or before.use is None:
        return _used(decision, None, options=night.options)
    target, limit = before.use.needs(night.options.recall_at_10), _limit(before.use, searcher, night.options)
    now = recall_of(_asking(searcher), night.truth.probe, before.search)
    carried = replace(
        before.use, action=decision.action, trigger=decision.trigger, reason=decision.reason, recall=now, target=night.options.recall_at_10
    )
    if now >= target:
        return _eased(night, searcher, before.search, carried)
    tuned = tune(_asking(searcher), night.truth.exam, spec=searcher.spec, n=searcher.num_live, target=target, at_most=limit)
    if not tuned.reached:
        return None
    words = f"recall {now:.4f} at {before.search.nprobe} probes is below {target:g}; {tuned.search.nprobe} probes reach {tuned.recall:.4f}"
    search = {**before.use.search, "nprobe": tuned.search.nprobe, "refine": tuned.search.refine}
    return replace(carried, trigger="recall", reason=f"{words} ({decision.reason})", search=search, recall=tuned.recall)


def _eased(night: Night, searcher: SegmentSearcher, search: Search, use: IndexUse) -> IndexUse:
    """Search less from tonight on, where even that finds more than is asked for: tuning may have met hard questions."""
    spec, num_live = searcher.spec, searcher.num_live
    if spec is None or use.recall is None:
        return use
    goal = goal_of(spec, night.options.recall_at_10) + _AMPLE
    if use.recall < goal:
        return use
    refine = max((count for count in REFINES if count < search.refine), default=1)
    tries = {replace(search, nprobe=max(1, int(search.nprobe * _EASED))), replace(search, refine=refine)} - {search}
    for less in sorted(tries, key=lambda how: predicted_ms(spec, num_live, how)):
        if (recall := recall_of(_asking(searcher), night.truth.probe, less)) >= goal:
            words = f"{use.reason}; {less.nprobe} probes and {less.refine} candidates suffice after {search.nprobe} and {search.refine}"
            return replace(use, reason=words, recall=recall, search={**use.search, "nprobe": less.nprobe, "refine": less.refine})
    return use


def _limit(use: IndexUse, searcher: SegmentSearcher, options: RefreshOptions) -> Search:
    """Return the most that a search may cost before lists are trained again."""
    nlist = searcher.spec.nlist if searcher.spec and searcher.spec.nlist else 1
    trained = Search(nprobe=use.search.get("trained_nprobe", 1), refine=use.search.get("trained_refine", 1))
    most = max(int(trained.nprobe * options.probes_until), trained.nprobe + 1)
    return Search(nprobe=min(most, nlist), refine=max(trained.refine, use.search.get("refine", 1)))


def _missed(night: Night, decision: Decision) -> Decision:
    reason = f"no search within {night.options.probes_until:g} times the probes after training reaches a recall of {night.options.recall_at_10:g}"
    return Decision(action="rebuild", trigger="recall", reason=f"{reason} ({decision.reason})")


def _asking(searcher: SegmentSearcher) -> Ask:
    return lambda queries, k, how: searcher.nearest(queries, k, how=how)


def _used(decision: Decision, tuned: Tuned | None, *, options: RefreshOptions) -> IndexUse:
    found = IndexUse(action=decision.action, trigger=decision.trigger, reason=decision.reason)
    if tuned is None:
        return found
    search = {"nprobe": tuned.search.nprobe, "refine": tuned.search.refine}
    search |= {f"trained_{name}": value for name, value in search.items()}
    return replace(found, search=search, recall=tuned.recall, target=options.recall_at_10, trained_recall=tuned.recall)


def _carried(night: Night, before: _Before, decision: Decision) -> NextIndex:
    """Share every segment of the base: nothing changed that a search could see."""
    use = before.use or _used(decision, None, options=night.options)
    use = replace(use, action=decision.action, trigger=decision.trigger, reason=decision.reason)
    return _result(night, _Extended(segments=before.segments, dead=before.dead), use, None)


def _check_live(num_found: int, num_live: int) -> None:
    if num_found != num_live:
        raise PlanError(
            f"the index would have {num_found} live entries where {num_live} products are live: "
            "the run's parts do not fit the base generation. Plan again."
        )


def _result(night: Night, extended: _Extended, use: IndexUse, fit: Fit | None) -> NextIndex:
    with tempfile.TemporaryDirectory(dir=_made(night.work)) as folder:
        tombstones = tuple(
            write_tombstones(night.store, night.generation, name, mask, work=Path(folder)) for name, mask in sorted(extended.dead.items())
        )
    return NextIndex(
        segments=tuple(item for segment in extended.segments for item in segment.objects),
        tombstones=tombstones,
        use=use,
        rows={segment.name: segment.rows for segment in extended.segments},
        num_hidden=sum(item.rows or 0 for item in tombstones),
        fit=fit,
    )


def _made(work: Path) -> Path:
    work.mkdir(parents=True, exist_ok=True)
    return work
