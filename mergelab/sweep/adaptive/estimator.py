"""Estimates a trial's objective on all selecting examples, from its scores on some and from the models measured before.

The examples of an objective are columns: those of its first task, then those of the next. Each has one score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from mergelab.sweep.adaptive.prediction import Posterior, Prior, Seen, Trials, condition, trials_of
from mergelab.sweep.targets import Target, family, is_linearised, linear_scores, mean_of, scores_for, target_of
from mergelab.tasks.metric import get_metric

if TYPE_CHECKING:
    from mergelab.sweep.adaptive.history import MeasuredTask, MeasuredTrial, Models
    from mergelab.tasks.spec import TaskSpec

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Goal:
    """What is estimated: the mean of one metric of each of some tasks.

    Attributes:
        name: among the estimates.
        parts: each task with its metric.
    """

    name: str
    parts: tuple[tuple[TaskSpec, str], ...]

    @property
    def sign(self) -> int:
        """-1 where less is better."""
        return -1 if get_metric(self.parts[0][1]).direction == "minimize" else 1

    @property
    def families(self) -> tuple[tuple[str, str], ...]:
        """What scores it is estimated from; goals with the same share them."""
        return tuple((spec.name, family(spec, metric)) for spec, metric in self.parts)


@dataclass(frozen=True)
class Estimator:
    """What estimates are made from: the trials so far, one of them whole at least.

    Attributes:
        goal: what is estimated.
        history: the trials so far.
        models: the statistics of the base and of each expert that was measured on a task, by task.
        best: the best of the whole ones.
    """

    goal: Goal
    history: Sequence[MeasuredTrial]
    models: Models
    best: MeasuredTrial

    @cached_property
    def trials(self) -> Trials:
        """What the trials so far tell of others."""
        everything = np.arange(len(self._blocks))
        seen = [Seen(everything, self._whole(one.tasks)) if one.whole else self.seen(one.tasks) for one in self.history]
        points = np.stack([one.point for one in self.history])
        return trials_of(seen, self._models, points, self._blocks)

    @cached_property
    def target(self) -> Target:
        """How the goal follows from the examples' scores."""
        return mean_of([self._target(spec, metric) for spec, metric in self.goal.parts])

    def scores(self, spec: TaskSpec, metric: str, rows: Array, positions: Array) -> Array:
        """Return the scores (k,) of a model's examples of a task at ``positions`` (k,), of their statistics (k, c)."""
        if not is_linearised(spec, metric):
            return scores_for(spec, metric, rows)
        return linear_scores(spec, metric, rows, positions, self.best.tasks[spec.name].rows(metric))

    def seen(self, tasks: Mapping[str, MeasuredTask]) -> Seen:
        """Return the columns that a trial was measured on, and its scores on them."""
        positions, scores, first = [], [], 0
        for spec, metric in self.goal.parts:
            if (one := tasks.get(spec.name)) is not None:
                positions.append(first + one.positions)
                scores.append(self.scores(spec, metric, one.statistics[metric], one.positions))
            first += self._counts[spec.name]
        return Seen(np.concatenate(positions), np.concatenate(scores))

    def estimate(self, prior: Prior, tasks: Mapping[str, MeasuredTask]) -> tuple[float, float]:
        """Return the goal of a trial that was measured on some examples, and its standard error."""
        return self.with_error(self.target, condition(prior, self.seen(tasks)))

    def with_error(self, target: Target, posterior: Posterior) -> tuple[float, float]:
        """Return a function of the columns' scores of a trial, and its standard error."""
        return target.with_error(*posterior.sums(target.groups))

    def estimate_again(self, one: MeasuredTrial) -> tuple[float, float]:
        """Return the same of a trial of the history, from what all others tell now."""
        return self.estimate(self.trials.prior_without(self.index(one)), one.tasks)

    def index(self, one: MeasuredTrial) -> int:
        """Return the place of a trial in the history."""
        return next(index for index, other in enumerate(self.history) if other.number == one.number)

    def weights(self, prior: Prior) -> Array:
        """Return by how much each column (n,) may change the goal: its deviation times the slope in its score."""
        sums = self.target.groups.T @ self._whole(self.best.tasks)
        slopes = self.target.gradient(sums, np.maximum(np.abs(sums) / 100, 1e-9))
        found: Array = np.sqrt(prior.variance) * np.abs(self.target.groups @ slopes)
        return found

    def target_in(self, spec: TaskSpec, metric: str, members: Array | None = None) -> Target:
        """Return a metric of one task, or of ``members`` (m,) of its examples, as a function of all columns."""
        own = self._target(spec, metric, members)
        first = sum(self._counts[name] for name in self._before(spec.name))
        groups = np.zeros((sum(self._counts.values()), own.groups.shape[1]))
        groups[first : first + len(own.groups)] = own.groups
        return replace(own, groups=groups)

    def _before(self, name: str) -> list[str]:
        names = [spec.name for spec, _ in self.goal.parts]
        return names[: names.index(name)]

    def _target(self, spec: TaskSpec, metric: str, members: Array | None = None) -> Target:
        return target_of(spec, metric, self.best.tasks[spec.name].rows(metric), members)

    @cached_property
    def _counts(self) -> dict[str, int]:
        return {spec.name: self.best.tasks[spec.name].count for spec, _ in self.goal.parts}

    @cached_property
    def _blocks(self) -> Array:
        """(n,) the task of each column, by number."""
        return np.repeat(np.arange(len(self.goal.parts)), [self._counts[spec.name] for spec, _ in self.goal.parts])

    @cached_property
    def _models(self) -> Array:
        """(e, n) scores of the base, and of the experts of each task one after the other."""
        of_each = []
        for spec, metric in self.goal.parts:
            everything = np.arange(self._counts[spec.name])
            rows = [one[metric] for one in self.models.get(spec.name, ()) if len(one[metric]) == len(everything)]
            of_each.append([self.scores(spec, metric, one, everything) for one in rows])
        count = min(map(len, of_each))
        return np.array([np.concatenate([rows[index] for rows in of_each]) for index in range(count)]).reshape(
            count, len(self._blocks)
        )

    def _whole(self, tasks: Mapping[str, MeasuredTask]) -> Array:
        """Return a whole trial's scores (n,); 0 where an example has none."""
        found, seen = np.zeros(len(self._blocks)), self.seen(tasks)
        found[seen.positions] = seen.scores
        return found


def best_of(history: Sequence[MeasuredTrial], sign: int) -> MeasuredTrial | None:
    """Return the best of the whole trials by the first objective, the earliest of equals."""
    whole = [one for one in history if one.whole]
    return max(whole, key=lambda one: (sign * one.values[0], -one.number), default=None)
