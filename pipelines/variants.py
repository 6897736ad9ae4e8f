"""At most so many answers of one variant group: sizes and colours of one product shall not fill a page."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa

# A product has a few variants: most pages are full after the first fetch.
_FIRST, _GROWTH = 4, 4


def best_of_groups(fetch: Callable[[int], pa.Table], *, group: str, per_group: int, k: int, total: int) -> pa.Table:
    """Return the `k` best answers of which no more than `per_group` share a value of the column `group`; a null stands alone.

    `fetch` returns so many answers, best first, and fewer only where there are no more. It is asked for more and more of
    the `total` rows until enough groups are found, or everything is seen.
    """
    for size in _sizes(k, total):
        answers = fetch(size)
        kept = _first_of_each(answers.column(group), per_group)
        if len(kept) >= k or answers.num_rows < size or size >= total:
            return answers.take(pa.array(kept[:k]))
    raise AssertionError("the last size is all rows")


def _sizes(k: int, total: int) -> Iterator[int]:
    """Yield how many to fetch, each time several times as many, and at last all."""
    size = k * _FIRST
    while size < total:
        yield size
        size *= _GROWTH
    yield max(total, 1)


def _first_of_each(groups: pa.ChunkedArray, per_group: int) -> npt.NDArray[np.int64]:
    """Return the places of the first `per_group` rows of each group, ascending."""
    encoded = groups.combine_chunks().dictionary_encode()
    codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    # Every null is a group of its own.
    alone = np.flatnonzero(codes < 0)
    codes[alone] = len(encoded.dictionary) + np.arange(len(alone))
    order = np.argsort(codes, kind="stable")
    ranked = codes[order]
    begins = np.searchsorted(ranked, ranked, side="left")
    return np.sort(order[np.arange(len(order)) - begins < per_group])
