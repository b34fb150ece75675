"""Draw random numbers that depend on an entry's position in a tensor, not on the order of the draws.

A counter-based generator (Philox4x64-10, Salmon et al. 2011) has a key for the purpose of the numbers, and the entry's
position as its counter. Any part of a tensor can be drawn separately, in any order and process, with the same numbers.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

WORDS = 8  # 32-bit words per step of the counter


@lru_cache(maxsize=4096)
def stream_key(seed: int, *names: str) -> int:
    """Return the 128-bit key of a stream of numbers, e.g. ``stream_key(seed, digest, tensor)``."""
    digest = hashlib.blake2b(digest_size=16, person=b"mergelab")
    for part in (str(seed), *names):
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return int.from_bytes(digest.digest(), "little")


def words(key: int, start: int, count: int) -> NDArray[np.uint32]:
    """Return ``count`` numbers of the stream ``key`` from position ``start`` on: uint32, uniform over 32 bits."""
    first, lead = divmod(start, WORDS)
    steps = -(-(lead + count) // WORDS)
    raw = np.random.Philox(key=key, counter=first).random_raw(steps * WORDS // 2)
    halves: NDArray[np.uint32] = raw.astype("<u8", copy=False).view("<u4")
    return halves[lead : lead + count]


def bernoulli(key: int, start: int, count: int, probability: float) -> NDArray[np.bool_]:
    """Draw ``count`` booleans from position ``start`` on, True with ``probability`` (to within 2^-33).

    Numbers are compared as integers, so that the result does not depend on floating-point rounding.
    """
    threshold = round(probability * 2**32)
    if threshold >= 2**32:
        return np.ones(count, dtype=bool)
    drawn: NDArray[np.bool_] = words(key, start, count) < np.uint32(threshold)
    return drawn
