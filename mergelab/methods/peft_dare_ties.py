"""PEFT's ``dare_ties``: DARE, then TIES' election, on LoRA factors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from mergelab.adapters.changes import LowRank
from mergelab.adapters.combining import dropped, mean_of_agreeing, with_roots
from mergelab.engine.method import merge_method
from mergelab.engine.parameters import Density, Weights
from mergelab.ops.site import Site
from mergelab.ops.task_vectors import MajoritySign, factors


@merge_method(
    order_matters=True,
    identical_at=None,
    family="adapter factors",
    paper="Yu et al. 2024, arXiv:2311.03099",
    use="LoRA adapters, to reproduce PEFT's dare_ties",
)
def peft_dare_ties(
    adapters: Sequence[LowRank | None],
    *,
    site: Site,
    weights: Weights = None,
    density: Density = 0.5,
    majority_sign: MajoritySign = "total",
) -> tuple[Tensor, Tensor]:
    """Drop a random part of LoRA factors, then elect signs, as PEFT's ``dare_ties`` does: not linear in the weights.

    As `peft_ties`, with the entries kept that `peft_dare_linear` keeps, in the place of the largest (PEFT 0.21,
    ``add_weighted_adapter(combination_type="dare_ties")``; DARE: Yu et al. 2024, arXiv:2311.03099). The change is B·A.
    `dare_ties` does this with the changes themselves. Departure: as for `peft_linear`.

    Args:
        adapters: T LoRA adapters of one rank r; None for one that does not adapt the layer, and is left out there.
        site: keys the masks.
        weights: per expert, any sign; default 1.
        density: probability of keeping an entry.
        majority_sign: whether the sign of larger total magnitude is elected, or the one that more experts have.

    Returns:
        A (r, inputs) and B (outputs, r), float64.

    Raises:
        ConfigError: ranks differ in a layer, or an expert changes a tensor by more than LoRA.
    """
    combine = partial(mean_of_agreeing, majority_sign=majority_sign)
    return with_roots(dropped(adapters, site.keys, density), factors(weights, len(adapters)), combine)
