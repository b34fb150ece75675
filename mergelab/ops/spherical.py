"""Check and resolve the parameters of NuSLERP and Multi-SLERP, which average directions."""

from __future__ import annotations

from torch import Tensor

from mergelab.errors import ConfigError
from mergelab.weights.align import AlignedModels


def check_spherical(models: AlignedModels, task_vectors: bool | None) -> None:
    """Raise `ConfigError` for task vectors without a base."""
    if task_vectors and models.base is None:
        raise ConfigError("method.task_vectors=True: needs a base model, and none is given (models.base)")


def origin(base: Tensor | None, task_vectors: bool | None) -> Tensor | None:
    """Return the origin of the directions: the base for task vectors, None for the weights themselves."""
    return None if task_vectors is False else base
