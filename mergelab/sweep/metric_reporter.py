"""A running trial that ends when its metric is hardly better than the best trial's: its tasks are measured in turns.

This is for metrics that are no means over examples (a correlation, F1, BLEU), and for suites, whose score is a mean of
the tasks' metrics. What is compared is each task's metric, with its error by what was seen of that task.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from mergelab.evaluation.metrics import value_of_rows
from mergelab.sweep.estimate import QUANTILE, Estimate, estimate, unbounded
from mergelab.sweep.objective import AVERAGE
from mergelab.sweep.reporting import Pruned, Rival, best_complete, packed_statistics, unpacked_statistics
from mergelab.sweep.study import STATISTICS
from mergelab.tasks.metric import get_metric

if TYPE_CHECKING:
    from optuna.study import Study

    from mergelab.sweep.futility import Futility
    from mergelab.sweep.objective import Objective
    from mergelab.tasks.spec import TaskSpec

Array = np.ndarray[Any, Any]
Statistics = Callable[[str], tuple[Array, Mapping[str, Array]]]
PARTS = (0.125, 0.25, 0.5, 1.0)  # shares of a task's examples after which a trial may be stopped
_LEAST = 8  # examples of a task before which nothing is said of it


@dataclass
class MetricReporter:
    """Ends a trial whose objective is hardly better than the best complete trial's.

    Attributes:
        pruner: None where trials are never pruned.
        study, number: the study, and the trial's number in it.
        objective: the only one.
        tasks: with the number of selecting examples of each.
        statistics: returns what was measured of a task, as `SelectingEvaluation.statistics`.
        done: number of examples measured so far.
        rival: the best complete trial; None where there is none, or trials are never pruned.
    """

    pruner: Futility | None
    study: Study
    number: int
    objective: Objective
    tasks: Sequence[tuple[TaskSpec, int]]
    statistics: Statistics
    done: int = 0
    rival: Rival | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        best = None if self.pruner is None else best_complete(self.study, {STATISTICS})
        if best is not None:
            stored = unpacked_statistics(best.user_attrs[STATISTICS])
            expected = {self._key(spec, metric): count for spec, count in self.tasks for metric in spec.metrics}
            if {name: len(rows) for name, rows in stored.items()} == expected:
                self.rival = Rival(best.number, stored, None)

    def _key(self, spec: TaskSpec, metric: str) -> str:
        return f"{spec.name}/{metric}" if len(self.tasks) > 1 else metric

    @property
    def wanted(self) -> list[tuple[TaskSpec, str, int]]:
        """The metrics that the objective is the mean of, with the numbers of examples."""
        if self.objective.task is None:
            return [(spec, spec.primary, count) for spec, count in self.tasks]
        return [(spec, self.objective.metric, n) for spec, n in self.tasks if spec.name == self.objective.task]

    def report(self, positions: Array, _scores: Array) -> None:
        """Count a batch of examples (b,)."""
        self.done += len(positions)

    def decide(self) -> None:
        """Decide when a part of each task was measured.

        Raises:
            Pruned: the trial is given up.
        """
        if self.pruner is None or self.rival is None or self.done == sum(count for _, count in self.tasks):
            return
        if self.done >= self.pruner.n_startup_steps and self.pruner.is_behind(*self._difference(self.rival)):
            raise Pruned

    def _difference(self, rival: Rival) -> tuple[float, float]:
        """Return how much better than the rival the trial is in the objective, and the standard error of that.

        The error is infinite where a task's metric is not defined on what was seen, and 0 for a trial that is ahead, of
        which nobody needs it.
        """
        known = [(spec, metric, count, *self.statistics(spec.name)) for spec, metric, count in self.wanted]
        sign = -1.0 if self.objective.direction == "minimize" else 1.0
        difference = 0.0
        for spec, metric, count, seen, own in known:
            if len(seen) < max(min(_LEAST, count), get_metric(metric).min_examples, 1):
                return 0.0, math.inf
            best = rival.statistics[self._key(spec, metric)][seen]
            scores = (value_of_rows(spec, metric, rows) for rows in (own[metric], best))
            difference += sign * (next(scores) - next(scores)) / len(known)
        if difference > 0:
            return difference, 0.0
        variance = 0.0
        for spec, metric, count, seen, own in known:
            found = unbounded(spec, metric, own[metric], rival.statistics[self._key(spec, metric)], seen, count)
            if found is None or found.half is None:
                return 0.0, math.inf
            variance += (found.half / QUANTILE / len(known)) ** 2
        return difference, math.sqrt(variance)

    def finish(self) -> None:
        """Write what later trials are compared with to the storage."""
        if self.pruner is None:
            return
        found = {self._key(spec, metric): rows for spec, _ in self.tasks
                 for metric, rows in self.statistics(spec.name)[1].items()}  # fmt: skip
        storage: Any = self.study._storage
        trial = storage.get_trial_id_from_study_id_trial_number(self.study._study_id, self.number)
        storage.set_trial_user_attr(trial, STATISTICS, packed_statistics(found))

    def estimates(self) -> dict[str, Estimate]:
        """Estimate the metrics of a suite's tasks (``task/metric``), and where it means something their ``average``."""
        found = {}
        for spec, count in self.tasks:
            seen, own = self.statistics(spec.name)
            for metric, rows in own.items():
                best = None if self.rival is None else self.rival.statistics[f"{spec.name}/{metric}"]
                if (one := estimate(spec, metric, rows, best, seen, count)) is not None:
                    found[f"{spec.name}/{metric}"] = one
        parts = [found.get(f"{spec.name}/{spec.primary}") for spec, _ in self.tasks]
        if None not in parts and len({spec.direction for spec, _ in self.tasks}) == 1:
            found[AVERAGE] = _mean([each for each in parts if each is not None])
        return found


def _mean(parts: Sequence[Estimate]) -> Estimate:
    """Return the estimate of a mean of metrics, which are independent: they are of different examples."""
    value, seen = (float(np.mean([getattr(each, name) for each in parts])) for name in ("value", "seen"))
    best = None if parts[0].best_seen is None else float(np.mean([each.best_seen for each in parts]))
    if any(each.low is None or each.high is None for each in parts):
        return Estimate(value, None, None, seen, best)
    below = math.sqrt(sum((each.value - (each.low or 0.0)) ** 2 for each in parts)) / len(parts)
    above = math.sqrt(sum(((each.high or 0.0) - each.value) ** 2 for each in parts)) / len(parts)
    return Estimate(value, value - below, value + above, seen, best)
