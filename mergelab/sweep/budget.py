"""What all trials of a sweep may take, in examples or in seconds."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from mergelab.errors import SweepError
from mergelab.sweep.outcome import TrialOutcome


@dataclass(frozen=True)
class Budget:
    """A bound of what all trials take; None: there is none.

    Attributes:
        examples: how many are measured, those of finalists included; never exceeded.
        seconds: of merging and measuring; no trial begins after them.
    """

    examples: int | None = None
    seconds: float | None = None

    def left(self, outcomes: Iterable[TrialOutcome], reserved: int = 0) -> int | None:
        """Return how many more trials may begin, each of which may be measured whole; None: any number.

        Args:
            outcomes: of the trials so far, and of those that were measured whole later.
            reserved: whole trials to set apart.
        """
        known = list(outcomes)
        if self.seconds is not None:
            return None if sum(one.merge_seconds + one.eval_seconds for one in known) < self.seconds else 0
        if self.examples is None or not known:
            return None if self.examples is None else 1
        spent = sum(one.measured for one in known)
        return max((self.examples - spent) // known[0].examples - reserved, 0)

    def check(self, count: int) -> None:
        """Check that one trial can be measured on all ``count`` selecting examples.

        Raises:
            SweepError: it cannot.
        """
        if self.examples is not None and self.examples < count:
            raise SweepError(
                f"sweep.budget={self.examples}: a whole trial has {count} selecting examples; at least these are needed"
            )


def budget_of(setting: int | str | None) -> Budget:
    """Read ``sweep.budget``: ``20000`` examples, or ``600s``.

    Raises:
        SweepError: it is neither, or nothing.
    """
    if setting is None:
        return Budget()
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(s?)", str(setting).strip())
    if found is None or float(found[1]) <= 0 or (not found[2] and "." in found[1]):
        raise SweepError(f"sweep.budget={setting}: must be a number of examples (20000), or of seconds (600s)")
    return Budget(seconds=float(found[1])) if found[2] else Budget(examples=int(found[1]))
