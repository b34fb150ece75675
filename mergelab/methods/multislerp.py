"""Multi-SLERP: average the directions and the norms of experts or task vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field
from torch import Tensor

from mergelab.engine.method import merge_method
from mergelab.engine.parameters import SumWeights
from mergelab.engine.sweep_range import NotSwept
from mergelab.methods import MERGEKIT
from mergelab.ops.gram import RESOLUTION, combination, combination_norm, gram
from mergelab.ops.spherical import check_spherical, origin
from mergelab.ops.task_vectors import factors


@merge_method(
    check=check_spherical,
    family="averages",
    paper=MERGEKIT,
    use="several models to be interpolated on the sphere by weights",
)
def multislerp(
    experts: Sequence[Tensor],
    *,
    base: Tensor | None = None,
    weights: SumWeights = None,
    normalize: bool = True,
    eps: Annotated[float, Field(gt=0, lt=1), NotSwept()] = 1e-8,
    task_vectors: bool | None = None,
) -> Tensor:
    """Average the directions of the experts, or of their task vectors, and their norms.

    (Σ ŵ_t ‖x_t‖) · m with m = Σ ŵ_t u_t / ‖Σ ŵ_t u_t‖, u_t = x_t / ‖x_t‖ and ŵ_t = w_t / Σ w. x_t is θ_t, or θ_t − θ0
    with the result added to θ0. Each tensor is one vector. mergekit's documentation (Goddard et al. 2024,
    arXiv:2403.13257) describes an interpolation in the sphere's tangent space at m: the u_t are projected onto it,
    averaged there with the weights, and mapped back by the exponential map. As the projection is orthogonal, that
    average is 0, Σ ŵ_t (u_t − (u_t·m)·m) = ‖Σ ŵ u‖·m − ‖Σ ŵ u‖·m, and maps back to m. (`karcher` is the mean on the
    sphere.) Inner products are accumulated in float64.

    Departures from mergekit: where the directions cancel, the result is the linear mean Σ ŵ_t x_t, for any number of
    experts (mergekit raises an error for more than two, also where all task vectors are 0). ``eps`` is not added to the
    norms.

    Args:
        experts: T tensors of one shape, any float dtype; whole tensors, not parts.
        base: parameter of the pretrained model, of the experts' shape.
        weights: per expert, any sign; default 1.
        normalize: whether ŵ_t = w_t / Σ w; else ŵ_t = w_t, which scales the mean of the norms.
        eps: ‖Σ ŵ_t u_t‖ below which the directions count as cancelling; below 1e-7 they always do.
        task_vectors: whether to average task vectors, not weights; None: when there is a base.

    Returns:
        Tensor of that shape, float32 (float64 for float64 inputs).

    Raises:
        ConfigError: the weights cancel, or there is no base for the task vectors.
    """
    start = origin(base, task_vectors)
    shares = np.array(factors(weights, len(experts), normalize))
    inner = gram(experts, start)
    norms = np.sqrt(inner.diagonal())
    of_units = np.divide(shares, norms, out=np.zeros_like(shares), where=norms > 0)
    resultant = combination_norm(of_units, inner)
    if resultant < max(eps, RESOLUTION):
        return combination(experts, shares, start)
    return combination(experts, of_units * (float(shares @ norms) / resultant), start)
