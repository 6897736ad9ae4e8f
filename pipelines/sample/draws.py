"""Counter-based randomness: every draw is a pure function of (seed, stream, counter), so any row can be made alone.

The mixing function is SplitMix64's finaliser (Steele, Lea, Flood, 2014). Integers only: no result depends on a CPU's
floating-point instructions.
"""

from __future__ import annotations

import zlib

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.uint64]
Codes = npt.NDArray[np.int64]

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 0xFFFFFFFFFFFFFFFF


def _mix_one(value: int) -> int:
    """Mix one Python integer as `_mix` mixes an array."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def bits(seed: int, stream: str, counters: Ids, *, night: int = 0) -> Ids:
    """Return 64 random bits per counter; streams and nights are independent of each other."""
    key = _mix_one((_mix_one((seed * _GOLDEN) & _MASK) + zlib.crc32(stream.encode()) + (night << 32)) & _MASK)
    mixed = counters * np.uint64(_GOLDEN) + np.uint64(key)
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def below(drawn: Ids, shift: int, limit: int | Codes) -> Codes:
    """Scale the 16 bits above `shift` to 0 .. limit - 1. Four independent numbers fit in one draw."""
    field = ((drawn >> np.uint64(shift)) & np.uint64(0xFFFF)).astype(np.int64)
    scaled: Codes = (field * limit) >> 16
    return scaled


def happens(drawn: Ids, rate: float) -> npt.NDArray[np.bool_]:
    """Say per draw whether an event of this probability happens; reads the upper 32 bits."""
    return (drawn >> np.uint64(32)) < np.uint64(round(rate * 2**32))
