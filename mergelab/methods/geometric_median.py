"""Geometric median: the point with the smallest sum of distances to the experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from mergelab.engine.method import merge_method
from mergelab.engine.sweep_range import NotSwept
from mergelab.ops.gram import Array, combination, combination_norm, gram
from mergelab.ops.threads import in_order
from mergelab.weights.align import AlignedModels

CONVERGED = 1e-12  # change of the coefficients below which the iteration has converged
MARGIN = 1e-9  # slack of the optimality test at an expert: two points are exactly at its bound


def weiszfeld(inner: Array, eps: float, iterations: int) -> Array:
    """Compute the coefficients (T,) of the geometric median of T points, which add up to 1, in float64.

    Args:
        inner: T×T inner products of the points, relative to any origin.
        eps: lower bound of distances, as a fraction of the points' mean distance from their mean.
        iterations: maximum number of iterations.
    """
    if (expert := _median_expert(inner)) is not None:
        return expert
    median = np.full(len(inner), 1 / len(inner))
    floor = eps * float(_distances(median, inner).mean())
    for _ in range(iterations):
        before, pulls = median, 1 / np.maximum(_distances(median, inner), floor)
        median = pulls / pulls.sum()
        if np.abs(median - before).max() < CONVERGED:
            break
    return median


def _median_expert(inner: Array) -> Array | None:
    """Return the coefficients of a point that is itself the median; None when there is none.

    At such a point the unit vectors towards the other points add up to a norm below the point's multiplicity.
    """
    for point in np.eye(len(inner)):
        distances = _distances(point, inner)
        apart = distances > 0
        pulls = np.divide(1, distances, out=np.zeros_like(distances), where=apart)
        if combination_norm(pulls - pulls.sum() * point, inner) < np.count_nonzero(~apart) - MARGIN:
            return point
    return None


def _distances(point: Array, inner: Array) -> Array:
    """Return each point's distance from ``point``, which is given by coefficients that add up to 1."""
    differences = np.eye(len(inner)) - point
    squares: Array = ((differences @ inner) * differences).sum(axis=1)
    return np.sqrt(np.maximum(squares, 0))


def model_coefficients(
    models: AlignedModels, *, scope: Literal["tensor", "model"], eps: float, iterations: int
) -> Array | None:
    """Compute the coefficients over all tensors together; None when each tensor has its own."""
    if scope == "tensor":
        return None
    inner = list(in_order(lambda name: _relative([expert.get(name) for expert in models.experts]), models.names))
    count = len(models.experts)
    whole = [[math.fsum(matrix[i, j] for matrix in inner) for j in range(count)] for i in range(count)]
    return weiszfeld(np.array(whole), eps, iterations)


def _relative(experts: Sequence[Tensor]) -> Array:
    """Return inner products relative to the first expert, so that small distances keep their precision."""
    return gram(experts, experts[0])


@merge_method(
    prepare=model_coefficients,
    family="averages",
    paper="Pillutla et al. 2019, arXiv:1912.13445",
    use="many experts among which outliers are expected",
)
def geometric_median(
    experts: Sequence[Tensor],
    *,
    prepared: Array | None = None,
    scope: Literal["tensor", "model"] = "tensor",
    eps: Annotated[float, Field(gt=0, lt=1), NotSwept()] = 1e-6,
    iterations: Annotated[int, Field(ge=1)] = 1000,
) -> Tensor:
    """Return the point with the least sum of Euclidean distances to the experts.

    argmin_θ Σ_t ‖θ − θ_t‖ by Weiszfeld's iteration, starting at the mean: θ ← Σ θ_t/d_t / Σ 1/d_t with
    d_t = max(‖θ − θ_t‖, ε) (Weiszfeld 1937; with the floor ε, Pillutla et al. 2019, arXiv:1912.13445). When more than
    half of the experts are equal, the result is that expert.

    Departures: ε is ``eps`` times the experts' mean distance from their mean, so that the result scales with the
    weights. An expert that is itself the median, which Weiszfeld's iteration reaches only in the limit, is detected by
    the optimality condition of Vardi & Zhang (2000) and returned exactly. When the median is not unique (two experts,
    or an even number on one line), the result is the point that the iteration converges to; for two experts, the mean.

    Args:
        experts: T tensors of one shape, any float dtype; whole tensors, not parts.
        prepared: the experts' coefficients when they are the same for all tensors.
        scope: whether distances are those of each tensor or of the whole models.
        eps: lower bound of distances, relative to the experts' mean distance from their mean.
        iterations: maximum number of iterations; the iteration ends earlier when it converges.

    Returns:
        Tensor of that shape, float32 (float64 for float64 inputs).
    """
    coefficients = weiszfeld(_relative(experts), eps, iterations) if prepared is None else prepared
    return combination(experts, coefficients)
