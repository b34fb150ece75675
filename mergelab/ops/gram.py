"""Compute linear combinations of the experts from their Gram matrix.

A mean of directions and a geometric median are linear combinations of the experts, with T coefficients. The T×T Gram
matrix gives norms and distances of such points, so that the tensors are read once for any number of iterations.
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

RESOLUTION = 1e-7  # norm of a sum of unit vectors below which the rounding of float64 inner products dominates


def gram(experts: Sequence[Tensor], origin: Tensor | None = None) -> Array:
    """Return the T×T matrix (θ_i − o)·(θ_j − o), accumulated in float64; without an origin, o is 0."""
    count = len(experts)
    if origin is None:
        pairs = combinations_with_replacement(range(count), 2)
        sums = {(i, j): [dot(experts[i], experts[j])] for i, j in pairs}
    else:
        sums = pair_products(origin, experts)
    matrix = np.empty((count, count))
    for (i, j), summands in sums.items():
        matrix[i, j] = matrix[j, i] = math.fsum(summands)
    return matrix


def combination_norm(coefficients: Array, inner: Array) -> float:
    """Return ‖Σ c_t x_t‖ from the coefficients (T,) and the inner products (T, T) of the x_t."""
    return math.sqrt(max(0.0, float(coefficients @ inner @ coefficients)))


def combination(
    experts: Sequence[Tensor], coefficients: Sequence[float] | Array, origin: Tensor | None = None
) -> Tensor:
    """Return o + Σ c_t (θ_t − o), in float32 (float64 for float64 inputs); without an origin, o is 0."""
    factors = [float(coefficient) for coefficient in coefficients]
    if origin is None:
        return blockwise(lambda *ends: weighted_sum(ends, factors), *experts)

    def move(start: Tensor, *ends: Tensor) -> Tensor:
        return start + weighted_sum(task_vectors(start, ends), factors)

    return blockwise(move, origin, *experts)


PairProducts = dict[tuple[int, int], list[float]]


def pair_products(base: Tensor, experts: Sequence[Tensor]) -> PairProducts:
    """Return τ_i·τ_j for every pair of task vectors (i ≤ j), in float64, as a list of summands over blocks."""
    start = base.reshape(-1)
    ends = [expert.reshape(-1) for expert in experts]
    sums: PairProducts = {pair: [] for pair in combinations_with_replacement(range(len(experts)), 2)}
    for part in blocks(start.numel()):
        vectors = task_vectors(start[part], [end[part] for end in ends])
        for (i, j), summands in sums.items():
            summands.append(dot(vectors[i], vectors[j]))
    return sums
