"""How the text miniatures are trained: what to train, on what, in which order."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from mergelab.miniature.train import Progress, finetune_all, fit

if TYPE_CHECKING:
    from mergelab.miniature.train import Finetuning

Loss = Callable[[Any, list[int]], Tensor]


@dataclass(frozen=True)
class Training:
    """A model, the loss of some rows of its text, batches of rows in the order of training, and the peak rate."""

    model: Any
    loss: Loss
    plan: Sequence[list[int]]
    rate: float

    def run(self, progress: Progress) -> None:
        """Train the model where it stands."""

        def gradients(rows: list[int]) -> None:
            self.loss(self.model, rows).backward()  # type: ignore[no-untyped-call]

        self.model.train()
        fit([(list(self.model.parameters()), self.rate)], gradients, self.plan, progress=progress)
        self.model.eval()


def train_all(trainings: Sequence[Training], progress: Progress) -> None:
    """Run ``trainings`` side by side where there are cores."""
    # All that is asked of a fine-tuning there is `run`.
    finetune_all(cast("Sequence[Finetuning]", trainings), progress)


def shuffled(count: int, batch: int, seed: int) -> list[list[int]]:
    """Cut a shuffled pass over ``count`` rows into batches."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return [rows.tolist() for rows in torch.split(order, batch)]


def copy_of(model: Any) -> Any:
    """Return a model of its own with the weights of ``model``."""
    return copy.deepcopy(model)
