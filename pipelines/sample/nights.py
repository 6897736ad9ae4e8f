"""What changed from one night to the next: the exact truth, which a plan made from two catalogs can be compared with."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from pipelines.errors import InputError
from pipelines.sample.catalog import SKU, shuffled, skus
from pipelines.sample.life import ADDED, ATTR_EDITED, DELETED, TEXT_EDITED, live
from pipelines.sample.spec import SampleSpec
from pipelines.schema import ACTION, ADD, ATTR, DELETE, TEXT

CHANGES = pa.schema([pa.field(SKU, pa.string(), nullable=False), pa.field(ACTION, pa.string(), nullable=False)])

_ACTIONS = {ADDED: ADD, TEXT_EDITED: TEXT, ATTR_EDITED: ATTR, DELETED: DELETE}
_STEP = 1 << 20


def changes(spec: SampleSpec, *, night: int) -> pa.Table:
    """Return every SKU that night `night` changed and what became of it, in the order of row numbers.

    `text` includes rows whose price or stock changed as well; `delete` is by tombstone or by absence.
    """
    if night < 1:
        raise InputError(f"sample: night {night} has no night before it. Ask for the changes of night 1 or later.")
    names = pa.array([_ACTIONS.get(event) for event in range(max(_ACTIONS) + 1)])
    parts = []
    for start in range(0, spec.rows(night), _STEP):
        ids = np.arange(start, min(start + _STEP, spec.rows(night)), dtype=np.uint64)
        event = live(spec, ids, night=night).event
        touched = event > 0
        parts.append(pa.table([skus(ids[touched]), names.take(pa.array(event[touched]))], schema=CHANGES))
    return pa.concat_tables(parts).combine_chunks()


def next_night(seed: int, n: int) -> tuple[pa.Table, pa.Table]:
    """Return the catalog of 5,000 products at night `n`, in that night's order, and what changed since night `n - 1`."""
    spec = SampleSpec(seed=seed)
    return pa.concat_tables(shuffled(spec, night=n)), changes(spec, night=n)
