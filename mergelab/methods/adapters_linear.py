"""Adapters' ``linear``: the weighted mean of A and that of B."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from torch import Tensor

from mergelab.adapters.changes import LowRank
from mergelab.adapters.combining import as_stored, divided
from mergelab.engine.adapter_factors import check_one_configuration
from mergelab.engine.method import merge_method
from mergelab.engine.parameters import Weights
from mergelab.ops.expert_values import DividedBySum
from mergelab.ops.task_vectors import factors


@merge_method(
    check=check_one_configuration,
    order_matters=True,
    identical_at=None,
    family="adapter factors",
    use="adapters of the Adapters library, to reproduce its own averaging of factors",
)
def adapters_linear(
    adapters: Sequence[LowRank | None],
    *,
    weights: Annotated[Weights, DividedBySum(when="normalize")] = None,
    normalize: bool = True,
) -> tuple[Tensor, Tensor]:
    """Average LoRA factors, A with A and B with B, as Adapters' ``linear`` does: not linear in the weights.

    A = Σ w_t A_t and B = Σ w_t B_t, with the w_t divided by their sum; the change is s·B·A, with s the adapters' scale
    (Adapters 1.3, ``average_adapter(combine_strategy="linear")``). It contains the products B_i A_j of different
    adapters, and each adapter w_t² times: with ``normalize=False``, weight 0.5 gives a quarter of one adapter, and
    weight −1 gives the adapter itself, which `adapters_linear_negate_b` negates. Departure: with ``normalize=False``
    and no weights each is 1; Adapters takes 1/T.

    Args:
        adapters: T LoRA adapters of one rank r and one scale; all of them adapt the layer.
        weights: per expert, any sign; default 1.
        normalize: whether to divide the weights by their sum.

    Returns:
        A (r, inputs) and B (outputs, r), float64; s is in B.

    Raises:
        ConfigError: ranks, scales or adapted layers differ; an expert changes a tensor by more than LoRA; the weights
            cancel and ``normalize`` is set.
    """
    shares = divided(factors(weights, len(adapters)), normalize=normalize)
    return as_stored(adapters, shares, shares)
