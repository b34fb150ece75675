"""Means of directions: NuSLERP, Multi-SLERP and the Karcher mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from mergelab.engine.parameters import Weights
from mergelab.engine.registry import merge_method
from mergelab.errors import ConfigError
from mergelab.methods.slerp import arc, slerp
from mergelab.ops.blocks import BLOCK, blocks, blockwise, working
from mergelab.ops.gram import RESOLUTION, Array, combined, gram, length
from mergelab.ops.task_vectors import factors
from mergelab.weights.align import AlignedModels

ANTIPODE = 1e-3  # angle from the opposite point within which no direction leads there
MERGEKIT = "mergekit: Goddard et al. 2024, arXiv:2403.13257"


def check_spherical(models: AlignedModels, weights: Sequence[float], task_vectors: bool | None) -> None:
    """Raise `ConfigError` for weights that cannot be normalised, and for task vectors without a base."""
    if math.fsum(weights) == 0:
        raise ConfigError(f"method.weights: {list(weights)} add up to 0; they are divided by their sum")
    if task_vectors and models.base is None:
        raise ConfigError("method.task_vectors=True: needs a base model, and none is given (models.base)")


def _origin(base: Tensor | None, task_vectors: bool | None) -> Tensor | None:
    return None if task_vectors is False else base


@merge_method(experts=(2, 2), check=check_spherical, family="averages", paper=MERGEKIT)
def nuslerp(
    experts: Sequence[Tensor],
    *,
    base: Tensor | None = None,
    weights: Weights = None,
    flatten: bool = True,
    row_wise: bool = False,
    task_vectors: bool | None = None,
) -> Tensor:
    """Interpolate between two experts, or two task vectors, along the arc between them, as far as their weights say.

    sin((1−t)Ω)/sinΩ·a + sin(tΩ)/sinΩ·b with t = w_b / (w_a + w_b), Ω the angle between a and b; where they are
    collinear (sin²Ω ≤ 1e-12) or one is zero, (1−t)·a + t·b. On task vectors, a = θ_a − θ0 and b = θ_b − θ0, and the
    result is added to θ0. As mergekit's documentation describes it (Goddard et al. 2024, arXiv:2403.13257). Dot
    products and norms are accumulated in float64.

    Departures from mergekit: weights that add up to 0 are an error (there t = 0.5). ``row_wise`` means what the
    documentation says; mergekit's code has rows and columns the other way round. In float32, mergekit does not tell
    angles under about 3e-4 from 0.

    Args:
        experts: two tensors of one shape, any float dtype; whole tensors, not parts.
        base: parameter of the pretrained model, of the experts' shape.
        weights: per expert, any sign; default 1. Beyond the two experts the arc goes on.
        flatten: take each tensor as one vector.
        row_wise: where ``flatten`` is off, interpolate each row W[i, :] for itself, not each column W[:, j].
        task_vectors: interpolate task vectors, not weights; None: where there is a base.

    Returns:
        Tensor of that shape, float32 (float64 for float64 inputs).

    Raises:
        ConfigError: the weights add up to 0, or there is no base for the task vectors.
    """
    of_a, of_b = factors(weights, len(experts))
    t = of_b / (of_a + of_b)
    start = _origin(base, task_vectors)
    ends = experts if start is None else [blockwise(torch.sub, expert, start) for expert in experts]
    merged = slerp(ends, t=t, threshold=1.0) if flatten else _interpolated(*ends, t=t, row_wise=row_wise)
    return merged if start is None else merged + working(start)


def _interpolated(a: Tensor, b: Tensor, *, t: float, row_wise: bool) -> Tensor:
    """Interpolate the rows, or columns, of two tensors, each along its own arc."""
    dtype = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    result = torch.empty(a.shape, dtype=dtype, device=a.device)
    into, of_a, of_b = (_rows(tensor, row_wise) for tensor in (result, a, b))
    for part in blocks(len(into), max(1, BLOCK // into.shape[1])):
        x, y = working(of_a[part]), working(of_b[part])
        by_x, by_y = arc(_cosines(x.double(), y.double()), t)
        into[part] = by_x.to(x.dtype) * x + by_y.to(y.dtype) * y
    return result


def _rows(tensor: Tensor, row_wise: bool) -> Tensor:
    """View a tensor as a matrix whose rows are its rows (along the last axis) or its columns (along the first)."""
    if tensor.dim() < 2:
        return tensor.reshape(1, -1)
    return tensor.reshape(-1, tensor.shape[-1]) if row_wise else tensor.reshape(len(tensor), -1).T


def _cosines(x: Tensor, y: Tensor) -> Tensor:
    """Answer the cosines between the rows of two float64 matrices, as a column; 1 where a row is zero."""
    lengths = x.norm(dim=1, keepdim=True) * y.norm(dim=1, keepdim=True)
    return torch.where(lengths > 0, (x * y).sum(dim=1, keepdim=True) / lengths, 1.0).clamp_(-1, 1)


@merge_method(check=check_spherical, family="averages", paper=MERGEKIT)
def multislerp(
    experts: Sequence[Tensor],
    *,
    base: Tensor | None = None,
    weights: Weights = None,
    eps: Annotated[float, Field(gt=0, lt=1)] = 1e-8,
    task_vectors: bool | None = None,
) -> Tensor:
    """Average the directions of the experts, or of their task vectors, and their norms.

    (Σ ŵ_t ‖x_t‖) · m with m = Σ ŵ_t u_t / ‖Σ ŵ_t u_t‖, u_t = x_t / ‖x_t‖ and ŵ_t = w_t / Σ w; x_t = θ_t, or θ_t − θ0
    with the result added to θ0; each tensor is one vector. mergekit's documentation (Goddard et al. 2024,
    arXiv:2403.13257) describes it as interpolation in the sphere's tangent space: the u_t are projected onto the one
    at m, averaged there with the weights, and brought back by the exponential map. As the projection is orthogonal,
    the average is 0, Σ ŵ_t (u_t − (u_t·m)·m) = ‖Σ ŵ u‖·m − ‖Σ ŵ u‖·m, and m is what comes back. (`karcher` is the mean
    on the sphere.) Inner products are accumulated in float64.

    Departures from mergekit: where the directions cancel, the result is linear, Σ ŵ_t x_t, for any number of experts
    (mergekit refuses more than two, also where all task vectors are 0). ``eps`` is not added to the norms. Weights are
    always normalised.

    Args:
        experts: T tensors of one shape, any float dtype; whole tensors, not parts.
        base: parameter of the pretrained model, of the experts' shape.
        weights: per expert, any sign; default 1.
        eps: ‖Σ ŵ_t u_t‖ below which the directions count as cancelling; below 1e-7 they always do.
        task_vectors: average task vectors, not weights; None: where there is a base.

    Returns:
        Tensor of that shape, float32 (float64 for float64 inputs).

    Raises:
        ConfigError: the weights add up to 0, or there is no base for the task vectors.
    """
    start = _origin(base, task_vectors)
    shares = np.array(factors(weights, len(experts)))
    shares /= math.fsum(shares)
    inner = gram(experts, start)
    norms = np.sqrt(inner.diagonal())
    of_units = np.divide(shares, norms, out=np.zeros_like(shares), where=norms > 0)
    resultant = length(of_units, inner)
    if resultant < max(eps, RESOLUTION):
        return combined(experts, shares, start)
    return combined(experts, of_units * (float(shares @ norms) / resultant), start)


@merge_method(family="averages", paper="Karcher 1977, doi:10.1002/cpa.3160300502")
def karcher(
    experts: Sequence[Tensor],
    *,
    max_iterations: Annotated[int, Field(ge=1)] = 10,
    tolerance: Annotated[float, Field(gt=0, lt=1)] = 1e-5,
) -> Tensor:
    """Answer the Riemannian mean of the experts' directions on the unit sphere, times the mean of their norms.

    (1/T Σ ‖θ_t‖) · argmin Σ_t ∠(m, θ_t)² over ‖m‖ = 1, each tensor one vector (Karcher 1977). By gradient descent from
    the normalised mean of the directions u_t on: v = 1/T Σ log_m(u_t) with log_m(u) = φ/sin φ · (u − cos φ · m),
    cos φ = u·m, then m ← cos‖v‖·m + sin‖v‖·v/‖v‖, until ‖v‖ < ``tolerance``. Zero tensors have no direction and count
    in the mean norm alone. Inner products are accumulated in float64.

    Departures from mergekit's: directions that cancel, which leave the mean undetermined, are answered by the linear
    mean 1/T Σ θ_t (mergekit starts from the first expert); tensors of a norm up to ``tolerance`` are tensors like any
    other (mergekit counts them as zero); directions nearer than ``tolerance`` to the mean still count. A direction
    opposite to the mean (within 1e-3) is left out of the step, as no shortest arc leads there.

    Args:
        experts: T tensors of one shape, any float dtype; whole tensors, not parts.
        max_iterations: at most so many steps.
        tolerance: length of a step, in radians, at which the mean has been reached.

    Returns:
        Tensor of that shape, float32 (float64 for float64 inputs).
    """
    inner = gram(experts)
    norms = np.sqrt(inner.diagonal())
    there = norms > 0
    coefficients = np.full(len(experts), 1 / len(experts))
    cosines = (inner / np.where(np.outer(norms, norms) > 0, np.outer(norms, norms), 1))[there][:, there]
    np.fill_diagonal(cosines, 1)
    mean = _frechet_mean(cosines, max_iterations, tolerance) if there.any() else None
    if mean is not None:
        coefficients[~there] = 0
        coefficients[there] = mean * (norms.mean() / norms[there])
    return combined(experts, coefficients)


def _frechet_mean(cosines: Array, max_iterations: int, tolerance: float) -> Array | None:
    """Answer the mean of unit vectors on the sphere, as coefficients of them; None where they cancel."""
    mean = np.full(len(cosines), 1 / len(cosines))
    resultant = length(mean, cosines)
    if resultant < max(tolerance, RESOLUTION):
        return None
    mean /= resultant
    for _ in range(max_iterations):
        along = np.clip(cosines @ mean, -1, 1)
        angles = np.arccos(along)
        reachable = angles < math.pi - ANTIPODE
        stretch = np.divide(1, np.sinc(angles / math.pi), out=np.zeros_like(angles), where=reachable)  # φ / sin φ
        tangent = (stretch - (stretch @ along) * mean) / len(cosines)
        step = length(tangent, cosines)
        if step < tolerance:
            break
        mean = math.cos(step) * mean + math.sin(step) / step * tangent
        mean /= length(mean, cosines)
    return mean
