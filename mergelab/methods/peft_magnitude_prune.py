"""PEFT's ``magnitude_prune``: the largest entries of LoRA factors added up, A with A and B with B."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mergelab.adapters.changes import LowRank
from mergelab.adapters.combining import pruned, with_roots
from mergelab.engine.method import merge_method
from mergelab.engine.parameters import Density, Weights
from mergelab.ops.task_vectors import factors, weighted_sum


@merge_method(
    order_matters=True,
    identical_at=None,
    family="adapter factors",
    use="LoRA adapters, to reproduce PEFT's magnitude_prune",
)
def peft_magnitude_prune(
    adapters: Sequence[LowRank | None], *, weights: Weights = None, density: Density = 0.5
) -> tuple[Tensor, Tensor]:
    """Add up the largest entries of LoRA factors as PEFT's ``magnitude_prune`` does: not linear in the weights.

    As `peft_linear`, after all but the int(density · n) entries of largest magnitude of each A and of each B are set to
    zero (PEFT 0.21, ``add_weighted_adapter(combination_type="magnitude_prune")``). As in PEFT, one adapter alone is not
    pruned. `breadcrumbs` with ``gamma=0`` and ``scope=tensor`` prunes the changes themselves. Departure: as for
    `peft_linear`.

    Args:
        adapters: T LoRA adapters of one rank r; None for one that does not adapt the layer, and is left out there.
        weights: per expert, any sign; default 1.
        density: fraction of the entries of each factor that are kept.

    Returns:
        A (r, inputs) and B (outputs, r), float64.

    Raises:
        ConfigError: ranks differ in a layer, or an expert changes a tensor by more than LoRA.
    """
    return with_roots(pruned(adapters, density), factors(weights, len(adapters)), weighted_sum)
