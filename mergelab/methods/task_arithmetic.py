"""Sums and selections of whole task vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergelab.engine.parameters import Weights
from mergelab.engine.registry import merge_method
from mergelab.ops.task_vectors import factors, weighted_sum


@merge_method(
    lambda_=0.3,
    elementwise=True,
    identical_at=None,
    family="task vectors",
    paper="Ilharco et al. 2023, arXiv:2212.04089",
)
def task_arithmetic(vectors: Sequence[Tensor], *, weights: Weights = None) -> Tensor:
    """Add the scaled sum of the task vectors to the base.

    θ0 + λ·Σ w_t τ_t with τ_t = θ_t − θ0 (Ilharco et al. 2023, arXiv:2212.04089): a sum, not a mean. A negative weight
    or λ negates, which makes the model forget. Departure: the weights w_t are an addition; the paper's are 1.

    Args:
        vectors: T task vectors, float32 or float64.
        weights: per expert, any sign; default 1.
        lambda_: scale of the sum; the engine applies it.

    Returns:
        Σ w_t τ_t, of the vectors' shape and dtype.
    """
    return weighted_sum(vectors, factors(weights, len(vectors)))


@merge_method(
    lambda_=0.5,
    elementwise=True,
    order_matters=True,
    identical_at={"lambda": 1.0},
    family="task vectors",
    paper="Marczak et al. 2024, arXiv:2407.06322",
)
def magmax(vectors: Sequence[Tensor]) -> Tensor:
    """Take, at each entry, the task vector of largest magnitude.

    θ0 + λ·τ with τ = the τ_t of largest |τ_t| (Marczak et al. 2024, arXiv:2407.06322). Entries of equal magnitude go to
    the later expert, so the experts' order matters where two are exactly equal. Departures: none.

    Args:
        vectors: T task vectors, float32 or float64.
        lambda_: scale of the chosen entries; the engine applies it.

    Returns:
        The chosen entries, of the vectors' shape and dtype.
    """
    first, *others = vectors
    chosen = first
    for vector in others:
        chosen = torch.where(vector.abs() >= chosen.abs(), vector, chosen)
    return chosen
