"""What methods on task vectors are composed of: difference, trim, elect, disjoint reduce.

Each is a pure function of flat blocks in float32 or float64. Signs, comparisons and products with ±1 are exact, and
sums go expert by expert, so that a value does not depend on the block it is computed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from mergelab.ops.blocks import working
from mergelab.ops.workspace import INTERMEDIATE, Workspace

MajoritySign = Literal["total", "frequency"]
Reduce = Literal["mean", "sum", "max"]


def task_vectors(base: Tensor, experts: Sequence[Tensor]) -> list[Tensor]:
    """Return τ_t = θ_t − θ0 for each expert, in float32 (float64 where a tensor is float64)."""
    start = working(base)
    return [working(expert) - start for expert in experts]


def difference_into(row: Tensor, expert: Tensor, start: Tensor) -> Tensor:
    """Write a task vector, as `task_vectors` answers it, into ``row``.

    Args:
        row: float32, or float64 where a tensor is.
        expert: of any dtype.
        start: the base, float32 or float64.
    """
    if expert.dtype in (torch.float32, torch.float64):
        return torch.sub(expert, start, out=row)
    if row.dtype == start.dtype:
        return torch.sub(row.copy_(expert), start, out=row)  # widening does not round
    return torch.sub(expert.float(), start, out=row)


def factors(weights: Sequence[float] | Mapping[str, float] | None, count: int) -> tuple[float, ...]:
    """Return one factor per expert: the resolved ``weights``, or ones.

    Raises:
        ValueError: the weights are by name (only the engine knows names), or not ``count`` many.
    """
    if weights is None:
        return (1.0,) * count
    if not isinstance(weights, Sequence) or len(weights) != count:
        raise ValueError(f"{count} weights are needed, in the experts' order")
    return tuple(weights)


def of_each(number: float | Sequence[float], count: int) -> tuple[float, ...]:
    """Return one number per expert: those given, or the same for all.

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
    """Return Σ w_t x_t, product and sum each rounded (a fused multiply-add would differ between machines)."""
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
    """Return the largest number of ``dtype`` under ``threshold``: hardshrink keeps what is larger than its bound."""
    bound = torch.tensor(threshold, dtype=dtype)
    if bound.item() >= threshold:
        bound = torch.nextafter(bound, torch.tensor(-math.inf, dtype=dtype))
    return bound.item()


def elect(
    task_vectors: Sequence[Tensor],
    weights: Sequence[float] | Mapping[str, float] | None = None,
    majority_sign: MajoritySign = "total",
) -> Tensor:
    """Return the sign (−1, 0 or 1) that has the larger total magnitude w τ, or the larger total weight."""
    signs, spare = torch.empty_like(task_vectors[0]), torch.empty_like(task_vectors[0])
    _combine(task_vectors, factors(weights, len(task_vectors)), signs, spare, counting=majority_sign == "frequency")
    return signs.sign_()


def elect_in(workspace: Workspace, weights: Sequence[float], majority_sign: MajoritySign) -> Tensor:
    """Return what `elect` answers in ``workspace.signs``, of the task vectors that ``workspace`` holds."""
    _combine(workspace.vectors, weights, workspace.signs, workspace.spare, counting=majority_sign == "frequency")
    return workspace.signs.sign_()


def resolve_zeros_(signs: Tensor, sign: float) -> Tensor:
    """Replace every 0 by ``sign``, in place."""
    return signs if sign == 0 else signs.add_(sign / 2).sign_()


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
    flat = [vector.reshape(-1) for vector in task_vectors]
    workspace = Workspace.of(signs.new_empty(len(flat) + INTERMEDIATE, signs.numel()))
    torch.stack(flat, out=workspace.whole)
    return agree_(workspace, signs.reshape(-1), weights, reduce).mul(signs.reshape(-1)).view(signs.shape)


def agree_(workspace: Workspace, signs: Tensor, weights: Sequence[float], reduce: Reduce) -> Tensor:
    """Do what `disjoint_reduce` does in given room, with few operations: threads share one lock.

    Args:
        rows: holds the task vectors; all of it but ``start`` and ``signs`` is written over.
        signs, weights, reduce: as for `disjoint_reduce`.

    Returns:
        The result's magnitudes, in ``workspace``.
    """
    workspace.whole.mul_(signs).relu_()  # magnitudes of what agrees
    _combine(
        workspace.vectors,
        weights,
        workspace.result,
        workspace.spare,
        operation=torch.maximum if reduce == "max" else torch.add,
    )
    if reduce == "mean":
        workspace.whole.sign_()
        _combine(workspace.vectors, weights, workspace.shares, workspace.spare)
        workspace.result.div_(workspace.shares.clamp_min_(torch.finfo(workspace.shares.dtype).tiny))
    return workspace.result


def _combine(
    vectors: Sequence[Tensor],
    weights: Sequence[float],
    into: Tensor,
    spare: Tensor,
    *,
    operation: Callable[..., Tensor] = torch.add,
    counting: bool = False,
) -> None:
    """Write w_1 x_1 ∘ w_2 x_2 ∘ …, from the left, or the same of the products' signs."""

    def piece(at: int) -> Tensor:
        vector = vectors[at] if weights[at] == 1 else torch.mul(vectors[at], weights[at], out=spare)
        return torch.sign(vector, out=spare) if counting else vector

    done = 1
    if len(vectors) > 1 and not counting and weights[0] == 1:
        operation(vectors[0], piece(1), out=into)
        done = 2
    else:
        into.copy_(piece(0))
    for at in range(done, len(vectors)):
        operation(into, piece(at), out=into)


def mean(vectors: Sequence[Tensor]) -> Tensor:
    """Return the mean task vector, which is what tensors other than matrices get."""
    return weighted_sum(vectors, (1.0,) * len(vectors)) / len(vectors)
