"""PEFT's ``ties``: TIES on LoRA factors, A with A and B with B."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from mergelab.adapters.changes import LowRank
from mergelab.adapters.combining import mean_of_agreeing, pruned, with_roots
from mergelab.engine.method import merge_method
from mergelab.engine.parameters import Density, Weights
from mergelab.ops.task_vectors import MajoritySign, factors


@merge_method(
    order_matters=True,
    identical_at=None,
    family="adapter factors",
    paper="Yadav et al. 2023, arXiv:2306.01708",
    use="LoRA adapters, to reproduce PEFT's ties",
)
def peft_ties(
    adapters: Sequence[LowRank | None],
    *,
    weights: Weights = None,
    density: Density = 0.2,
    majority_sign: MajoritySign = "total",
) -> tuple[Tensor, Tensor]:
    """Merge LoRA factors by TIES, A with A and B with B, as PEFT's ``ties`` does: not linear in the weights.

    In A and in B of each layer: keep the int(density · n) entries of largest magnitude, elect a sign at each entry, add
    up the entries that have it with the weights of `peft_linear`, and divide by their number (PEFT 0.21,
    ``add_weighted_adapter(combination_type="ties")``; TIES: Yadav et al. 2023, arXiv:2306.01708). The change is B·A.
    Weights have no vote; where votes cancel the sign is +. As in PEFT, one adapter alone is not pruned. `ties` merges
    the changes themselves. Departure: as for `peft_linear`.

    Args:
        adapters: T LoRA adapters of one rank r; None for one that does not adapt the layer, and is left out there.
        weights: per expert, any sign; default 1.
        density: fraction of the entries of each factor that are kept.
        majority_sign: whether the sign of larger total magnitude is elected, or the one that more experts have.

    Returns:
        A (r, inputs) and B (outputs, r), float64.

    Raises:
        ConfigError: ranks differ in a layer, or an expert changes a tensor by more than LoRA.
    """
    combine = partial(mean_of_agreeing, majority_sign=majority_sign)
    return with_roots(pruned(adapters, density), factors(weights, len(adapters)), combine)
