"""What happens to a row, night after night: born, edited, repriced, sold out, deleted. A pure function of (seed, row, night).

Text is edited for a whole family at once, as in a shop where variants share one page. Nothing happens to a row in the
night of its birth or after its death; in the night of its death nothing else happens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipelines.sample.draws import Codes, Ids, bits, happens
from pipelines.sample.spec import SampleSpec, day
from pipelines.sample.traits import heads

Flags = npt.NDArray[np.bool_]

DAY_US = 86_400_000_000
# Rows of night 0 were last modified at some time of the year before.
FIRST_DAYS = 365
# Of text edits, how many are about the title; the others change the description.
TITLE_SHARE = 0.3

# What happened to a row in the last night, as small numbers for arrays.
NOTHING, ADDED, TEXT_EDITED, ATTR_EDITED, DELETED = range(5)


@dataclass(frozen=True, kw_only=True)
class Life:
    """The state of rows after a night: how often each part was edited, and whether the row is still there.

    `listed` rows are in the catalog; `active` ones are not tombstoned; `event` is what happened in the last night.
    """

    listed: Flags
    active: Flags
    titles: Codes
    descriptions: Codes
    prices: Codes
    stocks: Codes
    event: npt.NDArray[np.int8]
    modified_us: Codes


def births(spec: SampleSpec, ids: Ids) -> Codes:
    """Return the night in which each row appears."""
    row = ids.astype(np.int64)
    return np.maximum(0, (row - spec.products) // max(spec.adds, 1) + 1)


def live(spec: SampleSpec, ids: Ids, *, night: int) -> Life:
    """Follow rows from night 0 to the end of `night`."""
    head, _ = heads(spec.seed, ids)
    born, head_born = births(spec, ids), births(spec, head)
    zeros = np.zeros(len(ids), dtype=np.int64)
    titles, descriptions, prices, stocks = zeros.copy(), zeros.copy(), zeros.copy(), zeros.copy()
    alive, listed = born <= night, born <= night
    event = np.where((born == night) & (night > 0), ADDED, NOTHING).astype(np.int8)
    modified = _moment(spec.seed, ids, born)
    for current in range(1, night + 1):
        drawn = bits(spec.seed, "row event", ids, night=current)
        story = bits(spec.seed, "text event", head, night=current)
        there = alive & (born < current)
        tombstoned, absent, repriced, restocked = _split(spec, drawn)
        dies = there & (tombstoned | absent)
        alive &= ~dies
        listed &= ~(dies & absent)
        edits = alive & (head_born < current) & happens(story, spec.text_rate)
        about_title = (story & np.uint64(0xFFFF)) < np.uint64(round(TITLE_SHARE * 0x10000))
        titles += edits & about_title
        descriptions += edits & ~about_title
        prices += there & alive & repriced
        stocks += there & alive & restocked
        edited = there & edits
        attr = there & alive & (repriced | restocked)
        modified = np.where(dies | edited | attr, _moment(spec.seed, ids, np.full_like(born, current)), modified)
        if current == night:
            event = np.select([dies, edited, attr], [DELETED, TEXT_EDITED, ATTR_EDITED], event).astype(np.int8)
    return Life(
        listed=listed,
        active=alive,
        titles=titles,
        descriptions=descriptions,
        prices=prices,
        stocks=stocks,
        event=event,
        modified_us=modified,
    )


def _split(spec: SampleSpec, drawn: Ids) -> tuple[Flags, Flags, Flags, Flags]:
    """Cut the range of one draw into tombstone, absence, new price, new stock: at most one happens to a row in a night."""
    edges = np.cumsum([spec.tombstone_rate, spec.absence_rate, spec.price_rate, spec.stock_rate])
    before = [happens(drawn, float(edge)) for edge in edges]
    return before[0], before[1] & ~before[0], before[2] & ~before[1], before[3] & ~before[2]


def _moment(seed: int, ids: Ids, night: Codes) -> Codes:
    """Return a random time on the day of each row's night, in microseconds; for night 0, in the year before."""
    start = int(day(0).timestamp()) * 1_000_000
    drawn = (bits(seed, "moment", ids * np.uint64(1 << 16) + night.astype(np.uint64)) >> np.uint64(11)).astype(np.int64)
    return np.where(night > 0, start + night * DAY_US + drawn % DAY_US, start - 1 - drawn % (FIRST_DAYS * DAY_US))
