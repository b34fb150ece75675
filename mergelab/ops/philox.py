"""Random numbers that belong to an entry of a tensor, not to a moment of the run.

A counter-based generator (Philox4x64-10, Salmon et al. 2011) is keyed by what the numbers are for, and its counter is
the entry's position: any part of a tensor can be drawn alone, in any order, in any process, with the same numbers.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

WORDS = 8  # 32-bit words that one step of the counter gives


@lru_cache(maxsize=4096)
def stream_key(seed: int, *names: str) -> int:
    """Return a 128-bit key for what the numbers are for, e.g. ``stream_key(seed, expert, tensor)``."""
    digest = hashlib.blake2b(digest_size=16, person=b"mergelab")
    for part in (str(seed), *names):
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return int.from_bytes(digest.digest(), "little")


def words(key: int, start: int, count: int) -> NDArray[np.uint32]:
    """Return the numbers from ``start`` on of the stream ``key``: ``count`` integers, uniform over 32 bits."""
    first, lead = divmod(start, WORDS)
    steps = -(-(lead + count) // WORDS)
    raw = np.random.Philox(key=key, counter=first).random_raw(steps * WORDS // 2)
    halves: NDArray[np.uint32] = raw.astype("<u8", copy=False).view("<u4")
    return halves[lead : lead + count]


def bernoulli(key: int, start: int, count: int, probability: float) -> NDArray[np.bool_]:
    """Draw ``count`` entries from position ``start`` on, True with ``probability`` (to within 2^-33).

    The number is compared as an integer, so that no rounding of floats takes part.
    """
    threshold = round(probability * 2**32)
    if threshold >= 2**32:
        return np.ones(count, dtype=bool)
    drawn: NDArray[np.bool_] = words(key, start, count) < np.uint32(threshold)
    return drawn
