"""Model soup: the weighted average of the experts' weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from mergelab.engine.method import merge_method
from mergelab.engine.parameters import SumWeights
from mergelab.ops.blocks import working
from mergelab.ops.task_vectors import factors, weighted_sum

ROUNDING = 1e-9  # of a sum of weights that were given in decimals


def coefficients(count: int, weights: Sequence[float] | None, normalize: bool) -> Sequence[float] | None:
    """Return the factors of the task vectors, whatever the base is; None where the weights do not add up to 1."""
    shares = factors(weights, count)
    total = math.fsum(shares)
    if normalize:
        return [share / total for share in shares]
    return shares if abs(total - 1) < ROUNDING else None


@merge_method(
    elementwise=True,
    coefficients=coefficients,
    family="averages",
    paper="Wortsman et al. 2022, arXiv:2203.05482",
    use="several runs of one task from one base: the first thing to try",
)
def soup(
    experts: Sequence[Tensor],
    *,
    weights: SumWeights = None,
    normalize: bool = True,
) -> Tensor:
    """Average the experts' weights.

    Σ w_t θ_t / Σ w_t (Wortsman et al. 2022, arXiv:2203.05482); with ``normalize=False``, Σ w_t θ_t. Departure: the
    weights w_t are an addition; the paper's uniform soup has w_t = 1.

    Args:
        experts: T tensors of one shape, any float dtype.
        weights: per expert, any sign; default 1.
        normalize: whether to divide by the sum of the weights.

    Returns:
        Tensor of that shape, float32 (float64 for float64 inputs).

    Raises:
        ConfigError: the weights cancel and ``normalize`` is set.
    """
    shares = factors(weights, len(experts))
    total = weighted_sum([working(expert) for expert in experts], shares)
    return total / sum(shares) if normalize else total
