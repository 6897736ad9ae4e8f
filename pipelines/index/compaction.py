"""Segments of one template become one: inverted lists are merged without their dead entries, and nothing is trained or encoded.

The result is byte for byte what filling the template with the live rows would give.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.errors import ManifestError
from pipelines.index.build import Files
from pipelines.index.lists import Codes, Numbers, append_codes, codes_of, fill, list_of, pieces, trained
from pipelines.index.loading import load_segment, load_template
from pipelines.index.segments import TRAINED, Mask, Roster, read_roster
from pipelines.index.spec import Segment
from pipelines.storage import Store


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """A loaded segment: its index taken apart, its products, which of them are live, and where each goes in the merged order."""

    segment: Segment
    base: Any
    finer: Any | None
    roster: Roster
    live: Mask
    # Keeps the index alive whose pieces `base` and `finer` are.
    owner: Any

    @classmethod
    def load(cls, store: Store, segment: Segment, dead: Mask | None, *, roster: Roster | None = None, cache: Path | None = None) -> Part:
        """Load a segment and its id map, verified; a map that was read already is taken as it is."""
        roster = roster or read_roster(store, segment)
        if dead is not None and len(dead) != segment.rows:
            raise ManifestError(f"segment {segment.name}: {len(dead)} tombstones for {segment.rows} entries. Roll back.")
        index = load_segment(store, segment, cache=cache)
        parts = pieces(index)
        live = np.ones(segment.rows, np.bool_) if dead is None else ~dead
        return cls(segment=segment, base=parts.base, finer=parts.finer, roster=roster, live=live, owner=index)


def compact(store: Store, name: str, parts: Sequence[Part], *, owner: Segment | None, work: Path) -> Segment:
    """Merge segments and store the result: a base without `owner`, a delta of that base with it."""
    first = parts[0].segment
    if any(part.segment.trained != first.trained or part.segment.spec != first.spec for part in parts):
        raise ManifestError(f"{name}: its segments have different templates, and their lists mean different things. Rebuild the index.")
    roster, places = _merged(parts)
    files = Files(store, name, work)
    template = trained(first.spec, np.empty((0, first.spec.dims), np.float32)) if first.trained is None else None
    if template is None:
        assert first.trained is not None
        source = next(part.segment for part in parts if part.segment.kind == "base") if owner is None else owner
        template = load_template(store, source.object(TRAINED), first.spec, trained=first.trained.sha256)
        if owner is None:
            files.keep_index(TRAINED, template, rows=0)
    found = pieces(template)
    if first.spec.nlist is None:
        append_codes(found.base, _gathered(parts, places, [codes_of(part.base) for part in parts]))
    else:
        fill(template, _lists(parts, places, first.spec.nlist), rows=len(roster.vids))
    if found.finer is not None:
        append_codes(found.finer, _gathered(parts, places, [codes_of(part.finer) for part in parts]))
        template.ntotal = len(roster.vids)
    spread = sum(float(part.live.sum()) * part.segment.spread for part in parts) / max(len(roster.vids), 1)
    return files.finish(template, roster, spec=first.spec, owner=owner, training=first.trained, spread=spread)


def _merged(parts: Sequence[Part]) -> tuple[Roster, list[Numbers]]:
    """Return the live products of all parts in the order of their numbers, and for each part its entries' new positions (-1: dead)."""
    vids = np.concatenate([part.roster.vids[part.live] for part in parts])
    order = np.argsort(vids, kind="stable")
    ids = pa.chunked_array([chunk for part in parts for chunk in part.roster.ids.filter(pa.array(part.live)).chunks], pa.string())
    new = np.empty(len(order), np.int64)
    new[order] = np.arange(len(order))
    places, start = [], 0
    for part in parts:
        count = int(part.live.sum())
        place = np.full(len(part.live), -1, np.int64)
        place[part.live] = new[start : start + count]
        places.append(place)
        start += count
    merged = Roster(vids=vids[order], ids=ids.take(pa.array(order)))
    if (np.diff(merged.vids) == 0).any():
        raise ManifestError("a product is live in two segments. Run `catalog-embed rollback`, and build the index again.")
    return merged, places


def _lists(parts: Sequence[Part], places: Sequence[Numbers], nlist: int) -> Iterator[tuple[int, Numbers, Codes]]:
    """Yield every list with what is live in it, in the order of the new positions."""
    for number in range(nlist):
        found = [
            (place[positions], codes)
            for part, place in zip(parts, places, strict=True)
            for positions, codes in [list_of(part.base, number)]
        ]
        positions = np.concatenate([places_ for places_, _ in found])
        codes = np.concatenate([codes_ for _, codes_ in found])
        live = np.flatnonzero(positions >= 0)
        order = live[np.argsort(positions[live], kind="stable")]
        if len(order):
            yield number, positions[order], codes[order]


def _gathered(parts: Sequence[Part], places: Sequence[Numbers], codes: Sequence[Codes]) -> Codes:
    """Return row-wise codes of all live entries in their new order."""
    size = sum(int(part.live.sum()) for part in parts)
    gathered: Codes = np.empty((size, codes[0].shape[1]), np.uint8)
    for part, place, block in zip(parts, places, codes, strict=True):
        gathered[place[part.live]] = block[part.live]
    return gathered
