"""One number for the content of a table, whatever the order of its rows and the names of its files."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.schema import ATTR_HASH, HASH, ID_HASH, TEXT_HASH

DIGESTED = (ID_HASH, TEXT_HASH, ATTR_HASH)

# Part of the format: another constant is another digest. Odd multipliers of splitmix64 and xxHash64, one start a lane.
_STARTS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F)
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFT = np.uint64(29)
_LOW = np.uint64(0xFFFFFFFF)

Words = npt.NDArray[np.uint64]


def rows_digest(tables: Iterable[pa.Table]) -> str:
    """Return 32 hex digits: the sum, modulo 2**128, of a 128-bit mix of each row's three hashes.

    The hashes are BLAKE2b already, so the mix need not be cryptographic: it binds the three together and makes the
    sum notice what a plain sum would not, such as two rows that swap their texts.
    """
    total = 0
    for table in tables:
        for batch in table.to_batches():
            words = np.concatenate([_words(batch.column(name)) for name in DIGESTED], axis=1)
            low, high = (_mixed(words, start=start, multiplier=by) for start, by in zip(_STARTS, _MULTIPLIERS, strict=True))
            total += _sum(low) + (_sum(high) << 64)
    return f"{total % 2**128:032x}"


def _words(column: pa.Array) -> Words:
    """View a hash column as two little-endian words a row."""
    fixed = column.cast(HASH)
    return np.frombuffer(fixed.buffers()[1], dtype="<u8")[fixed.offset * 2 :][: len(fixed) * 2].reshape(len(fixed), 2)


def _mixed(words: Words, *, start: int, multiplier: int) -> Words:
    state = np.full(len(words), start, dtype=np.uint64)
    by = np.uint64(multiplier)
    for column in range(words.shape[1]):
        state = (state ^ words[:, column]) * by
        state ^= state >> _SHIFT
    state = state * by
    return state ^ (state >> np.uint64(32))


def _sum(values: Words) -> int:
    """Add without losing the carry: each half fits a 64-bit sum for 2**32 rows."""
    return int((values & _LOW).sum(dtype=np.uint64)) + (int((values >> np.uint64(32)).sum(dtype=np.uint64)) << 32)
