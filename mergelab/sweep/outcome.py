"""What a trial ends with: its objectives' values, or why it has none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TrialOutcome:
    """A trial's objectives on ``examples`` selecting examples, or on ``pruned_at`` of them.

    Attributes:
        run: id of the trial's run; None where runs are not tracked.
    """

    values: tuple[float, ...]
    examples: int
    pruned_at: int | None
    merge_seconds: float
    eval_seconds: float
    run: str | None

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> TrialOutcome:
        """Read the outcome that a trial wrote to the study's storage."""
        return cls(**{**stored, "values": tuple(stored["values"])})


@dataclass(frozen=True)
class TrialFailure:
    """Why a trial has no score."""

    error: str
