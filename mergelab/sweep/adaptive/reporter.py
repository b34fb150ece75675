"""A running trial that chooses its examples, and ends when its estimate is good enough for what depends on it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from mergelab.errors import MergeWarning, NonFinite
from mergelab.evaluation.metrics import example_statistics, part_members, value_of_rows
from mergelab.sweep.adaptive.estimator import Estimator, Goal, best_of
from mergelab.sweep.adaptive.goals import estimators_of, field_of, goals_of
from mergelab.sweep.adaptive.history import MeasuredTask, MeasuredTrial, read_history, read_models, write_models
from mergelab.sweep.adaptive.policy import POLICY, draw_rounds, ends_trial, is_finalist
from mergelab.sweep.adaptive.prediction import Prior, condition
from mergelab.sweep.estimate import Estimate, bounded
from mergelab.sweep.reporting import Pruned
from mergelab.sweep.space import in_cube
from mergelab.sweep.study import KNOWN
from mergelab.sweep.targets import family, is_linearised, unsupported
from mergelab.tasks.metric import get_metric

if TYPE_CHECKING:
    from optuna.study import Study

    from mergelab.evaluation.results import ModelResult
    from mergelab.experiment.evaluator import Evaluator
    from mergelab.sweep.adaptive.history import Models
    from mergelab.sweep.objective import Objective
    from mergelab.tasks.spec import TaskSpec

Array = np.ndarray[Any, Any]


# Of intervals of 95 %, calibrated: a trial ends where its estimate happens to be low, or its error.
_QUANTILE = 2.7
_OF_LINEARISED = 3.6  # what a metric is linearised by is estimated too


@dataclass
class AdaptiveReporter:
    """Takes the statistics of one trial's examples, round by round, and ends it where its estimates are good enough.

    Attributes:
        goals: what the sweep selects by.
        history: the trials that this one learns from.
        models: the statistics of base and experts, by task.
        counts: of the selecting examples of each task, in the order in which their positions are numbered.
        seed: draws the rounds.
        point: (d,) of the search space, in the unit cube.
        again: the trial, which the history has, where it is measured further after it was stopped.
        rounds: (n,) the round of each example; those that no goal needs come last, and -1 is of those that are known.
        done: number of examples measured so far, those before it was stopped included.
    """

    goals: Sequence[Goal]
    history: Sequence[MeasuredTrial]
    models: Models
    counts: Mapping[str, int]
    seed: Sequence[int]
    point: Array
    again: MeasuredTrial | None = None
    rounds: Array = field(init=False)
    done: int = field(default=0, init=False)
    _ended: int = field(default=0, init=False)  # rounds

    def __post_init__(self) -> None:
        self._firsts = dict(zip(self.counts, np.cumsum([0, *self.counts.values()]).tolist(), strict=False))
        self._count = sum(self.counts.values())
        self._known = np.zeros(self._count, bool)
        self._rows: dict[str, dict[str, Array]] = {name: {} for name in self.counts}
        for name, one in (self.again.tasks if self.again is not None else {}).items():
            self._take(self._firsts[name] + one.positions, name, one.statistics)
        self.rounds = np.where(self._known, -1, 0)  # one round: the trial is measured whole
        self._ends = np.array([self._count])
        if sum(one.whole for one in self.history) < POLICY.startup:
            return
        self._estimators = estimators_of(self.goals, self.history, self.models)
        self._priors = [self._prior(one) for one in self._estimators]
        if self._count <= POLICY.first:
            self._warn(f"{self._count} selecting examples are too few to choose from")
        elif not all(prior.variance.any() for prior in self._priors):
            self._warn("all models have equal scores on every example, so that none tells more than others")
        else:
            self.rounds = self._drawn_rounds()
            self._ends = self.done + np.bincount(self.rounds[self.rounds >= 0]).cumsum()
            self._field = field_of(self.goals, self.history)

    def _prior(self, estimator: Estimator) -> Prior:
        """Return what all other trials tell of this one."""
        if self.again is None:
            return estimator.trials.prior(self.point)
        return estimator.trials.prior_without(estimator.index(self.again))

    @property
    def rival(self) -> MeasuredTrial | None:
        """The best complete trial, the earliest of equals."""
        return best_of(self.history, self.goals[0].sign)

    def _drawn_rounds(self) -> Array:
        """Draw the rounds by how much each example may change the objectives, in units of the greatest change."""
        deviations, needed = np.zeros(self._count), np.zeros(self._count, bool)
        for estimator, prior in zip(self._estimators, self._priors, strict=True):
            changes = estimator.weights(prior)
            columns = np.concatenate([self._firsts[spec.name] + np.arange(self.counts[spec.name])
                                      for spec, _ in estimator.goal.parts])  # fmt: skip
            deviations[columns] += changes / (changes.max() or 1.0)
            needed[columns] = True
        rounds, wanted = np.full(self._count, -1), needed & ~self._known
        rounds[wanted] = draw_rounds(deviations[wanted], self.seed, len(self.counts), self.done)
        rounds[~needed] = rounds.max() + 1
        return rounds

    def report(self, positions: Array, statistics: Mapping[str, Array]) -> None:
        """Take the statistics (b, c) by metric of examples of one task, at ``positions`` (b,) among those of all tasks.

        Raises:
            NonFinite: one is NaN or infinite. Pruned: the trial needs no more examples.
        """
        name = max((one for one in self.counts if self._firsts[one] <= positions[0]), key=self._firsts.__getitem__)
        for metric, rows in statistics.items():
            if bad := int((~np.isfinite(rows)).any(axis=1).sum()):
                raise NonFinite(f"{metric}: {bad} examples have a score that is NaN or infinite")
        self._take(positions, name, statistics)
        # A text without tokens is never measured, so that not every example of a round need be.
        ended = int(np.searchsorted(self._ends, self.done, side="right"))
        if ended == self._ended or ended == len(self._ends):
            return
        self._ended = ended
        values, errors = np.transpose(self._estimated(self.measured()))
        if self.again is None:
            ends = ends_trial(values, errors, self._field)
        else:
            ends = not is_finalist(values, errors, self._field)
        if ends:
            raise Pruned

    def _take(self, positions: Array, name: str, statistics: Mapping[str, Array]) -> None:
        for metric, rows in statistics.items():
            of_all = self._rows[name].setdefault(metric, np.zeros((self.counts[name], rows.shape[1])))
            of_all[positions - self._firsts[name]] = rows
        self._known[positions] = True
        self.done += len(positions)

    def measured(self) -> dict[str, MeasuredTask]:
        """Return what was measured of each task."""
        found = {}
        for name, count in self.counts.items():
            seen = np.flatnonzero(self._known[self._firsts[name] : self._firsts[name] + count])
            if len(seen):
                rows = {metric: rows[seen] for metric, rows in self._rows[name].items()}
                found[name] = MeasuredTask(seen, rows, count)
        return found

    def _estimated(self, tasks: Mapping[str, MeasuredTask]) -> list[tuple[float, float]]:
        pairs = zip(self._estimators, self._priors, strict=True)
        return [estimator.estimate(prior, tasks) for estimator, prior in pairs]

    def estimates(self, parts: Mapping[str, Array]) -> dict[str, Estimate]:
        """Estimate each goal, and each metric of its tasks that can be; of a task of several splits that of each.

        Args:
            parts: (n,) by task, the position in ``spec.splits`` of each example's split.
        """
        found: dict[str, Estimate] = {}
        tasks = self.measured()
        specs = {spec.name: spec for goal in self.goals for spec, _ in goal.parts}
        for name, spec in specs.items():
            splits = [("", None), *((f"_{split}", members) for split, members in part_members(spec, parts[name]))]
            for metric in (one for one in spec.metrics if name in tasks and unsupported(spec, one) is None):
                for suffix, members in splits[: 1 if is_linearised(spec, metric) else None]:
                    key = f"{name}/{metric}{suffix}" if len(self.counts) > 1 else metric + suffix
                    found[key] = self._estimate(spec, metric, tasks, members)
        for goal, (value, error) in zip(self.goals, self._estimated(tasks), strict=True):
            if goal.name not in found:
                found[goal.name] = self._bounded(goal, value, error, tasks, None)
        return found

    def _warn(self, reason: str) -> None:
        """Say, of the first trial alone that could be measured in part, why it is measured whole."""
        if len(self.history) == POLICY.startup:
            text = f"sweep.evaluation=adaptive: {reason}; trials are measured whole"
            warnings.warn(text, MergeWarning, stacklevel=2)

    def _estimate(
        self, spec: TaskSpec, metric: str, tasks: Mapping[str, MeasuredTask], members: Array | None
    ) -> Estimate:
        """Estimate a metric of one task, by a goal's scores where it follows from these."""
        goal = Goal(metric, ((spec, metric),))
        wanted = (spec.name, family(spec, metric))
        for estimator, prior in zip(self._estimators, self._priors, strict=True):
            if wanted in estimator.goal.families:
                target = estimator.target_in(spec, metric, members)
                value, error = estimator.with_error(target, condition(prior, estimator.seen(tasks)))
                return self._bounded(goal, value, error, tasks, members)
        best = best_of(self.history, self.goals[0].sign)
        assert best is not None
        own = Estimator(goal, [one for one in self.history if spec.name in one.tasks], self.models, best)
        target = own.target_in(spec, metric, members)
        value, error = own.with_error(target, condition(self._prior(own), own.seen(tasks)))
        return self._bounded(goal, value, error, tasks, members)

    def _bounded(
        self, goal: Goal, value: float, error: float, tasks: Mapping[str, MeasuredTask], members: Array | None
    ) -> Estimate:
        best = self.rival
        seen, of_best = [], []
        for spec, metric in goal.parts:
            one = tasks.get(spec.name)
            at = np.empty(0, np.int64) if one is None else one.positions
            at = at if members is None else np.intersect1d(at, members)
            if one is None or best is None or len(at) < max(get_metric(metric).min_examples, 1):
                seen.append(math.nan)
                continue
            seen.append(value_of_rows(spec, metric, one.rows(metric)[at]))
            of_best.append(value_of_rows(spec, metric, best.tasks[spec.name].rows(metric)[at]))
        compared = float(np.mean(of_best)) if len(of_best) == len(goal.parts) else None
        declared = get_metric(goal.parts[0][1])
        half = error * (_OF_LINEARISED if all(is_linearised(*part) for part in goal.parts) else _QUANTILE)
        return bounded(declared, value, half, float(np.mean(seen)), compared, fraction=value <= 1)


def adaptive_reporter(
    study: Study,
    number: int,
    objectives: Sequence[Objective],
    evaluator: Evaluator,
    baselines: Sequence[ModelResult],
    seed: int,
    *,
    again: bool = False,
) -> AdaptiveReporter:
    """Create the reporter of a trial from what its study has measured, and from the base and the experts.

    It depends on the trials that had ended when this one was drawn alone: started again, it measures the same. Of a
    stopped trial that is measured further (``again``), it depends on all trials.
    """
    models: dict[str, list[dict[str, Array]]] = {}
    for name, data in evaluator.data.items():
        select = evaluator.examples[name].select
        outputs = [model.predictions[name].outputs[select] for model in baselines if name in model.predictions]
        models[name] = [example_statistics(data.spec, each, data.truth[select]) for each in outputs]
    write_models(study, models)
    trials = study.get_trials(deepcopy=False)
    trial = trials[number]
    counts = {name: len(examples.select) for name, examples in evaluator.examples.items()}
    only = next(iter(counts))
    known = len(trials) if again else trial.user_attrs.get(KNOWN, number)
    history = read_history(study, known, only, counts)
    stopped = next((one for one in history if again and one.number == number), None)
    goals = goals_of(objectives, [data.spec for data in evaluator.data.values()])
    point, own = in_cube(trial.params, trial.distributions), (seed, number, 1) if again else (seed, number)
    return AdaptiveReporter(goals, history, read_models(study, only), counts, own, point, stopped)
