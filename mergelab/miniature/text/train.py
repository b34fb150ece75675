"""Train the text miniatures: models, losses, and the order of their batches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergelab.miniature.train import StepProgress, fit

Loss = Callable[[Any, list[int]], Tensor]


@dataclass(frozen=True)
class Training:
    """A model, the loss on some rows of its text, the batches of rows in order, and the peak learning rate."""

    model: Any
    loss: Loss
    plan: Sequence[list[int]]
    rate: float

    def run(self, progress: StepProgress) -> None:
        """Train the model in place."""

        def gradients(rows: list[int]) -> None:
            self.loss(self.model, rows).backward()  # type: ignore[no-untyped-call]

        self.model.train()
        fit([(list(self.model.parameters()), self.rate)], gradients, self.plan, progress=progress)
        self.model.eval()


def shuffled_batches(count: int, batch: int, seed: int) -> list[list[int]]:
    """Divide a shuffled pass over ``count`` rows into batches."""
    permutation = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return [rows.tolist() for rows in torch.split(permutation, batch)]


def copy_of(model: Any) -> Any:
    """Return a copy of ``model``."""
    return copy.deepcopy(model)
