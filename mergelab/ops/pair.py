"""Choose the two models of methods that move one model towards another: NearSwap and Arcee Fusion."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mergelab.errors import ConfigError
from mergelab.weights.align import AlignedModels


def check_pair(models: AlignedModels) -> None:
    """Raise `ConfigError` when there is only one expert and no base."""
    if len(models.experts) == 1 and models.base is None:
        raise ConfigError("models.experts: one alone is given; two models are merged: two experts, or a base and one")


def pair_of(base: Tensor | None, experts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the model that is moved and the model that it is moved towards.

    These are the two experts in their order, or the base and the only expert.
    """
    if len(experts) == 2:
        return experts[0], experts[1]
    assert base is not None
    return base, experts[0]
