"""Task arithmetic: add the scaled sum of the task vectors to the base."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mergelab.engine.method import merge_method
from mergelab.engine.parameters import SumWeights
from mergelab.ops.task_vectors import factors, weighted_sum


def coefficients(count: int, weights: Sequence[float] | None, normalize: bool) -> Sequence[float]:
    """Return the factors of the task vectors in the sum."""
    return factors(weights, count, normalize)


@merge_method(
    lambda_=0.3,
    coefficients=coefficients,
    elementwise=True,
    identical_at=None,
    family="task vectors",
    paper="Ilharco et al. 2023, arXiv:2212.04089",
    tuned=("lambda_",),
    use="adding skills to a base, or with a negative weight removing one",
)
def task_arithmetic(vectors: Sequence[Tensor], *, weights: SumWeights = None, normalize: bool = False) -> Tensor:
    """Add the scaled sum of the task vectors to the base.

    θ0 + λ·Σ w_t τ_t with τ_t = θ_t − θ0 (Ilharco et al. 2023, arXiv:2212.04089): a sum, not a mean. A negative weight
    or λ makes the model forget the task. Departure: the weights w_t are an addition; the paper has w_t = 1.

    Args:
        vectors: T task vectors, float32 or float64.
        weights: per expert, any sign; default 1.
        lambda_: scale of the sum; the engine applies it.
        normalize: whether to divide by the sum of the weights, as mergekit can.

    Returns:
        Σ w_t τ_t, of the vectors' shape and dtype.

    Raises:
        ConfigError: the weights cancel and ``normalize`` is set.
    """
    return weighted_sum(vectors, factors(weights, len(vectors), normalize))
