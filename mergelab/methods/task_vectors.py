"""What methods on task vectors are composed of: difference, trim, elect, disjoint reduce.

Each is a pure function of flat blocks in float32 or float64. Signs, comparisons and products with ±1 are exact, and
sums go expert by expert, so that a value does not depend on the block it is computed in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from mergelab.methods.blocks import working
from mergelab.methods.parameters import Weights

Election = Literal["mass", "count"]
Reduce = Literal["mean", "sum", "max"]


def task_vectors(base: Tensor, experts: Sequence[Tensor]) -> list[Tensor]:
    """Answer τ_t = θ_t − θ0 for each expert, in float32 (float64 where a tensor is float64)."""
    start = working(base)
    return [working(expert) - start for expert in experts]


def factors(weights: Weights, count: int) -> tuple[float, ...]:
    """Answer one factor per expert: the resolved ``weights``, or ones.

    Raises:
        ValueError: the weights are by name (only the engine knows names), or not ``count`` many.
    """
    if weights is None:
        return (1.0,) * count
    if not isinstance(weights, Sequence) or len(weights) != count:
        raise ValueError(f"{count} weights are needed, in the experts' order")
    return tuple(weights)


def of_each(number: float | Sequence[float], count: int) -> tuple[float, ...]:
    """Answer one number per expert: those given, or the same for all.

    Raises:
        ValueError: there are not ``count`` of them.
    """
    numbers = tuple(number) if isinstance(number, Sequence) else (number,) * count
    if len(numbers) != count:
        raise ValueError(f"{count} numbers are needed, in the experts' order")
    return numbers


def scaled(tensor: Tensor, factor: float) -> Tensor:
    """Multiply by ``factor``; the tensor itself when that is 1."""
    return tensor if factor == 1 else tensor * factor


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Answer Σ w_t x_t, product and sum each rounded (a fused multiply-add would differ between machines)."""
    total = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total += scaled(tensor, weight)
    return total


def trim_(task_vector: Tensor, threshold: float) -> Tensor:
    """Set entries of magnitude below ``threshold`` to zero, in place; those equal to it stay."""
    if threshold <= 0:
        return task_vector
    return torch.hardshrink(task_vector, just_below(threshold, task_vector.dtype), out=task_vector)


@lru_cache(maxsize=4096)
def just_below(threshold: float, dtype: torch.dtype) -> float:
    """Answer the largest number of ``dtype`` under ``threshold``: hardshrink keeps what is larger than its bound."""
    bound = torch.tensor(threshold, dtype=dtype)
    if bound.item() >= threshold:
        bound = torch.nextafter(bound, torch.tensor(-math.inf, dtype=dtype))
    return bound.item()


def elect(task_vectors: Sequence[Tensor], election: Election = "mass") -> Tensor:
    """Answer the sign (−1, 0 or 1) that has the larger total magnitude, or the larger number of entries."""
    total = torch.zeros_like(task_vectors[0])
    for vector in task_vectors:
        total += vector if election == "mass" else vector.sign()
    return total.sign_()


def resolve_zeros(signs: Tensor, sign: float) -> Tensor:
    """Answer ``signs`` with every 0 replaced by ``sign``."""
    return signs if sign == 0 else signs + (1 - signs.abs()) * sign


def disjoint_reduce(
    task_vectors: Sequence[Tensor], signs: Tensor, weights: Sequence[float], reduce: Reduce = "mean"
) -> Tensor:
    """Combine, at each entry, the task vectors whose sign there is the elected one.

    Args:
        task_vectors: T blocks.
        signs: elected signs in {−1, 0, 1}; where 0, nothing agrees.
        weights: T factors, none negative.
        reduce: mean: Σ w τ / Σ w over those that agree; sum: Σ w τ; max: the w τ of largest magnitude.

    Returns:
        A block; 0 where no task vector agrees.
    """
    result, shares = torch.zeros_like(signs), torch.zeros_like(signs)
    for vector, weight in zip(task_vectors, weights, strict=True):
        agreeing = (vector * signs).clamp_min_(0)  # magnitudes
        if reduce == "mean":
            result += scaled(agreeing, weight)
            shares += scaled(agreeing.sign_(), weight)
        elif reduce == "sum":
            result += scaled(agreeing, weight)
        else:
            result = torch.maximum(result, scaled(agreeing, weight))
    if reduce == "mean":
        result /= shares.clamp_min_(torch.finfo(shares.dtype).tiny)
    return result * signs
