"""What a trial ends with: its objectives' values, or why it has none."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergelab.sweep.estimate import Estimate


@dataclass(frozen=True)
class TrialOutcome:
    """A trial's objectives on ``examples`` selecting examples, estimated where it saw only ``pruned_at`` of them.

    Attributes:
        run: id of the trial's run; None where runs are not tracked.
        estimate: of the objective of a trial that was stopped early.
        best: the number of the complete trial that it is estimated from; None where there was none.
        before: of the examples of a finalist, those that were measured before it was stopped at first.
    """

    values: tuple[float, ...]
    examples: int
    pruned_at: int | None
    merge_seconds: float
    eval_seconds: float
    run: str | None
    estimate: Estimate | None = None
    best: int | None = None
    before: int = 0

    @property
    def measured(self) -> int:
        """The number of examples that were measured."""
        return (self.examples if self.pruned_at is None else self.pruned_at) - self.before

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> TrialOutcome:
        """Read the outcome that a trial wrote to the study's storage."""
        known = stored.get("estimate")
        estimate = None if known is None else Estimate(**known)
        return cls(**{**stored, "values": tuple(stored["values"]), "estimate": estimate})

    def comparison(self, metric: str, best: str) -> str:
        """Say how a trial that was stopped early compares with the ``best`` on the same examples."""
        counts = f"{self.pruned_at} of {self.examples} examples"
        if self.estimate is None or math.isnan(self.estimate.seen):  # of a suite, where a task had no example yet
            return f"{metric} not defined on {counts}"
        if self.estimate.best_seen is None:
            return f"{metric} {self.estimate.seen:.4f} on {counts}, no complete trial to compare with"
        return f"{metric} {self.estimate.seen:.4f} against {self.estimate.best_seen:.4f} of {best} on the same {counts}"


@dataclass(frozen=True)
class TrialFailure:
    """Why a trial has no score."""

    error: str
