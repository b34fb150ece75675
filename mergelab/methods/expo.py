"""ExPO: extrapolate from the base through an aligned model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from torch import Tensor

from mergelab.engine.method import merge_method
from mergelab.engine.parameters import NormalizedWeights
from mergelab.engine.sweep_range import SweepRange
from mergelab.ops.task_vectors import factors, weighted_sum


def coefficients(count: int, weights: Sequence[float] | None, alpha: float) -> Sequence[float]:
    """Return the factors of the task vectors: (1 + α) w_t / Σ w_t."""
    shares = factors(weights, count)
    total = math.fsum(shares)
    return [(1 + alpha) * share / total for share in shares]


@merge_method(
    elementwise=True,
    coefficients=coefficients,
    identical_at={"alpha": 0.0},
    family="task vectors",
    use="an aligned model and the model before its alignment, to go further the same way",
    paper="Zheng et al. 2024, arXiv:2404.16792",
)
def expo(
    vectors: Sequence[Tensor],
    *,
    alpha: Annotated[float, Field(ge=0), SweepRange(0.0, 1.0)] = 0.3,
    weights: NormalizedWeights = None,
) -> Tensor:
    """Extrapolate from the base through the experts' average, beyond it.

    θ_1 + α (θ_1 − θ0) = θ0 + (1 + α)·τ_1, where the base θ0 is a supervised fine-tuned model and the expert θ_1 the
    same model after alignment by preferences (Zheng et al. 2024, arXiv:2404.16792). α = 0 is the expert. The authors
    search α for each model on validation prompts; their code's page says that 0.3 or 0.5 is usually good.

    Departures: with several experts, θ_1 is their weighted average; the paper has one expert. The authors' code has no
    default of α.

    Args:
        vectors: T task vectors, float32 or float64.
        alpha: how far beyond the expert, as a fraction of its distance from the base; at least 0.
        weights: per expert, any sign; default 1.

    Returns:
        (1 + α)·Σ w_t τ_t / Σ w_t, of the vectors' shape and dtype.

    Raises:
        ConfigError: the weights add up to 0.
    """
    shares = factors(weights, len(vectors))
    return weighted_sum(vectors, coefficients(len(vectors), shares, alpha))
