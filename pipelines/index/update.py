"""The next generation's index: what the last one has stays as it is, and a night adds a delta and tombstones, or a new base."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.errors import PlanError
from pipelines.index.build import Batches, build_segment, clash, gather
from pipelines.index.segments import Roster, Tombstones, Vids, read_roster, read_tombstones, segments_of, write_tombstones
from pipelines.index.spec import Action, Change, Decision, RefreshOptions, Segment, choose, decide
from pipelines.manifest import Manifest, ManifestObject
from pipelines.storage import Store

_NONE: Vids = np.empty(0, np.int64)


@dataclass(frozen=True, kw_only=True)
class NextIndex:
    """What the manifest of the new generation lists, and how it came about. `rows` counts the entries of each segment."""

    segments: tuple[ManifestObject, ...]
    tombstones: tuple[ManifestObject, ...]
    action: Action
    reason: str
    rows: dict[str, int]
    num_hidden: int


@dataclass(frozen=True, kw_only=True)
class _Night:
    """What the parts of a rebuild or a delta need to know of the run."""

    store: Store
    run_id: str
    num_live: int
    dims: int
    options: RefreshOptions
    work: Path

    def decision(self, segments: list[Segment], *, num_added: int = 0, num_gone: int = 0, num_hidden: int = 0) -> Decision:
        counts = Change(num_added=num_added, num_gone=num_gone, num_hidden=num_hidden, num_live=self.num_live)
        return decide(segments, counts, options=self.options, dims=self.dims)


def next_index(
    store: Store,
    *,
    base: Manifest | None,
    run_id: str,
    generation: str,
    added: Batches,
    touched: Vids,
    live: Batches,
    num_live: int,
    options: RefreshOptions,
    dims: int,
    work: Path,
) -> NextIndex:
    """Build what is missing for the new generation, and say what it consists of. Writes under the run and the generation only.

    `base` is None for a first run, and for another tower: its vectors mean other things. `added` gives the rows with new
    vectors (actions add and text), `touched` the numbers whose older entries no longer count (text and delete), `live`
    all live rows, which are read for a rebuild alone.
    """
    night = _Night(store=store, run_id=run_id, num_live=num_live, dims=dims, options=options, work=work)
    segments = segments_of(store, base) if base else []
    if base is None or not segments or not num_live:
        return _rebuild(night, live, night.decision(segments))
    fresh, before = gather(added), read_tombstones(store, base)
    after = {segment.name: _hidden(store, segment, touched, fresh, before.get(segment.name, _NONE)) for segment in segments}
    num_before, num_after = (sum(map(len, hidden.values())) for hidden in (before, after))
    decision = night.decision(segments, num_added=len(fresh.vids), num_gone=num_after - num_before, num_hidden=num_before)
    if decision.action == "rebuild":
        return _rebuild(night, live, decision)
    _check_live(sum(segment.rows for segment in segments) + len(fresh.vids) - num_after, num_live)
    if len(fresh.vids):
        owner = segments[0]
        segments = [*segments, build_segment(store, f"{run_id}-delta", added, owner.spec, kind="delta", template=owner, work=work)]
    hidden = [Tombstones(segment=name, vids=vids) for name, vids in after.items() if len(vids)]
    return _result(segments, _written(store, generation, hidden, work=work), decision)


def _rebuild(night: _Night, live: Batches, decision: Decision) -> NextIndex:
    """Build one base of all live rows, or nothing when there are none."""
    if not night.num_live:
        return _result([], (), decision)
    spec = choose(night.num_live, night.dims, flat_below=night.options.flat_below, override=night.options.factory)
    segment = build_segment(night.store, f"{night.run_id}-base", live, spec, kind="base", template=None, work=night.work)
    _check_live(segment.rows, night.num_live)
    return _result([segment], (), decision)


def _hidden(store: Store, segment: Segment, touched: Vids, fresh: Roster, before: Vids) -> Vids:
    """Return which entries of an older segment no longer count, and refuse a new row whose number is live there."""
    roster = read_roster(store, segment)
    _, held = roster.position(touched)
    after: Vids = np.union1d(before, touched[held])
    at, found = roster.position(fresh.vids)
    clashing = found & ~np.isin(fresh.vids, after)
    clashing[found] |= np.asarray(pc.not_equal(roster.ids.take(pa.array(at[found])), fresh.ids.filter(pa.array(found))))
    for new in np.flatnonzero(clashing).tolist():
        raise clash(int(fresh.vids[new]), roster.ids[int(at[new])].as_py(), fresh.ids[new].as_py())
    return after


def _check_live(num_found: int, num_live: int) -> None:
    if num_found != num_live:
        raise PlanError(
            f"the index would have {num_found} live entries where {num_live} products are live: "
            "the run's parts do not fit the base generation. Plan again."
        )


def _written(store: Store, generation: str, hidden: list[Tombstones], *, work: Path) -> tuple[ManifestObject, ...]:
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        return tuple(write_tombstones(store, generation, item, work=Path(folder)) for item in hidden)


def _result(segments: list[Segment], tombstones: tuple[ManifestObject, ...], decision: Decision) -> NextIndex:
    return NextIndex(
        segments=tuple(item for segment in segments for item in segment.objects),
        tombstones=tombstones,
        action=decision.action,
        reason=decision.reason,
        rows={segment.name: segment.rows for segment in segments},
        num_hidden=sum(item.rows or 0 for item in tombstones),
    )
