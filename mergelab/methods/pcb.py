"""PCB-Merging: weigh every entry by how it fares in the competition within its task and between tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergelab.engine.method import merge_method
from mergelab.engine.parameters import Density
from mergelab.ops.blocks import blocks
from mergelab.ops.kth_largest import Array, Open, kth_largest
from mergelab.ops.task_vectors import Vectors, open_task_vectors, weighted_sum
from mergelab.ops.threads import chunks, in_order
from mergelab.weights.align import AlignedModels

OUTLIERS = 1e-4  # fraction of the magnitudes that is clamped at either end
OpenVectors = Callable[[str], Vectors]


@dataclass(frozen=True)
class Range:
    """The smallest and the largest value that others are clamped to."""

    low: float
    high: float

    def clamp(self, values: Tensor) -> Tensor:
        """Clamp values to the range."""
        return values.clamp(self.low, self.high)

    def place(self, values: Tensor) -> Tensor:
        """Clamp values and map the range to [0, 1]; where it is a point, values above 0 that reach it are at 1."""
        if self.high > self.low:
            return (self.clamp(values) - self.low) / (self.high - self.low)
        return ((values >= self.low) & (values > 0)).to(values.dtype)


@dataclass(frozen=True)
class Competition:
    """What the competition on an entry needs to know of the experts' whole task vectors.

    Attributes:
        magnitudes: per expert, the range of magnitudes without outliers.
        scores: per expert, the range of the scores that are kept.
    """

    magnitudes: tuple[Range, ...]
    scores: tuple[Range, ...]


def balance(vectors: Sequence[Tensor], magnitudes: Sequence[Range]) -> list[Tensor]:
    """Return the scores exp(T·(x_t² − 1))·tanh(τ_t·Σ_s τ_s), x_t the magnitudes placed in their range.

    Args:
        vectors: blocks in float64.
        magnitudes: per expert.
    """
    total = weighted_sum(vectors, (1.0,) * len(vectors))
    scores = []
    for vector, span in zip(vectors, magnitudes, strict=True):
        within = span.place(vector.abs()).square_().sub_(1).mul_(len(vectors)).exp_()
        scores.append(within.mul_((vector * total).tanh_()))
    return scores


def in_double(vectors: Sequence[Tensor]) -> list[Tensor]:
    """Return the vectors in float64."""
    return [vector.double() for vector in vectors]


def competition(models: AlignedModels, *, ratio: float) -> Competition:
    """Find the ranges of magnitudes and of scores, over the whole task vectors."""
    assert models.base is not None
    sizes = {name: math.prod(models.base.shape(name)) for name in models.names}
    length, count = sum(sizes.values()), len(models.experts)
    if not length:
        return Competition((Range(0, 0),) * count, (Range(0, 0),) * count)

    def magnitudes(name: str) -> Vectors:
        read = open_task_vectors(models, name)
        return lambda part: [vector.abs_() for vector in in_double(read(part))]

    lowest, highest = (
        ascending(magnitudes, sizes, count, place)
        for place in (int(length * OUTLIERS), int(length * (1 - OUTLIERS) - 1))
    )
    spans = tuple(Range(low, high) for low, high in zip(lowest, highest, strict=True))

    def scores(name: str) -> Vectors:
        read = open_task_vectors(models, name)
        return lambda part: balance(in_double(read(part)), spans)

    place = min(int(length * (1 - ratio)), length - 1)
    least = ascending(above_zero(scores, 1), sizes, count, place)
    if not all(least):  # selection is among non-negative entries
        negative = ascending(above_zero(scores, -1), sizes, count, length - 1 - place)
        least = tuple(low or -below for low, below in zip(least, negative, strict=True))
    return Competition(spans, tuple(map(Range, least, largest(scores, sizes))))


def above_zero(open_: OpenVectors, sign: float) -> OpenVectors:
    """Return the vectors times ±1, with 0 (not −0, whose bits would order above all) for what is below 0."""

    def opened(name: str) -> Vectors:
        read = open_(name)
        return lambda part: [vector.mul_(sign).clamp_min_(0).abs_() for vector in read(part)]

    return opened


def ascending(open_: OpenVectors, sizes: Mapping[str, int], count: int, place: int) -> tuple[float, ...]:
    """Select the entry that sorting each vector would bring to ``place``, counted from 0."""
    length = sum(sizes.values())

    def arrays(name: str) -> Callable[[slice], list[Array]]:
        read = open_(name)
        return lambda part: [vector.numpy() for vector in read(part)]

    opened: Open = arrays
    rank = length - max(place, 0)
    return kth_largest(opened, sizes, (rank + 0.5) / length, count)  # a density that stands for exactly this rank


def largest(open_: OpenVectors, sizes: Mapping[str, int]) -> tuple[float, ...]:
    """Return the largest entry of each vector."""

    def through(chunk: tuple[str, slice]) -> list[float]:
        name, whole = chunk
        read = open_(name)
        parts = [[float(vector.max()) for vector in read(part)] for part in blocks(whole.stop, start=whole.start)]
        return [max(of_one) for of_one in zip(*parts, strict=True)]

    found: Iterator[list[float]] = in_order(through, chunks(sizes))
    return tuple(max(of_one) for of_one in zip(*found, strict=True))


@merge_method(
    lambda_=1.0,
    elementwise=True,
    prepare=competition,
    identical_at=None,
    family="task vectors",
    paper="Du et al. 2024, arXiv:2410.02396",
)
def pcb(vectors: Sequence[Tensor], *, prepared: Competition, ratio: Density = 0.1) -> Tensor:
    """Average task vectors, each entry weighted by its score in the competition within its task and between tasks.

    θ0 + λ·Σ_t β̂_t⊙τ̃_t / Σ_t β̂_t. Scores β_t = exp(T·x_t²)·tanh(τ_t·Σ_s τ_s): the first factor balances within a
    task, x_t being the magnitudes |τ_t| mapped to [0, 1] by their minimum and maximum; the second between tasks, it is
    negative where an entry opposes the sum. The ``ratio`` largest scores of each task are kept, and mapped to [0, 1] by
    their minimum and maximum: β̂_t, 0 for all others. Minima, maxima and ratio are over the whole task vector. The
    10⁻⁴ largest and smallest magnitudes are clamped first, which makes x_t and τ̃_t; the second factor takes τ_t as it
    is (Du et al. 2024, arXiv:2410.02396).

    This is the authors' code. The paper's equations have Softmax(T·Norm(τ_t²)) for the first factor and
    Σ_s Softmax(Norm(τ_t·τ_s)) for the second, with neither norm defined, and weights that are not mapped to [0, 1].
    Departures from the code: float64; where the smallest and the largest of what is mapped are equal (where it divides
    by zero) those that are positive count fully, so that at least one entry is kept.

    Args:
        vectors: T task vectors, float32 or float64.
        prepared: the ranges of magnitudes and scores.
        ratio: fraction of a task vector's entries kept.
        lambda_: scale of the merged task vector; the engine applies it.

    Returns:
        τ_m, of the vectors' shape and dtype.
    """
    doubles = in_double(vectors)
    merged, shares = torch.zeros_like(doubles[0]), torch.zeros_like(doubles[0])
    for vector, score, span, kept in zip(
        doubles, balance(doubles, prepared.magnitudes), prepared.magnitudes, prepared.scores, strict=True
    ):
        share = kept.place(score)
        merged += vector.sign() * span.clamp(vector.abs()) * share
        shares += share
    return merged.div_(shares.clamp_min_(torch.finfo(shares.dtype).tiny)).to(vectors[0].dtype)
