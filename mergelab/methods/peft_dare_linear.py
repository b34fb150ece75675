"""PEFT's ``dare_linear``: DARE on LoRA factors, A with A and B with B."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mergelab.adapters.changes import LowRank
from mergelab.adapters.combining import dropped, with_roots
from mergelab.engine.method import merge_method
from mergelab.engine.parameters import Density, Weights
from mergelab.ops.site import Site
from mergelab.ops.task_vectors import factors, weighted_sum


@merge_method(
    order_matters=True,
    identical_at=None,
    family="adapter factors",
    paper="Yu et al. 2024, arXiv:2311.03099",
    use="LoRA adapters, to reproduce PEFT's dare_linear",
)
def peft_dare_linear(
    adapters: Sequence[LowRank | None], *, site: Site, weights: Weights = None, density: Density = 0.5
) -> tuple[Tensor, Tensor]:
    """Add up a random part of LoRA factors as PEFT's ``dare_linear`` does: not linear in the weights.

    As `peft_linear`, after each entry of each A and each B is kept with probability ``density`` and divided by it, or
    set to zero (PEFT 0.21, ``add_weighted_adapter(combination_type="dare_linear")``; DARE: Yu et al. 2024,
    arXiv:2311.03099). Masks are drawn as those of `dare`, and equal PEFT's in distribution. As in PEFT, one adapter
    alone loses nothing. `dare` drops entries of the changes themselves. Departure: as for `peft_linear`.

    Args:
        adapters: T LoRA adapters of one rank r; None for one that does not adapt the layer, and is left out there.
        site: keys the masks.
        weights: per expert, any sign; default 1.
        density: probability of keeping an entry.

    Returns:
        A (r, inputs) and B (outputs, r), float64.

    Raises:
        ConfigError: ranks differ in a layer, or an expert changes a tensor by more than LoRA.
    """
    return with_roots(dropped(adapters, site.keys, density), factors(weights, len(adapters)), weighted_sum)
