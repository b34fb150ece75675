"""PCB-Merging: weight each entry by its competition within its task and between tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from mergelab.engine.method import merge_method
from mergelab.engine.parameters import Density
from mergelab.engine.sweep_range import NotSwept
from mergelab.ops.blocks import blocks
from mergelab.ops.kth_largest import Array, Open, kth_largest
from mergelab.ops.task_vectors import Vectors, open_task_vectors, weighted_sum
from mergelab.ops.threads import chunks, in_order
from mergelab.weights.align import AlignedModels

Between = Literal["raw", "normalized"]  # the task vectors whose sum each is compared with
OpenTensor = Callable[[str], Vectors]  # opens a tensor by name, to read its entries of the T vectors


@dataclass(frozen=True)
class Range:
    """An interval that values are clamped to."""

    low: float
    high: float

    def clamp(self, values: Tensor) -> Tensor:
        """Return the values clamped to the range."""
        return values.clamp(self.low, self.high)

    def normalise(self, values: Tensor) -> Tensor:
        """Clamp values and map the range to [0, 1]; when it is one point, positive values that reach it map to 1."""
        if self.high > self.low:
            return (self.clamp(values) - self.low) / (self.high - self.low)
        return ((values >= self.low) & (values > 0)).to(values.dtype)


@dataclass(frozen=True)
class Competition:
    """Ranges over the experts' whole task vectors, by which the entries' scores are normalised.

    Attributes:
        magnitudes: per expert, the range of magnitudes without outliers.
        scores: per expert, the range of the selected scores.
    """

    magnitudes: tuple[Range, ...]
    scores: tuple[Range, ...]


def balance(vectors: Sequence[Tensor], magnitudes: Sequence[Range], between: Between) -> list[Tensor]:
    """Compute the scores exp(T·(x_t² − 1))·tanh(τ_t·Σ_s τ_s), with x_t the magnitudes normalised by their range.

    Args:
        vectors: per expert, a block in float64.
        magnitudes: per expert, the range of magnitudes.
        between: whether the sum is of the "raw" τ_s, or of the "normalized" sgn(τ_s)·x_s.

    Returns:
        Per expert, a block of scores in float64.
    """
    inside = [span.normalise(vector.abs()) for vector, span in zip(vectors, magnitudes, strict=True)]
    summed = vectors
    if between == "normalized":
        summed = [vector.sign() * share for vector, share in zip(vectors, inside, strict=True)]
    total = weighted_sum(summed, (1.0,) * len(vectors))
    scores = []
    for vector, share in zip(vectors, inside, strict=True):
        within = share.square_().sub_(1).mul_(len(vectors)).exp_()
        scores.append(within.mul_((vector * total).tanh_()))
    return scores


def to_double(vectors: Sequence[Tensor]) -> list[Tensor]:
    """Return the vectors in float64."""
    return [vector.double() for vector in vectors]


def competition(models: AlignedModels, *, ratio: float, clamp: float, between: Between) -> Competition:
    """Find the ranges of magnitudes and of selected scores over the whole task vectors."""
    assert models.base is not None
    sizes = {name: math.prod(models.base.shape(name)) for name in models.names}
    length, count = sum(sizes.values()), len(models.experts)
    if not length:
        return Competition((Range(0, 0),) * count, (Range(0, 0),) * count)

    def magnitudes(name: str) -> Vectors:
        read = open_task_vectors(models, name)
        return lambda part: [vector.abs_() for vector in to_double(read(part))]

    lowest, highest = (
        select_ascending(magnitudes, sizes, count, index)
        for index in (int(length * clamp), int(length * (1 - clamp) - 1))
    )
    spans = tuple(Range(low, high) for low, high in zip(lowest, highest, strict=True))

    def scores(name: str) -> Vectors:
        read = open_task_vectors(models, name)
        return lambda part: balance(to_double(read(part)), spans, between)

    index = min(int(length * (1 - ratio)), length - 1)
    least = select_ascending(positive_part(scores, 1), sizes, count, index)
    if not all(least):  # `kth_largest` selects among non-negative entries only
        negative = select_ascending(positive_part(scores, -1), sizes, count, length - 1 - index)
        least = tuple(low or -below for low, below in zip(least, negative, strict=True))
    return Competition(spans, tuple(map(Range, least, largest_entries(scores, sizes))))


def positive_part(open_: OpenTensor, sign: float) -> OpenTensor:
    """Return the vectors times ``sign`` (±1), with 0 for negative entries (not −0, whose bits are the largest)."""

    def opened(name: str) -> Vectors:
        read = open_(name)
        return lambda part: [vector.mul_(sign).clamp_min_(0).abs_() for vector in read(part)]

    return opened


def select_ascending(open_: OpenTensor, sizes: Mapping[str, int], count: int, index: int) -> tuple[float, ...]:
    """Select the entry at ``index`` (from 0) of each of ``count`` vectors in ascending order."""
    length = sum(sizes.values())

    def arrays(name: str) -> Callable[[slice], list[Array]]:
        read = open_(name)
        return lambda part: [vector.numpy() for vector in read(part)]

    opened: Open = arrays
    rank = length - max(index, 0)
    return kth_largest(opened, sizes, (rank + 0.5) / length, count)  # the density that selects exactly this rank


def largest_entries(open_: OpenTensor, sizes: Mapping[str, int]) -> tuple[float, ...]:
    """Return the largest entry of each vector."""

    def through(target: tuple[str, slice]) -> list[float]:
        name, chunk = target
        read = open_(name)
        parts = [[float(vector.max()) for vector in read(part)] for part in blocks(chunk.stop, start=chunk.start)]
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
    authors={"clamp": 0.01},
    tuned=("lambda_",),
    work="computes an exponential and a tanh for every entry of every expert",
    use="several tasks of unlike importance, without data",
)
def pcb(
    vectors: Sequence[Tensor],
    *,
    prepared: Competition,
    ratio: Density = 0.1,
    clamp: Annotated[float, Field(ge=0, lt=0.5), NotSwept()] = 1e-4,
    between: Between = "raw",
) -> Tensor:
    """Average task vectors, each entry weighted by its competition within its task and between tasks.

    θ0 + λ·Σ_t β̂_t⊙τ̃_t / Σ_t β̂_t. Scores are β_t = exp(T·x_t²)·tanh(τ_t·Σ_s τ_s). The first factor balances within a
    task; x_t are the magnitudes |τ_t|, mapped to [0, 1] by their minimum and maximum. The second factor balances
    between tasks and is negative where an entry opposes the sum. The ``ratio`` largest scores of each task are selected
    and mapped to [0, 1] by their minimum and maximum: β̂_t, with 0 for all others. Minima, maxima and ratio are over
    the whole task vector. For x_t and τ̃_t, the fraction ``clamp`` of largest and of smallest magnitudes is clamped
    first; the second factor uses τ_t without clamping (Du et al. 2024, arXiv:2410.02396).

    The defaults are those of the authors' stand-alone function. Their experiments on language models clamp 0.01
    (``method.preset=authors``); those on vision models also sum sgn(τ_s)·x_s in the second factor
    (``between="normalized"``), select 0.05 and set λ = 1.2.

    This follows the authors' code. The paper's equations have Softmax(T·Norm(τ_t²)) for the first factor and
    Σ_s Softmax(Norm(τ_t·τ_s)) for the second, without a definition of Norm, and weights that are not mapped to [0, 1].
    Departures from the code: float64. Where minimum and maximum of mapped values are equal (the code divides by zero),
    positive ones get 1, so that at least one entry is selected.

    Args:
        vectors: T task vectors, float32 or float64.
        prepared: the ranges of magnitudes and scores.
        ratio: fraction of a task vector's entries to select.
        clamp: fraction of a task vector's magnitudes that is clamped, at either end.
        between: what the second factor sums: "raw", the τ_s; "normalized", their signs times x_s.
        lambda_: scale of the merged task vector; the engine applies it.

    Returns:
        τ_m, of the vectors' shape and dtype.
    """
    doubles = to_double(vectors)
    merged, shares = torch.zeros_like(doubles[0]), torch.zeros_like(doubles[0])
    for vector, score, span, selected in zip(
        doubles, balance(doubles, prepared.magnitudes, between), prepared.magnitudes, prepared.scores, strict=True
    ):
        share = selected.normalise(score)
        merged += vector.sign() * span.clamp(vector.abs()) * share
        shares += share
    return merged.div_(shares.clamp_min_(torch.finfo(shares.dtype).tiny)).to(vectors[0].dtype)
