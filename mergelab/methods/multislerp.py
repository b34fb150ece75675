"""Multi-SLERP: the mean of directions and of norms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field
from torch import Tensor

from mergelab.engine.method import merge_method
from mergelab.engine.parameters import NormalizedWeights
from mergelab.ops.gram import RESOLUTION, combined, gram, length
from mergelab.ops.spherical import MERGEKIT, check_spherical, origin
from mergelab.ops.task_vectors import factors


@merge_method(check=check_spherical, family="averages", paper=MERGEKIT)
def multislerp(
    experts: Sequence[Tensor],
    *,
    base: Tensor | None = None,
    weights: NormalizedWeights = None,
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
        ConfigError: the weights cancel, or there is no base for the task vectors.
    """
    start = origin(base, task_vectors)
    shares = np.array(factors(weights, len(experts)))
    shares /= math.fsum(shares)
    inner = gram(experts, start)
    norms = np.sqrt(inner.diagonal())
    of_units = np.divide(shares, norms, out=np.zeros_like(shares), where=norms > 0)
    resultant = length(of_units, inner)
    if resultant < max(eps, RESOLUTION):
        return combined(experts, shares, start)
    return combined(experts, of_units * (float(shares @ norms) / resultant), start)
