"""Averages of the experts' weights themselves: no base, no task vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from torch import Tensor

from mergelab.engine.method import merge_method
from mergelab.engine.parameters import Weights
from mergelab.ops.blocks import working
from mergelab.ops.expert_values import DividedBySum
from mergelab.ops.task_vectors import factors, weighted_sum


@merge_method(elementwise=True, family="averages", paper="Wortsman et al. 2022, arXiv:2203.05482")
def soup(
    experts: Sequence[Tensor],
    *,
    weights: Annotated[Weights, DividedBySum(when="normalize")] = None,
    normalize: bool = True,
) -> Tensor:
    """Average the experts' weights.

    Σ w_t θ_t / Σ w_t (Wortsman et al. 2022, arXiv:2203.05482); with ``normalize=False`` the sum alone. Departure: the
    paper's uniform soup has weights 1.

    Args:
        experts: T tensors of one shape, any float dtype.
        weights: per expert, any sign; default 1.
        normalize: divide by the sum of the weights.

    Returns:
        Tensor of that shape, float32 (float64 for float64 inputs).

    Raises:
        ConfigError: the weights cancel and ``normalize`` is set.
    """
    shares = factors(weights, len(experts))
    total = weighted_sum([working(expert) for expert in experts], shares)
    return total / sum(shares) if normalize else total
