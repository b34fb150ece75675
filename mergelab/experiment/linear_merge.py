"""Merges that are the base plus a weighted sum of the experts' differences from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from mergelab.adapters.checkpoint import AdaptedCheckpoint
from mergelab.weights.align import AlignedModels
from mergelab.weights.source import DictSource

if TYPE_CHECKING:
    from mergelab.experiment.merging import Merging

LINEAR = ("soup", "task_arithmetic")  # methods that add up the models, or their differences from the base


def weights_by_tensor(merging: Merging) -> Mapping[str, Sequence[float]] | None:
    """Return each tensor's weights of the experts, where the merge is the base plus a sum of adapters' differences.

    The method itself is asked: what it makes of experts that differ from a base of zeros in one entry each, and of
    models that are equal.

    Returns:
        By name, one weight per expert; None where the merge is another, or an expert is no adapter.
    """
    opened = merging.session.opened
    if merging.method.name not in LINEAR or not all(isinstance(e.tensors, AdaptedCheckpoint) for e in opened.experts):
        return None
    count = len(opened.experts)
    units = torch.cat([torch.eye(count), torch.ones(count, 1)], dim=1).double()
    start = torch.zeros(count + 1, dtype=torch.float64)
    start[-1] = 1
    asked = AlignedModels(
        base=DictSource("base", {name: start.clone() for name in opened.aligned.names}),
        experts=tuple(
            DictSource(expert.name, {name: unit.clone() for name in opened.aligned.names})
            for expert, unit in zip(opened.aligned.experts, units, strict=True)
        ),
        names=opened.aligned.names,
        integers=(),
        aliases={},
        backbone=opened.aligned.backbone,
    )
    found = {name: made.tolist() for name, made in merging.on(asked)}
    if not all(abs(made[-1] - 1) < 1e-9 for made in found.values()):
        return None
    return {name: made[:-1] for name, made in found.items()}
