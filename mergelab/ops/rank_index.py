"""An index in which any order statistic of long vectors is looked up: magnitudes grouped by their leading bits.

Non-negative floats order as their bit patterns do. A vector is cut into runs that a core's cache holds; the entries of
each run are grouped by the upper 16 bits of their pattern, and how many there are in each group is summed over the
runs. So the group that has the k-th largest entry is looked up, and the entry is selected within it, which holds about
a hundredth of the vector. Grouping takes a fraction of the time that sorting does.

It pays in a sweep over TIES' density. On five BERT-base experts the index takes 3 to 8 s to make, in half the memory of
the task vectors; after that a step with another density takes 0.11 to 0.48 s, search and merge together
(``experiments/benchmarks/README.md``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergelab.ops.blocks import BLOCK, blocks
from mergelab.ops.kth_largest import Array, Open, rank_of
from mergelab.ops.threads import in_order

RUN = 4 * BLOCK  # entries that are grouped at once


@dataclass(frozen=True)
class Run:
    """A part of a vector, its entries grouped.

    Attributes:
        first: the smallest upper bits that occur.
        starts: where in ``entries`` each group begins, from the one of ``first`` on; at the end, where the last ends.
        entries: the patterns' lower 16 bits of float32 entries; the whole pattern of float64 entries.
    """

    first: int
    starts: NDArray[np.uint32]
    entries: NDArray[Any]

    def group(self, upper: int) -> NDArray[Any]:
        """Return the entries with these upper bits."""
        at = upper - self.first
        if not 0 <= at < len(self.starts) - 1:
            return self.entries[:0]
        return self.entries[self.starts[at] : self.starts[at + 1]]


@dataclass(frozen=True)
class Ranked:
    """A vector of non-negative entries of which any rank can be looked up.

    Attributes:
        first: the smallest upper bits that occur.
        below: how many entries have upper bits less than ``first``, ``first`` + 1 and so on; at the end, how many there
            are.
        runs: the entries.
    """

    first: int
    below: NDArray[np.int64]
    runs: tuple[Run, ...]

    def __len__(self) -> int:
        return int(self.below[-1])


def grouped(entries: Array) -> Run:
    """Group a run's entries by the upper 16 bits of their patterns."""
    short = entries.itemsize == 4
    bits: NDArray[Any] = entries.view(np.uint32 if short else np.uint64)
    upper = (bits >> (16 if short else 48)).astype(np.uint16)
    order = np.argsort(upper, kind="stable")  # a radix sort, as these are 16 bits
    first = int(upper[order[0]])
    starts = np.zeros(int(upper[order[-1]]) - first + 2, dtype=np.uint32)
    np.cumsum(np.bincount(upper - np.uint16(first)), out=starts[1:])
    return Run(first, starts, (bits.astype(np.uint16) if short else bits).take(order))


def rank_each(open_: Open, sizes: Mapping[str, int], vectors: int) -> dict[str, tuple[Ranked, ...]]:
    """Group the entries of vectors that are read in pieces, each tensor's on their own.

    Args:
        open_: gives access to the T vectors' parts in a tensor, as for `mergelab.ops.kth_largest.kth_largest`.
        sizes: the length of each tensor.
        vectors: T.

    Returns:
        For each tensor T `Ranked`.
    """

    def through(place: tuple[str, slice]) -> tuple[str, list[Run]]:
        name, part = place
        return name, [grouped(entries) for entries in open_(name)(part)]

    runs: dict[str, list[list[Run]]] = {name: [] for name in sizes}
    for name, found in in_order(through, ((name, part) for name, size in sizes.items() for part in blocks(size, RUN))):
        runs[name].append(found)
    return {name: tuple(_ranked([run[at] for run in some]) for at in range(vectors)) for name, some in runs.items()}


def together(parts: Sequence[Ranked]) -> Ranked:
    """Return the concatenation of parts of a vector."""
    return Ranked(
        *_counted([(part.first, part.below) for part in parts]), tuple(r for part in parts for r in part.runs)
    )


def _ranked(runs: Sequence[Run]) -> Ranked:
    return Ranked(*_counted([(run.first, run.starts) for run in runs]), tuple(runs))


def kth_of(vectors: Sequence[Ranked], density: float, *, pooled: bool = False) -> tuple[float, ...]:
    """Look up what `mergelab.ops.kth_largest.kth_largest` selects."""
    if pooled:
        return (_selected(vectors, density),) * len(vectors)
    return tuple(_selected([vector], density) for vector in vectors)


def _selected(vectors: Sequence[Ranked], density: float) -> float:
    """Return the smallest entry that ``density`` keeps of all the vectors' entries together."""
    whole = vectors[0] if len(vectors) == 1 else together(vectors)
    first, below = whole.first, whole.below
    total = int(below[-1])
    if not total:
        return 0.0
    place = total - rank_of(density, total)  # in ascending order
    at = int(np.searchsorted(below, place, side="right")) - 1
    inside = np.concatenate([run.group(first + at) for run in whole.runs])
    inside.partition(place - int(below[at]))
    entry = int(inside[place - int(below[at])])
    if inside.dtype == np.uint16:
        return float(np.uint32(first + at << 16 | entry).view(np.float32))
    return float(np.uint64(entry).view(np.float64))


def _counted(parts: Sequence[tuple[int, NDArray[Any]]]) -> tuple[int, NDArray[np.int64]]:
    """Add up how many entries lie below each group, of parts whose own counts begin at different groups."""
    parts = [(first, below) for first, below in parts if below[-1]]
    if not parts:
        return 0, np.zeros(1, dtype=np.int64)
    lowest = min(first for first, _ in parts)
    counts = np.zeros(max(first + len(below) - 1 for first, below in parts) - lowest, dtype=np.int64)
    for first, below in parts:
        counts[first - lowest : first - lowest + len(below) - 1] += below[1:].astype(np.int64) - below[:-1]
    return lowest, np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)])
