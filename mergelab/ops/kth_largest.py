"""The exact k-th largest entry of vectors that are too long to sort and that are read in pieces.

A strided sample brackets the wanted rank within a percent of the entries; one pass counts what lies above the bracket
and gathers what lies in it, where the entry is then selected. The sample decides only how much is gathered, never the
result: where the rank turns out to lie outside the bracket, the entry is found from histograms of the floats' digits.

TIES on five BERT-base experts, from disk to disk, takes a quarter of the time that it takes with NumPy's quantiles (5.3
and 20.3 s, ``experiments/benchmarks/README.md``), and no vector is ever whole in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mergelab.ops.blocks import blocks
from mergelab.ops.threads import chunks, in_order

Result = TypeVar("Result")
Array = NDArray[np.floating[Any]]
# Returns a tensor's part of every vector, for any slice of the flattened tensor. Entries are not negative; they may be
# written into, and are overwritten by the next that are asked for.
Read = Callable[[slice], Sequence[Array]]
# Opens a tensor by name.
Open = Callable[[str], Read]

SAMPLE = 1 << 15  # entries sampled per vector, or a 512th of it if that is more
STRETCH = 1 << 20  # entries that a strided read may span
DIGIT = 11  # bits that one histogram settles
GATHER = 16  # a bracket that holds this many times what was expected is given up


def rank_of(density: float, length: int) -> int:
    """Return how many entries ``density`` keeps: ``int(density · length)``, at least one."""
    return max(1, int(density * length))


def kth_largest(
    open_: Open, sizes: Mapping[str, int], density: float, vectors: int, *, pooled: bool = False
) -> tuple[float, ...]:
    """Select the smallest of the entries that ``density`` keeps, of each of T vectors or of all T together.

    Args:
        open_: gives access to the T vectors' parts in a tensor; they are float32 throughout, or float64 throughout.
        sizes: the length of each tensor; a vector is the concatenation of its parts.
        density: fraction of entries to keep; k is ``int(density · length)``, at least 1.
        vectors: T.
        pooled: whether the T vectors count as one.

    Returns:
        T entries. Those at least as large as it are k in number in each vector, or more where several equal it.
    """
    sizes = {name: size for name, size in sizes.items() if size}
    if not sizes:
        return (0.0,) * vectors
    length = sum(sizes.values()) * (vectors if pooled else 1)
    rank = rank_of(density, length)
    data = _Data(open_, sizes, pooled)
    step = _stride(sum(sizes.values()))
    samples = data.sampled(step)
    if step == 1:
        found = [_ranked(sample, rank) for sample in samples]
    else:
        for sample in samples:
            sample.sort()
        brackets = [_bracket(sample[::-1], rank / length) for sample in samples]
        kind = samples[0].dtype
        del samples
        within = _within(data, brackets, rank, length, kind)
        found = [_by_digits(data, i, rank, kind) if value is None else value for i, value in enumerate(within)]
    return tuple(found) * (vectors if pooled else 1)


def _ranked(entries: Array, rank: int) -> float:
    """Return the entry of ``rank``, counted from the largest, which has rank 1; the entries are reordered."""
    entries.partition(len(entries) - rank)
    return float(entries[len(entries) - rank])


@dataclass(frozen=True)
class _Data:
    open_: Open
    sizes: Mapping[str, int]
    pooled: bool

    def over(self, work: Callable[[int, Array], Result]) -> Iterator[tuple[int, Result]]:
        """Return what ``work`` makes of every block, with the group it counts for: its vector's index, 0 if pooled.

        ``work`` is called with the group and the block, in several threads.
        """

        def through(place: tuple[str, slice]) -> list[tuple[int, Result]]:
            name, chunk = place
            read = self.open_(name)
            found = []
            for part in blocks(chunk.stop, start=chunk.start):
                for index, entries in enumerate(read(part)):
                    group = 0 if self.pooled else index
                    found.append((group, work(group, entries)))
            return found

        for found in in_order(through, chunks(self.sizes)):
            yield from found

    def sampled(self, step: int) -> list[Array]:
        """Read every ``step``-th entry of each group, in any order."""
        span = max(step, STRETCH // step * step)

        def through(place: tuple[str, slice]) -> list[Array]:
            name, chunk = place
            read = self.open_(name)
            parts = [[entries.copy() for entries in read(slice(*part))] for part in _strided(chunk, step, span)]
            return [np.concatenate(of_one) for of_one in zip(*parts, strict=True)]

        groups: list[_Gathered] = []
        for parts in in_order(through, self._strides(step)):
            if not groups:
                count = -(-sum(self.sizes.values()) // step) * (len(parts) if self.pooled else 1)
                groups = [_Gathered(count, parts[0].dtype) for _ in (range(1) if self.pooled else parts)]
            for index, entries in enumerate(parts):
                groups[0 if self.pooled else index].add(entries)
        return [group.entries for group in groups]

    def _strides(self, step: int) -> Iterator[tuple[str, slice]]:
        """Say where in each tensor the sample starts: the stride goes on across the borders of tensors."""
        passed = 0
        for name, size in self.sizes.items():
            if (first := -passed % step) < size:
                yield name, slice(first, size)
            passed += size


def _strided(chunk: slice, step: int, span: int) -> Iterator[tuple[int, int, int]]:
    for start in range(chunk.start, chunk.stop, span):
        yield start, min(start + span, chunk.stop), step


@dataclass(frozen=True)
class _Bracket:
    low: float
    high: float
    share: float  # of the sample that lies between


def _stride(length: int) -> int:
    """Choose the sample's stride: 1 for short vectors, else without small factors, so as not to follow rows."""
    rough = length // max(SAMPLE, length >> 9)
    if rough <= 1:
        return 1
    return next(step for step in count(rough) if all(step % prime for prime in (2, 3, 5, 7, 11, 13) if prime < step))


def _bracket(sample: Array, share: float) -> _Bracket:
    """Bracket the entry below which all but ``share`` of the entries lie; six standard deviations to either side."""
    size = len(sample)
    margin = 6 * math.sqrt(size * share * (1 - share)) + 16
    upper, lower = math.floor(share * size - margin), math.ceil(share * size + margin)
    high = float(sample[upper]) if upper >= 0 else math.inf
    low = float(sample[lower]) if lower < size else -1.0
    return _Bracket(low, high, (min(lower, size) - max(upper, 0)) / size)


class _Gathered:
    """Entries in one piece of memory, in the order in which they come: many short pieces would fragment it."""

    def __init__(self, expected: float, dtype: np.dtype[Any]) -> None:
        self._buffer: Array = np.empty(int(1.1 * expected) + 4096, dtype=dtype)
        self._limit = int(GATHER * max(expected, 4096.0))
        self._count = 0

    @property
    def overflows(self) -> bool:
        """Whether there were more entries than are worth gathering."""
        return self._count > self._limit

    @property
    def entries(self) -> Array:
        return self._buffer[: self._count]

    def add(self, entries: Array) -> None:
        start, self._count = self._count, self._count + len(entries)
        if self._count > len(self._buffer):
            self._buffer.resize(self._count * 5 // 4, refcheck=False)
        self._buffer[start : self._count] = entries


def _within(
    data: _Data, brackets: Sequence[_Bracket], rank: int, length: int, dtype: np.dtype[Any]
) -> list[float | None]:
    """Select within the brackets in one pass; None where the wanted entry is in none of them."""
    above = [0] * len(brackets)
    gathered = [_Gathered(bracket.share * length, dtype) for bracket in brackets]

    def look(group: int, entries: Array) -> tuple[int, Array]:
        return _divided(entries, brackets[group], gather=not gathered[group].overflows)

    for group, (larger, inside) in data.over(look):
        above[group] += larger
        gathered[group].add(inside)
    found: list[float | None] = []
    for group, bracket in enumerate(brackets):
        place = rank - above[group]
        entries = gathered[group].entries
        if gathered[group].overflows:
            found.append(None)
        elif 1 <= place <= len(entries):
            found.append(_ranked(entries, place))
        else:  # where many entries are equal, the bracket's end itself is often the answer
            end = bracket.high if place < 1 else bracket.low
            found.append(end if _is_at(data, group, end, rank) else None)
    return found


def _divided(entries: Array, bracket: _Bracket, *, gather: bool) -> tuple[int, Array]:
    """Count the entries not below the bracket's upper end, and gather those strictly inside; they are written over.

    Bit patterns order as non-negative floats do. Less the first pattern inside, one comparison tells which are inside,
    as what is below has wrapped around, and nothing as long as the entries is allocated.
    """
    signed: Any = np.int32 if entries.itemsize == 4 else np.int64
    unsigned: Any = np.uint32 if entries.itemsize == 4 else np.uint64
    low, high = (int(entries.dtype.type(end).view(signed)) for end in (bracket.low, bracket.high))
    first = low + 1 if bracket.low >= 0 else 0
    patterns = entries.view(signed)
    patterns -= signed(first)
    above = int(np.count_nonzero(patterns >= signed(high - first)))
    if not gather or high <= first:
        return above, entries[:0].copy()
    inside = patterns[patterns.view(unsigned) < unsigned(high - first)]
    inside += signed(first)
    return above, inside.view(entries.dtype)


def _is_at(data: _Data, group: int, value: float, rank: int) -> bool:
    """Return whether the entry of ``rank`` equals ``value``."""

    def look(index: int, entries: Array) -> tuple[int, int]:
        if index != group:
            return 0, 0
        wanted = entries.dtype.type(value)
        return int(np.count_nonzero(entries > wanted)), int(np.count_nonzero(entries >= wanted))

    larger = at_least = 0
    for _, (more, no_less) in data.over(look):
        larger, at_least = larger + more, at_least + no_less
    return larger < rank <= at_least


def _by_digits(data: _Data, group: int, rank: int, dtype: np.dtype[Any]) -> float:
    """Select digit by digit, from the most significant bits down: a histogram in each pass, no gathering at all."""
    length = 8 * dtype.itemsize
    unsigned: Any = np.uint32 if length == 32 else np.uint64
    settled = bits = 0  # how many of the leading bits are known, and which they are
    while settled < length:
        width = min(DIGIT, length - settled)
        histogram = np.zeros(1 << width, dtype=np.int64)
        for index, counts in data.over(partial(_digits, settled=settled, bits=bits, width=width)):
            if index == group:
                histogram += counts
        from_top = np.cumsum(histogram[::-1])
        place = int(np.searchsorted(from_top, rank))
        rank -= int(from_top[place - 1]) if place else 0
        bits = bits << width | (len(histogram) - 1 - place)
        settled += width
    return float(np.array(bits, dtype=unsigned).view(dtype))


def _digits(_group: int, entries: Array, *, settled: int, bits: int, width: int) -> NDArray[np.int64]:
    """Count the next ``width`` bits of the entries whose first ``settled`` bits are ``bits``."""
    length = 8 * entries.itemsize
    pattern = entries.view(np.uint32 if length == 32 else np.uint64).astype(np.int64)
    if settled:
        pattern = pattern[pattern >> (length - settled) == bits]
    return np.bincount((pattern >> (length - settled - width)) & ((1 << width) - 1), minlength=1 << width)
