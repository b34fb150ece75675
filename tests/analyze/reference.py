"""The statistics of task vectors as a plain float64 NumPy computation on whole vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mergelab.weights.align import AlignedModels, align
from mergelab.weights.source import DictSource

Array = NDArray[Any]
Models = list[dict[str, torch.Tensor]]

SHAPES = {
    "embeddings.word_embeddings.weight": (50, 12),
    "encoder.layer.0.dense.weight": (12, 12),
    "encoder.layer.0.dense.bias": (12,),
    "encoder.layer.1.dense.weight": (12, 31),
    "encoder.layer.2.dense.weight": (5, 7),
    "encoder.layer.10.dense.weight": (8, 12),
    "norm.weight": (12,),
}


def models(experts: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32) -> Models:
    """A base and experts whose task vectors are correlated, partly 0, and of different size in each tensor."""
    draw = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in SHAPES.items()}
    common = {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
    found = [base]
    for number in range(experts):
        own = {}
        for size, (name, start) in enumerate(base.items(), 1):
            change = common[name] * 0.3 + torch.randn(start.shape, generator=draw)
            change *= torch.rand(start.shape, generator=draw) > 0.2
            own[name] = (start.float() + 0.01 * size * (number + 1) * change).to(dtype)
        found.append(own)
    return found


def aligned(given: Models) -> AlignedModels:
    base, *experts = (DictSource(f"model {index}", each) for index, each in enumerate(given))
    return align(base, experts)


def vectors(given: Models, names: list[str] | None = None) -> Array:
    """(T, n) the task vectors of some tensors, all by default; float32 differences, as the package defines them."""
    base, *experts = given
    names = list(base) if names is None else names
    return np.stack(
        [
            np.concatenate([(own[n].float() - base[n].float()).double().numpy().ravel() for n in names])
            for own in experts
        ]
    )


def thresholds(given: Models, density: float) -> Array:
    """(T,) the magnitude of the last entry that is kept of each whole task vector."""
    magnitudes = np.sort(np.abs(vectors(given)), axis=1)[:, ::-1]
    kept = max(1, int(density * magnitudes.shape[1]))
    found: Array = magnitudes[:, kept - 1]
    return found


def largest(given: Models, density: float, names: list[str] | None = None) -> Array:
    """(T, n) which entries are among the largest."""
    changes = np.abs(vectors(given, names))
    found: Array = (changes >= thresholds(given, density)[:, None]) & (changes > 0)
    return found


def norms(tau: Array) -> Array:
    return np.linalg.norm(tau, axis=1)


def cosines(tau: Array) -> Array:
    unit = tau / norms(tau)[:, None]
    found: Array = unit @ unit.T
    return found


def in_conflict(tau: Array) -> Array:
    found: Array = (tau > 0).any(axis=0) & (tau < 0).any(axis=0)
    return found


def overlaps(kept: Array) -> Array:
    return np.array([[(a & b).sum() / (a | b).sum() for b in kept] for a in kept])
