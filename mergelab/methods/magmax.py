"""MagMax: select the task vector of largest magnitude at each entry."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergelab.engine.method import merge_method


@merge_method(
    lambda_=0.5,
    elementwise=True,
    order_matters=True,
    identical_at={"lambda": 1.0},
    family="task vectors",
    paper="Marczak et al. 2024, arXiv:2407.06322",
    use="experts fine-tuned in sequence, or whose large changes lie apart",
)
def magmax(vectors: Sequence[Tensor]) -> Tensor:
    """Select, at each entry, the task vector of largest magnitude.

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
