"""Points in the span of the experts: where they lie by their inner products, what they are by coefficients.

A mean of directions and a geometric median are combinations of the experts. T coefficients say which, and the T×T
matrix of inner products says how long and how far apart such points are, so that the tensors are read once, however
many iterations there are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations_with_replacement

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mergelab.ops.blocks import blocks, blockwise
from mergelab.ops.task_vectors import task_vectors, weighted_sum
from mergelab.weights.numerics import dot

Array = NDArray[np.float64]

RESOLUTION = 1e-7  # lengths of sums of unit vectors below this are lost in the rounding of float64 inner products


def gram(experts: Sequence[Tensor], origin: Tensor | None = None) -> Array:
    """Return the T×T matrix (θ_i − o)·(θ_j − o), accumulated in float64; without an origin, o is 0."""
    count = len(experts)
    if origin is None:
        pairs = combinations_with_replacement(range(count), 2)
        sums = {(i, j): [dot(experts[i], experts[j])] for i, j in pairs}
    else:
        sums = products(origin, experts)
    matrix = np.empty((count, count))
    for (i, j), summands in sums.items():
        matrix[i, j] = matrix[j, i] = math.fsum(summands)
    return matrix


def length(coefficients: Array, inner: Array) -> float:
    """Return ‖Σ c_t x_t‖, given the inner products of the x_t."""
    return math.sqrt(max(0.0, float(coefficients @ inner @ coefficients)))


def combined(experts: Sequence[Tensor], coefficients: Sequence[float] | Array, origin: Tensor | None = None) -> Tensor:
    """Return o + Σ c_t (θ_t − o), in float32 (float64 for float64 inputs); without an origin, o is 0."""
    factors = [float(coefficient) for coefficient in coefficients]
    if origin is None:
        return blockwise(lambda *ends: weighted_sum(ends, factors), *experts)

    def move(start: Tensor, *ends: Tensor) -> Tensor:
        return start + weighted_sum(task_vectors(start, ends), factors)

    return blockwise(move, origin, *experts)


Products = dict[tuple[int, int], list[float]]


def products(base: Tensor, experts: Sequence[Tensor]) -> Products:
    """Return τ_i·τ_j for every pair of task vectors (i ≤ j), in float64, as summands over blocks of the tensor."""
    start = base.reshape(-1)
    ends = [expert.reshape(-1) for expert in experts]
    sums: Products = {pair: [] for pair in combinations_with_replacement(range(len(experts)), 2)}
    for part in blocks(start.numel()):
        vectors = task_vectors(start[part], [end[part] for end in ends])
        for (i, j), summands in sums.items():
            summands.append(dot(vectors[i], vectors[j]))
    return sums
