"""Select the exact k-th largest entry of vectors that are too long to sort and are read block by block.

A strided sample brackets the k-th largest entry to within about a percent of the entries. One pass counts the entries
above the bracket and gathers those inside, from which the entry is selected. The sample decides only how much is
gathered, never the result: when the rank lies outside the bracket, the entry is found by a radix selection.

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
# Returns the entries of every vector in a slice of a flattened tensor. Entries are not negative. The caller may write
# into them; the next call overwrites them.
Read = Callable[[slice], Sequence[Array]]
# Opens a tensor by name for reading.
Open = Callable[[str], Read]

SAMPLE = 1 << 15  # smallest sample per vector; a 512th of the vector when that is more
STRETCH = 1 << 20  # largest span of one strided read, in entries
DIGIT = 11  # bits per pass of the radix selection
GATHER = 16  # a bracket is given up when it holds this many times the expected number of entries


def rank_of(density: float, length: int) -> int:
    """Return the number of entries that ``density`` keeps of ``length``: ``int(density · length)``, at least one."""
    return max(1, int(density * length))


def kth_largest(
    open_: Open, sizes: Mapping[str, int], density: float, vectors: int, *, pooled: bool = False
) -> tuple[float, ...]:
    """Select the k-th largest entry of each of T vectors, or of all T together, with k from ``density``.

    Args:
        open_: opens a tensor, to read its entries of the T vectors; all float32, or all float64.
        sizes: the length of each tensor, by name; a vector is the concatenation of its tensors.
        density: fraction of entries to keep; k is ``int(density · length)``, at least 1.
        vectors: T.
        pooled: whether the T vectors count as one.

    Returns:
        T entries. In each vector k entries are at least as large as its entry, or more when several equal it.
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
        found = [_select(sample, rank) for sample in samples]
    else:
        for sample in samples:
            sample.sort()
        brackets = [_bracket(sample[::-1], rank / length) for sample in samples]
        dtype = samples[0].dtype
        del samples
        within = _within(data, brackets, rank, length, dtype)
        found = [_by_digits(data, i, rank, dtype) if value is None else value for i, value in enumerate(within)]
    return tuple(found) * (vectors if pooled else 1)


def _select(entries: Array, rank: int) -> float:
    """Return the entry of ``rank``, where the largest has rank 1; the entries are reordered."""
    entries.partition(len(entries) - rank)
    return float(entries[len(entries) - rank])


@dataclass(frozen=True)
class _Data:
    open_: Open
    sizes: Mapping[str, int]
    pooled: bool

    def over(self, work: Callable[[int, Array], Result]) -> Iterator[tuple[int, Result]]:
        """Yield the group of every block (its vector's index, 0 if pooled) and the result of ``work`` for it.

        ``work`` is called with the group and the block, in several threads.
        """

        def through(target: tuple[str, slice]) -> list[tuple[int, Result]]:
            name, chunk = target
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
        """Return every ``step``-th entry of each group, in any order."""
        span = max(step, STRETCH // step * step)

        def through(target: tuple[str, slice]) -> list[Array]:
            name, chunk = target
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
        """Yield the part of each tensor to sample: the stride continues across tensors."""
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
    share: float  # fraction of the sample in between


def _stride(length: int) -> int:
    """Choose the sample's stride: 1 for short vectors, else free of small factors, unlike row lengths of matrices."""
    rough = length // max(SAMPLE, length >> 9)
    if rough <= 1:
        return 1
    return next(step for step in count(rough) if all(step % prime for prime in (2, 3, 5, 7, 11, 13) if prime < step))


def _bracket(sample: Array, share: float) -> _Bracket:
    """Bracket the entry that ``share`` of the entries exceed, by six standard deviations of the sample's rank.

    Args:
        sample: in descending order.
        share: fraction of entries.
    """
    size = len(sample)
    margin = 6 * math.sqrt(size * share * (1 - share)) + 16
    upper, lower = math.floor(share * size - margin), math.ceil(share * size + margin)
    high = float(sample[upper]) if upper >= 0 else math.inf
    low = float(sample[lower]) if lower < size else -1.0
    return _Bracket(low, high, (min(lower, size) - max(upper, 0)) / size)


class _Gathered:
    """A growing buffer of entries; many short arrays would fragment the memory."""

    def __init__(self, expected: float, dtype: np.dtype[Any]) -> None:
        self._buffer: Array = np.empty(int(1.1 * expected) + 4096, dtype=dtype)
        self._limit = int(GATHER * max(expected, 4096.0))
        self._count = 0

    @property
    def overflows(self) -> bool:
        """Whether there are too many entries to gather."""
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
    """Select within the brackets in one pass; None for a group whose entry is outside its bracket."""
    above = [0] * len(brackets)
    gathered = [_Gathered(bracket.share * length, dtype) for bracket in brackets]

    def partition(group: int, entries: Array) -> tuple[int, Array]:
        return _partition(entries, brackets[group], gather=not gathered[group].overflows)

    for group, (larger, inside) in data.over(partition):
        above[group] += larger
        gathered[group].add(inside)
    found: list[float | None] = []
    for group, bracket in enumerate(brackets):
        inner = rank - above[group]
        entries = gathered[group].entries
        if gathered[group].overflows:
            found.append(None)
        elif 1 <= inner <= len(entries):
            found.append(_select(entries, inner))
        else:  # when many entries are equal, the entry is often an end of the bracket
            end = bracket.high if inner < 1 else bracket.low
            found.append(end if _has_rank(data, group, end, rank) else None)
    return found


def _partition(entries: Array, bracket: _Bracket, *, gather: bool) -> tuple[int, Array]:
    """Count the entries at or above the bracket's upper end, and gather those strictly inside; ``entries`` is written.

    Bit patterns of non-negative floats have the floats' order. After subtracting the first pattern inside, patterns
    below the bracket have wrapped around, so that one unsigned comparison finds those inside without a temporary.
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


def _has_rank(data: _Data, group: int, value: float, rank: int) -> bool:
    """Return whether the entry of ``rank`` equals ``value``."""

    def counts(index: int, entries: Array) -> tuple[int, int]:
        if index != group:
            return 0, 0
        entry = entries.dtype.type(value)
        return int(np.count_nonzero(entries > entry)), int(np.count_nonzero(entries >= entry))

    larger = at_least = 0
    for _, (more, no_less) in data.over(counts):
        larger, at_least = larger + more, at_least + no_less
    return larger < rank <= at_least


def _by_digits(data: _Data, group: int, rank: int, dtype: np.dtype[Any]) -> float:
    """Select by radix, from the most significant bits down, with one histogram per pass and without gathering."""
    length = 8 * dtype.itemsize
    unsigned: Any = np.uint32 if length == 32 else np.uint64
    settled = bits = 0  # number of known leading bits, and their value
    while settled < length:
        width = min(DIGIT, length - settled)
        histogram = np.zeros(1 << width, dtype=np.int64)
        for index, counts in data.over(partial(_digits, settled=settled, bits=bits, width=width)):
            if index == group:
                histogram += counts
        from_top = np.cumsum(histogram[::-1])
        digit = int(np.searchsorted(from_top, rank))  # counted from the top
        rank -= int(from_top[digit - 1]) if digit else 0
        bits = bits << width | (len(histogram) - 1 - digit)
        settled += width
    return float(np.array(bits, dtype=unsigned).view(dtype))


def _digits(_group: int, entries: Array, *, settled: int, bits: int, width: int) -> NDArray[np.int64]:
    """Return a histogram of the next ``width`` bits of the entries whose first ``settled`` bits are ``bits``."""
    length = 8 * entries.itemsize
    pattern = entries.view(np.uint32 if length == 32 else np.uint64).astype(np.int64)
    if settled:
        pattern = pattern[pattern >> (length - settled) == bits]
    return np.bincount((pattern >> (length - settled - width)) & ((1 << width) - 1), minlength=1 << width)
