"""Every order statistic of long vectors at once: sorted magnitudes, kept in half the space.

Non-negative floats order as their bit patterns do. Of a sorted float32 vector only the lower 16 bits of each entry are
kept, and for every value of the upper 16 bits where its entries begin; the k-th largest is then looked up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergelab.methods.blocks import blocks
from mergelab.methods.order import Array, Open, rank_of
from mergelab.methods.workers import chunks, in_order


@dataclass(frozen=True)
class Ranked:
    """A sorted vector of non-negative entries.

    Attributes:
        starts: where the entries with upper bits 0, 1, … begin; None for float64 entries, which are kept whole.
        entries: ascending; uint16 lower halves, or float64.
    """

    starts: NDArray[np.int64] | None
    entries: NDArray[Any]

    def __len__(self) -> int:
        return len(self.entries)

    def at(self, place: int) -> float:
        """Answer the entry at ``place`` in ascending order."""
        if self.starts is None:
            return float(self.entries[place])
        upper = int(np.searchsorted(self.starts, place, side="right")) - 1
        return float(np.uint32(upper << 16 | int(self.entries[place])).view(np.float32))

    def below(self, value: float) -> int:
        """Count the entries less than ``value``, which is one that the entries' dtype can hold."""
        if self.starts is None:
            return int(np.searchsorted(self.entries, value))
        bits = int(np.float32(value).view(np.uint32))
        start, stop = (int(self.starts[bits >> 16]), int(self.starts[(bits >> 16) + 1]))
        return start + int(np.searchsorted(self.entries[start:stop], np.uint16(bits & 0xFFFF)))


def ranked(entries: Array) -> Ranked:
    """Sort ``entries`` in place and keep them as `Ranked` does."""
    if entries.dtype == np.float64:
        entries.sort()
        return Ranked(None, entries)
    bits = entries.view(np.uint32)
    bits.sort()
    edges = np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)
    starts = np.append(np.searchsorted(bits, edges), len(bits)).astype(np.int64)
    return Ranked(starts, bits.astype(np.uint16))


def rank_vector(open_: Open, sizes: Mapping[str, int]) -> Ranked:
    """Sort a vector that is read in pieces.

    Args:
        open_: gives access to the vector's parts in a tensor, as for `mergelab.methods.order.kth_largest` with T = 1.
        sizes: the length of each tensor.
    """
    offsets = dict(zip(sizes, np.cumsum([0, *sizes.values()]), strict=False))
    some = next((name for name, size in sizes.items() if size), None)
    dtype = np.dtype(np.float32) if some is None else open_(some)(slice(0, 1))[0].dtype
    entries = np.empty(sum(sizes.values()), dtype=dtype)

    def copy(place: tuple[str, slice]) -> None:
        name, chunk = place
        read = open_(name)
        for part in blocks(chunk.stop, start=chunk.start):
            entries[offsets[name] + part.start : offsets[name] + part.stop] = read(part)[0]

    for _ in in_order(copy, chunks(sizes)):
        pass
    return ranked(entries)


def kth_of(vectors: Sequence[Ranked], density: float, *, pooled: bool = False) -> tuple[float, ...]:
    """Look up what `mergelab.methods.order.kth_largest` selects."""
    if not pooled:
        return tuple(v.at(len(v) - rank_of(density, len(v))) if len(v) else 0.0 for v in vectors)
    total = sum(map(len, vectors))
    if not total:
        return (0.0,) * len(vectors)
    place = total - rank_of(density, total)  # of the wanted entry in ascending order of all

    def candidate(vector: Ranked) -> float:
        """Find the smallest entry of one vector that more than ``place`` of all entries do not exceed."""
        low, high = 0, len(vector)
        while low < high:
            middle = (low + high) // 2
            if sum(other.below(_next(vector.at(middle), other)) for other in vectors) > place:
                high = middle
            else:
                low = middle + 1
        return vector.at(low) if low < len(vector) else math.inf

    return (min(map(candidate, vectors)),) * len(vectors)


def _next(value: float, vector: Ranked) -> float:
    """Answer the next larger number of the vector's dtype."""
    kind: Any = np.float64 if vector.starts is None else np.float32
    return float(np.nextafter(kind(value), kind(np.inf)))
