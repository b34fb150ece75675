"""Means of directions: NuSLERP, Multi-SLERP and the Karcher mean."""

from __future__ import annotations

from torch import Tensor

from mergelab.errors import ConfigError
from mergelab.weights.align import AlignedModels

MERGEKIT = "mergekit: Goddard et al. 2024, arXiv:2403.13257"


def check_spherical(models: AlignedModels, task_vectors: bool | None) -> None:
    """Raise `ConfigError` for task vectors without a base."""
    if task_vectors and models.base is None:
        raise ConfigError("method.task_vectors=True: needs a base model, and none is given (models.base)")


def origin(base: Tensor | None, task_vectors: bool | None) -> Tensor | None:
    """Return what the directions start from: the base, or None for the weights themselves."""
    return None if task_vectors is False else base
