"""Sums and selections of whole task vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergelab.methods.blocks import working
from mergelab.methods.parameters import Lambda, Weights
from mergelab.methods.registry import merge_method
from mergelab.methods.task_vectors import factors, task_vectors, weighted_sum


@merge_method(
    needs_base=True,
    elementwise=True,
    identical_at=None,
    family="task vectors",
    paper="Ilharco et al. 2023, arXiv:2212.04089",
)
def task_arithmetic(
    base: Tensor, experts: Sequence[Tensor], *, lambda_: Lambda = 0.3, weights: Weights = None
) -> Tensor:
    """Add the scaled sum of the task vectors to the base.

    θ0 + λ·Σ w_t τ_t with τ_t = θ_t − θ0 (Ilharco et al. 2023, arXiv:2212.04089): a sum, not a mean. A negative weight
    or λ negates, which makes the model forget. Departure: the weights w_t are an addition; the paper's are 1.

    Args:
        base: parameter of the pretrained model or a part of it, any float dtype.
        experts: T tensors of the base's shape.
        lambda_: scale of the summed task vectors.
        weights: per expert, any sign; default 1.

    Returns:
        Tensor of the base's shape, float32 (float64 for float64 inputs).
    """
    return working(base) + lambda_ * weighted_sum(task_vectors(base, experts), factors(weights, len(experts)))


@merge_method(
    needs_base=True,
    elementwise=True,
    order_matters=True,
    identical_at={"lambda": 1.0},
    family="task vectors",
    paper="Marczak et al. 2024, arXiv:2407.06322",
)
def magmax(base: Tensor, experts: Sequence[Tensor], *, lambda_: Lambda = 0.5) -> Tensor:
    """Take, at each entry, the task vector of largest magnitude.

    θ0 + λ·τ with τ = the τ_t of largest |τ_t| (Marczak et al. 2024, arXiv:2407.06322). Entries of equal magnitude go to
    the later expert, so the experts' order matters where two are exactly equal. Departures: none.

    Args:
        base: parameter of the pretrained model or a part of it, any float dtype.
        experts: T tensors of the base's shape.
        lambda_: scale of the chosen entries.

    Returns:
        Tensor of the base's shape, float32 (float64 for float64 inputs).
    """
    first, *others = task_vectors(base, experts)
    chosen = first
    for vector in others:
        chosen = torch.where(vector.abs() >= chosen.abs(), vector, chosen)
    return working(base) + lambda_ * chosen
