"""Pruning for futility: an Optuna pruner that knows how many examples are still to come."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from optuna.pruners import BasePruner
from optuna.study import StudyDirection
from optuna.trial import TrialState

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial

Array = np.ndarray[Any, Any]


class Futility(BasePruner):
    """Prunes a trial that will hardly end better than the best one.

    A trial's intermediate values are the scores of single examples, each under its example's number; their order is
    random, so that the scores seen predict those to come. With k differences d between the scores of the trial and of
    the best one on the same examples, the r remaining differences add up to about N(r·mean(d), r·var(d)·(1 + r/k)):
    stopping for futility by predictive probability (Spiegelhalter et al. 1986, doi:10.1016/0197-2456(86)90003-6).
    A test of whether two models differ, as Wilcoxon's, does not know that the examples come to an end: a trial that is
    three of them behind, with two to go, is none to it.

    Args:
        probability: a trial is pruned whose probability to end better than the best one is less than this.
        n_startup_steps: number of examples before which no trial is pruned.

    Raises:
        ValueError: the probability is not between 0 and 0.5.
    """

    by_example = True
    checks = None

    def __init__(self, probability: float = 0.1, n_startup_steps: int = 32) -> None:
        if not 0 < probability < 0.5:
            raise ValueError(f"probability={probability}: must be between 0 and 0.5")
        self.probability, self.n_startup_steps = probability, n_startup_steps

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Compare the trial with the study's best one, the earliest of equals, on the examples that both have."""
        sign = -1.0 if study.direction == StudyDirection.MINIMIZE else 1.0
        complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        best = max(complete, key=lambda one: (sign * one.values[0], -one.number), default=None)
        if best is None:
            return False
        (examples, scores), (best_examples, best_scores) = _reported(trial), _reported(best)
        common, own, others = np.intersect1d(examples, best_examples, assume_unique=True, return_indices=True)
        return self.is_futile(sign * (scores[own] - best_scores[others]), len(best_examples) - len(common))

    def is_futile(self, differences: Array, remaining: int) -> bool:
        """Return whether a trial with these differences (k,) to the best one hardly ends better.

        Args:
            differences: the trial's score minus the best trial's, example by example.
            remaining: number of examples without a score so far.
        """
        if len(differences) < max(self.n_startup_steps, 2) or not differences.any():
            return False
        # Sums of 0-or-1 scores are this far apart: ending better means ending by a whole step better.
        step = float(np.abs(differences[differences != 0]).min())
        expected = float(differences.sum()) + remaining * float(differences.mean())
        spread = math.sqrt(remaining * float(differences.var(ddof=1)) * (1 + remaining / len(differences)))
        if not spread:
            return expected <= 0
        return self.is_behind(expected - step / 2, spread)

    def is_behind(self, difference: float, error: float) -> bool:
        """Return whether a trial that is better by ``difference``, give or take a standard error, hardly is better."""
        if not error:
            return difference <= 0
        return 0.5 * math.erfc(-difference / error / math.sqrt(2)) < self.probability


def _reported(trial: FrozenTrial) -> tuple[Array, Array]:
    """Return the numbers (k,) and scores (k,) of the examples that a trial has reported."""
    values = trial.intermediate_values
    return np.fromiter(values.keys(), np.int64, len(values)), np.fromiter(values.values(), np.float64, len(values))
