"""Methods that draw one model towards another: which of two models is which."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mergelab.errors import ConfigError
from mergelab.weights.align import AlignedModels


def check_pair(models: AlignedModels) -> None:
    """Raise `ConfigError` for one expert without a base."""
    if len(models.experts) == 1 and models.base is None:
        raise ConfigError("models.experts: one alone is given; two models are merged: two experts, or a base and one")


def pair_of(base: Tensor | None, experts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the model that is drawn and the one it is drawn towards."""
    if len(experts) == 2:
        return experts[0], experts[1]
    assert base is not None
    return base, experts[0]
