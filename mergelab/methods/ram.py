"""RAM (Reinforced Agent Merging): keep entries that one task changed, average entries that several changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from mergelab.engine.method import merge_method
from mergelab.ops.task_vectors import weighted_sum

NotNegative = Annotated[float, Field(ge=0)]


def changed(vectors: Sequence[Tensor], epsilon: float) -> tuple[list[Tensor], Tensor]:
    """Set entries of magnitude up to ``epsilon`` to zero; return the vectors, and how many are nonzero per entry."""
    thresholded = [torch.nn.functional.hardshrink(vector, epsilon) for vector in vectors]
    count = torch.zeros_like(vectors[0])
    for vector in thresholded:
        count += vector != 0
    return thresholded, count


@merge_method(
    elementwise=True,
    identical_at={"epsilon": 0.0},
    family="task vectors",
    paper="Yuan et al. 2026, arXiv:2601.13572",
    use="agents trained by reinforcement learning, whose changes are sparse",
)
def ram(vectors: Sequence[Tensor], *, epsilon: NotNegative = 1e-5) -> Tensor:
    """Keep entries that only one expert changed, and average entries that several changed.

    θ0 + τ_m, where an entry of τ_m is the mean of the τ_t with |τ_t| > ε, or 0 when there is none (Yuan et al. 2026,
    arXiv:2601.13572, for agents trained by reinforcement learning, whose task vectors are sparse). Departures: none
    known.

    Args:
        vectors: T task vectors, float32 or float64.
        epsilon: magnitude up to which an entry counts as unchanged.

    Returns:
        τ_m, of the vectors' shape and dtype.
    """
    entries, count = changed(vectors, epsilon)
    return weighted_sum(entries, (1.0,) * len(entries)).div_(count.clamp_min_(1))
