"""Estimates a trial's metric on all selecting examples, from its scores on some and from the models measured before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from mergelab.sweep.adaptive.policy import Field
from mergelab.sweep.adaptive.prediction import Prior, Seen, Trials, condition, trials_of
from mergelab.sweep.targets import Target, scores_for, target_of
from mergelab.tasks.metric import get_metric

if TYPE_CHECKING:
    from mergelab.sweep.adaptive.history import MeasuredTrial
    from mergelab.tasks.spec import TaskSpec

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Estimator:
    """What estimates are made from: one metric of the trials so far, one of them whole at least.

    Attributes:
        spec, metric: what is estimated.
        history: the trials so far.
        models: (n, c) by metric, the statistics of the base and of each expert that was measured on the task.
        members: (m,) positions of the examples that the metric is of; None: all.
    """

    spec: TaskSpec
    metric: str
    history: Sequence[MeasuredTrial]
    models: Sequence[Mapping[str, Array]] = ()
    members: Array | None = None

    @cached_property
    def trials(self) -> Trials:
        """What the trials so far tell of others."""
        models = [scores_for(self.spec, self.metric, rows[self.metric]) for rows in self.models]
        seen = [self.seen(one) for one in self.history]
        points = np.stack([one.point for one in self.history])
        return trials_of(seen, np.stack(models) if models else np.empty((0, self.history[0].count)), points)

    @cached_property
    def target(self) -> Target:
        """How the metric follows from the examples' scores."""
        one = next(one for one in self.history if one.whole)
        return target_of(self.spec, self.metric, one.rows(self.metric), self.members)

    def scores_of(self, one: MeasuredTrial) -> Array:
        """Return a whole trial's scores (n,)."""
        return scores_for(self.spec, self.metric, one.rows(self.metric))

    def seen(self, one: MeasuredTrial) -> Seen:
        """Return the examples that a trial was measured on, and its scores on them."""
        if one.whole:
            return Seen(np.arange(one.count), self.scores_of(one))
        return Seen(one.positions, scores_for(self.spec, self.metric, one.statistics[self.metric]))

    @property
    def field(self) -> Field:
        """The trials that the next one is compared with; a right answer more is the least step of answers."""
        best = best_of(self.history, self.metric)
        assert best is not None
        scores = self.scores_of(best)
        step = 1 / len(scores) if np.isin(scores, (0, 1)).all() else 0.0
        return Field(best.value, [one.value for one in self.history], step, sign_of(self.metric))

    def estimate(self, prior: Prior, seen: Seen) -> tuple[float, float]:
        """Return the metric of a trial that was measured on some examples, and its standard error."""
        return self.target.with_error(*condition(prior, seen).sums(self.target.groups))

    def estimate_again(self, one: MeasuredTrial) -> tuple[float, float]:
        """Return the same of a trial of the history, from what all others tell now."""
        index = next(index for index, other in enumerate(self.history) if other is one)
        return self.estimate(self.trials.prior_without(index), self.seen(one))


def sign_of(metric: str) -> int:
    """Return -1 for a metric that is better when it is less, else 1."""
    return -1 if get_metric(metric).direction == "minimize" else 1


def best_of(history: Sequence[MeasuredTrial], metric: str) -> MeasuredTrial | None:
    """Return the best of the whole trials, the earliest of equals."""
    whole = [one for one in history if one.whole]
    return max(whole, key=lambda one: (sign_of(metric) * one.value, -one.number), default=None)
