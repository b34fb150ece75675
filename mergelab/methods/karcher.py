"""Karcher mean: the Riemannian mean of the experts' directions on the sphere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field
from torch import Tensor

from mergelab.engine.method import merge_method
from mergelab.engine.sweep_range import NotSwept
from mergelab.ops.gram import RESOLUTION, Array, combination, combination_norm, gram

ANTIPODE = 1e-3  # angle from the opposite point within which the shortest arc is not determined


@merge_method(
    family="averages",
    paper="Karcher 1977, doi:10.1002/cpa.3160300502",
    use="more than two models to be interpolated on the sphere, without preferring one",
)
def karcher(
    experts: Sequence[Tensor],
    *,
    max_iterations: Annotated[int, Field(ge=1)] = 10,
    tolerance: Annotated[float, Field(gt=0, lt=1), NotSwept()] = 1e-5,
) -> Tensor:
    """Return the Riemannian mean of the experts' directions on the unit sphere, times the mean of their norms.

    (1/T Σ ‖θ_t‖) · argmin Σ_t ∠(m, θ_t)² over ‖m‖ = 1, each tensor one vector (Karcher 1977). Gradient descent starts
    at the normalised mean of the directions u_t: v = 1/T Σ log_m(u_t) with log_m(u) = φ/sin φ · (u − cos φ · m),
    cos φ = u·m, then m ← cos‖v‖·m + sin‖v‖·v/‖v‖, until ‖v‖ < ``tolerance``. Zero tensors have no direction and count
    only in the mean norm. Inner products are accumulated in float64.

    Departures from mergekit: where the directions cancel and leave the mean undetermined, the result is the linear mean
    1/T Σ θ_t (mergekit starts from the first expert). Tensors of a norm up to ``tolerance`` are not treated as zero.
    Directions closer than ``tolerance`` to the mean still count. A direction opposite to the mean (within 1e-3) is
    omitted from the step, as no shortest arc leads there.

    Args:
        experts: T tensors of one shape, any float dtype; whole tensors, not parts.
        max_iterations: maximum number of steps.
        tolerance: length of a step, in radians, below which the iteration has converged.

    Returns:
        Tensor of that shape, float32 (float64 for float64 inputs).
    """
    inner = gram(experts)
    norms = np.sqrt(inner.diagonal())
    nonzero = norms > 0
    coefficients = np.full(len(experts), 1 / len(experts))
    cosines = (inner / np.where(np.outer(norms, norms) > 0, np.outer(norms, norms), 1))[nonzero][:, nonzero]
    np.fill_diagonal(cosines, 1)
    mean = _frechet_mean(cosines, max_iterations, tolerance) if nonzero.any() else None
    if mean is not None:
        coefficients[~nonzero] = 0
        coefficients[nonzero] = mean * (norms.mean() / norms[nonzero])
    return combination(experts, coefficients)


def _frechet_mean(cosines: Array, max_iterations: int, tolerance: float) -> Array | None:
    """Return the coefficients of the mean of unit vectors on the sphere; None when the vectors cancel."""
    mean = np.full(len(cosines), 1 / len(cosines))
    resultant = combination_norm(mean, cosines)
    if resultant < max(tolerance, RESOLUTION):
        return None
    mean /= resultant
    for _ in range(max_iterations):
        along = np.clip(cosines @ mean, -1, 1)
        angles = np.arccos(along)
        reachable = angles < math.pi - ANTIPODE
        stretch = np.divide(1, np.sinc(angles / math.pi), out=np.zeros_like(angles), where=reachable)  # φ / sin φ
        tangent = (stretch - (stretch @ along) * mean) / len(cosines)
        step = combination_norm(tangent, cosines)
        if step < tolerance:
            break
        mean = math.cos(step) * mean + math.sin(step) / step * tangent
        mean /= combination_norm(mean, cosines)
    return mean
