"""The geometric median: the point whose distances to the experts add up to the least."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from mergelab.engine.method import merge_method
from mergelab.engine.sweep_range import NotSwept
from mergelab.ops.gram import Array, combined, gram, length
from mergelab.ops.threads import in_order
from mergelab.weights.align import AlignedModels

SETTLED = 1e-12  # change of the coefficients below which the iteration has arrived
MARGIN = 1e-9  # by which the pull on a point must be too weak: two points pull each other exactly evenly


def weiszfeld(inner: Array, eps: float, iterations: int) -> Array:
    """Return coefficients, adding up to 1, of the geometric median of T points.

    Args:
        inner: T×T inner products of the points, about any origin.
        eps: distances count as at least this share of the points' mean distance from their mean.
        iterations: at most so many.
    """
    if (expert := _expert_that_is_it(inner)) is not None:
        return expert
    median = np.full(len(inner), 1 / len(inner))
    floor = eps * float(_distances(median, inner).mean())
    for _ in range(iterations):
        before, pulls = median, 1 / np.maximum(_distances(median, inner), floor)
        median = pulls / pulls.sum()
        if np.abs(median - before).max() < SETTLED:
            break
    return median


def _expert_that_is_it(inner: Array) -> Array | None:
    """Find a point that is itself the median: the others' unit pulls on it add up to less than its multiplicity."""
    for point in np.eye(len(inner)):
        distances = _distances(point, inner)
        apart = distances > 0
        pulls = np.divide(1, distances, out=np.zeros_like(distances), where=apart)
        if length(pulls - pulls.sum() * point, inner) < np.count_nonzero(~apart) - MARGIN:
            return point
    return None


def _distances(point: Array, inner: Array) -> Array:
    """Return each point's distance from ``point``, given by coefficients that add up to 1."""
    ways = np.eye(len(inner)) - point
    squares: Array = ((ways @ inner) * ways).sum(axis=1)
    return np.sqrt(np.maximum(squares, 0))


def model_coefficients(
    models: AlignedModels, *, scope: Literal["tensor", "model"], eps: float, iterations: int
) -> Array | None:
    """Return the coefficients over all tensors together, or None where each tensor has its own."""
    if scope == "tensor":
        return None
    inner = list(in_order(lambda name: _relative([expert.get(name) for expert in models.experts]), models.names))
    count = len(models.experts)
    whole = [[math.fsum(matrix[i, j] for matrix in inner) for j in range(count)] for i in range(count)]
    return weiszfeld(np.array(whole), eps, iterations)


def _relative(experts: Sequence[Tensor]) -> Array:
    """Return inner products about the first expert, so that large weights do not drown small distances."""
    return gram(experts, experts[0])


@merge_method(prepare=model_coefficients, family="averages", paper="Pillutla et al. 2019, arXiv:1912.13445")
def geometric_median(
    experts: Sequence[Tensor],
    *,
    prepared: Array | None = None,
    scope: Literal["tensor", "model"] = "tensor",
    eps: Annotated[float, Field(gt=0, lt=1), NotSwept()] = 1e-6,
    iterations: Annotated[int, Field(ge=1)] = 1000,
) -> Tensor:
    """Return the point with the least sum of Euclidean distances to the experts.

    argmin_θ Σ_t ‖θ − θ_t‖ by Weiszfeld's iteration from the mean on: θ ← Σ θ_t/d_t / Σ 1/d_t with
    d_t = max(‖θ − θ_t‖, ε) (Weiszfeld 1937; with the floor ε, Pillutla et al. 2019, arXiv:1912.13445). More than half
    the experts being one and the same, it is that one, whatever the others are.

    Departures: ε is ``eps`` times the experts' mean distance from their mean, so that the result scales with the
    weights. An expert that is itself the median, which Weiszfeld's iteration approaches without end, is recognised by
    the pull of the others (Vardi & Zhang 2000) and answered as it is. Where the median is not unique (two experts, or
    an even number in one line), it is the point that the iteration comes to; of two experts, their mean.

    Args:
        experts: T tensors of one shape, any float dtype; whole tensors, not parts.
        prepared: the experts' coefficients where they are the same for all tensors.
        scope: whether distances are those of each tensor or of the whole models.
        eps: smallest distance that counts, relative to the experts' mean distance from their mean.
        iterations: at most so many; it ends when the coefficients no longer change.

    Returns:
        Tensor of that shape, float32 (float64 for float64 inputs).
    """
    coefficients = weiszfeld(_relative(experts), eps, iterations) if prepared is None else prepared
    return combined(experts, coefficients)
