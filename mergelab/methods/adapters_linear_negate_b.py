"""Adapters' ``lora_linear_only_negate_b``: weighted means of A and B, the weights' signs in B alone."""

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
    paper="Zhang et al. 2023, arXiv:2306.14870",
    use="adapters of the Adapters library that are to be subtracted",
)
def adapters_linear_negate_b(
    adapters: Sequence[LowRank | None],
    *,
    weights: Annotated[Weights, DividedBySum(when="normalize")] = None,
    normalize: bool = True,
) -> tuple[Tensor, Tensor]:
    """Average LoRA factors with the weights' signs in B alone, as Adapters does: not linear in the weights.

    A = Σ |w_t| A_t and B = Σ w_t B_t, with the w_t divided by their sum; the change is s·B·A, with s the adapters'
    scale (Adapters 1.3, ``average_adapter(combine_strategy="lora_linear_only_negate_b")``, after Zhang et al. 2023,
    arXiv:2306.14870). With ``normalize=False`` one adapter of weight w gives w·|w| times the adapter: −1 negates it,
    0.5 gives a quarter. Departure: as for `adapters_linear`.

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
    return as_stored(adapters, [abs(share) for share in shares], shares)
