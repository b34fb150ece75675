"""What the authors' own code made of small models: values that it printed once, and the models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mergelab.weights.align import AlignedModels
from tests.methods.toy import aligned

RECORDED = json.loads((Path(__file__).parent / "authors.json").read_text(encoding="utf-8"))
SHAPES = {
    "layer.0.up.weight": (11, 6),
    "layer.0.down.weight": (6, 11),
    "layer.1.up.weight": (8, 8),
    "layer.1.down.weight": (7, 13),
}


def matrices(count: int = 3, size: float = 0.05) -> list[dict[str, Tensor]]:
    """The base's matrices, then those of the experts, float64."""
    made: list[dict[str, Tensor]] = []
    for model in range(count + 1):
        tensors = {}
        for i, (name, shape) in enumerate(SHAPES.items()):
            entries = np.arange(1, 1 + shape[0] * shape[1], dtype=np.float64)
            base = np.sin(0.37 * entries**2 + i)
            change = np.sin(0.53 * entries**2 + 3 * model + i) + 0.4 * np.cos(1.7 * entries) if model else 0 * entries
            tensors[name] = torch.from_numpy((base + size * change).reshape(shape))
        made.append(tensors)
    return made


def authors_models(count: int = 3, size: float = 0.05) -> AlignedModels:
    """The models of the recorded values."""
    base, *experts = matrices(count, size)
    return aligned(base, experts)


def recorded(name: str) -> dict[str, np.ndarray]:
    """The merged tensors that the authors' code printed, by name."""
    return {key: np.array(values).reshape(SHAPES[key]) for key, values in RECORDED[name]["tensors"].items()}


def source(name: str) -> str:
    """The project and its version, as the parity page has it."""
    return f"{RECORDED[name]['project']} {RECORDED[name]['version']}, recorded values"
