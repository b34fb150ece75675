"""What a model's tensor is, where that is known: a tensor of its base and low-rank changes, or the base's alone."""

from __future__ import annotations

from dataclasses import dataclass

from mergelab.adapters.changes import LowRank
from mergelab.adapters.checkpoint import AdaptedCheckpoint
from mergelab.adapters.held import HeldModel
from mergelab.weights.checkpoint import Checkpoint
from mergelab.weights.source import TensorSource, traced


@dataclass(frozen=True, eq=False)
class Delta:
    """A tensor as the sum of one that is read and low-rank changes.

    Attributes:
        source, key: where the tensor is read that is changed.
        changes: what is added to it; empty where nothing is.
    """

    source: TensorSource
    key: str
    changes: tuple[LowRank, ...] = ()

    def is_on(self, other: Delta) -> bool:
        """Return whether both change the same tensor."""
        if self.source is other.source:
            return self.key == other.key
        both = isinstance(self.source, Checkpoint) and isinstance(other.source, Checkpoint)
        return both and self.key == other.key and self.source.files == other.source.files  # type: ignore[attr-defined]


def delta_of(source: TensorSource, name: str) -> Delta:
    """Return what a model's tensor is; a `Delta` without changes of the model itself where nothing more is known."""
    source, key = traced(source, name)
    if isinstance(source, AdaptedCheckpoint | HeldModel):
        changes = tuple(change for change in source.changes(key) if isinstance(change, LowRank))
        if changes and len(changes) == len(source.changes(key)):
            return Delta(*traced(*source.stored(key)), changes)
    return Delta(source, key)
