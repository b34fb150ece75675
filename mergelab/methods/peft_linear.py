"""PEFT's ``linear``: LoRA factors added up, A with A and B with B."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mergelab.adapters.changes import LowRank
from mergelab.adapters.combining import with_roots
from mergelab.engine.method import merge_method
from mergelab.engine.parameters import Weights
from mergelab.ops.task_vectors import factors, weighted_sum


@merge_method(
    order_matters=True,
    identical_at=None,
    family="adapter factors",
    use="LoRA adapters, to reproduce PEFT's linear",
)
def peft_linear(adapters: Sequence[LowRank | None], *, weights: Weights = None) -> tuple[Tensor, Tensor]:
    """Add up LoRA factors, A with A and B with B, as PEFT's ``linear`` does: not linear in the weights.

    A = Σ sign(w_t s_t) √|w_t s_t| A_t and B = Σ √|w_t s_t| B_t, with s_t the adapter's scale; the change is B·A (PEFT
    0.21, ``add_weighted_adapter(combination_type="linear")``). It contains the products B_i A_j of different adapters:
    two equal adapters of weight 0.5 give twice the adapter, where their weighted sum (`task_arithmetic`) is the
    adapter. One adapter of weight w gives w times the adapter. Departure: the scale of a rsLoRA result, which PEFT
    makes √r too large.

    Args:
        adapters: T LoRA adapters of one rank r; None for one that does not adapt the layer, and is left out there.
        weights: per expert, any sign; default 1.

    Returns:
        A (r, inputs) and B (outputs, r), float64.

    Raises:
        ConfigError: ranks differ in a layer, or an expert changes a tensor by more than LoRA.
    """
    return with_roots(adapters, factors(weights, len(adapters)), weighted_sum)
