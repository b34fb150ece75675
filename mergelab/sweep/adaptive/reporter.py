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
from mergelab.sweep.adaptive.estimator import Estimator, best_of
from mergelab.sweep.adaptive.history import MeasuredTrial, read_history, read_models, write_models
from mergelab.sweep.adaptive.policy import POLICY, draw_rounds, ends_trial
from mergelab.sweep.adaptive.prediction import Seen
from mergelab.sweep.estimate import Estimate, bounded
from mergelab.sweep.reporting import Pruned
from mergelab.sweep.space import in_cube
from mergelab.sweep.study import KNOWN
from mergelab.sweep.targets import unsupported
from mergelab.tasks.metric import get_metric

if TYPE_CHECKING:
    from optuna.study import Study

    from mergelab.evaluation.results import ModelResult
    from mergelab.experiment.evaluator import Evaluator
    from mergelab.tasks.spec import TaskSpec

Array = np.ndarray[Any, Any]


_QUANTILE = 2.6  # of intervals of 95 %: a trial ends where its estimate happens to be low, or its error; calibrated


@dataclass
class AdaptiveReporter:
    """Takes the scores of one trial, round by round, and ends it after a round where its estimate is good enough.

    Attributes:
        spec, metric: what the sweep selects by.
        history: the trials that this one learns from.
        models: (n, c) by metric, the statistics of base and experts.
        count: n, of the selecting examples.
        seed: draws the rounds.
        point: (d,) of the search space, in the unit cube.
        rounds: (n,) the round of each example; None: the trial is measured whole.
        done: number of examples measured so far.
    """

    spec: TaskSpec
    metric: str
    history: Sequence[MeasuredTrial]
    models: Sequence[Mapping[str, Array]]
    count: int
    seed: Sequence[int]
    point: Array
    rounds: Array | None = field(default=None, init=False)
    done: int = field(default=0, init=False)
    _round: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._scores = np.full(self.count, np.nan)
        if sum(one.whole for one in self.history) < POLICY.startup:
            return
        self._estimator = Estimator(self.spec, self.metric, self.history, self.models)
        self._prior = self._estimator.trials.prior(self.point)
        variance = self._prior.variance
        if self.count <= POLICY.first:
            self._warn(f"{self.count} selecting examples are too few to choose from")
        elif not variance.any():
            self._warn("all models have equal scores on every example, so that none tells more than others")
        else:
            self.rounds = draw_rounds(variance, self.seed)
            self._field = self._estimator.field

    @property
    def rival(self) -> MeasuredTrial | None:
        """The best complete trial, the earliest of equals."""
        return best_of(self.history, self.metric)

    def report(self, positions: Array, scores: Array) -> None:
        """Take the scores (b,), what the metric is estimated from, of examples at ``positions`` (b,).

        Raises:
            NonFinite: a score is NaN or infinite. Pruned: the trial needs no more examples.
        """
        if bad := int((~np.isfinite(scores)).sum()):
            raise NonFinite(f"{self.metric}: {bad} examples have a score that is NaN or infinite")
        self._scores[positions] = scores
        self.done += len(positions)
        known = ~np.isnan(self._scores)
        if self.rounds is None or known.all():
            return
        ended = int(self.rounds[~known].min())  # the first round with an example to come
        if ended == self._round:
            return
        self._round = ended
        seen = np.flatnonzero(known)
        if ends_trial(*self._estimator.estimate(self._prior, Seen(seen, self._scores[seen])), self._field):
            raise Pruned

    def estimates(self, seen: Array, statistics: Mapping[str, Array], parts: Array) -> dict[str, Estimate]:
        """Estimate each metric of the task that can be, and of each of its splits where it has several.

        Args:
            seen: (k,) positions of the examples that were measured.
            statistics: (k, c) by metric, of these.
            parts: (n,) position in ``spec.splits`` of each example's split.
        """
        own = MeasuredTrial(-1, math.nan, seen, statistics, self.count, whole=False)
        found = {}
        splits = [("", None), *((f"_{name}", members) for name, members in part_members(self.spec, parts))]
        for metric in self.spec.metrics:
            if unsupported(self.spec, metric) is None:
                for suffix, members in splits:
                    found[metric + suffix] = self._estimate(metric, own, members)
        return found

    def _warn(self, reason: str) -> None:
        """Say, of the first trial alone that could be measured in part, why it is measured whole."""
        if len(self.history) == POLICY.startup:
            text = f"sweep.evaluation=adaptive: {reason}; trials are measured whole"
            warnings.warn(text, MergeWarning, stacklevel=2)

    def _estimate(self, metric: str, own: MeasuredTrial, members: Array | None) -> Estimate:
        estimator, prior = self._estimator, self._prior
        if metric != self.metric or members is not None:
            estimator = Estimator(self.spec, metric, self.history, self.models, members)
            prior = estimator.trials.prior(self.point)
        value, error = estimator.estimate(prior, estimator.seen(own))
        best = best_of(self.history, self.metric)
        of_split = own.positions if members is None else np.intersect1d(own.positions, members)
        score = math.nan
        of_best = None
        if len(of_split):
            score = value_of_rows(self.spec, metric, own.rows(metric)[of_split])
            of_best = None if best is None else value_of_rows(self.spec, metric, best.rows(metric)[of_split])
        return bounded(get_metric(metric), value, _QUANTILE * error, score, of_best, fraction=value <= 1)


def adaptive_reporter(
    study: Study, number: int, metric: str, evaluator: Evaluator, baselines: Sequence[ModelResult], seed: int
) -> AdaptiveReporter:
    """Create the reporter of a trial from what its study has measured, and from the base and the experts.

    It depends on the trials that had ended when this one was drawn alone: started again, it measures the same.
    """
    ((name, data),) = evaluator.data.items()
    select = evaluator.examples[name].select
    outputs = [model.predictions[name].outputs[select] for model in baselines if name in model.predictions]
    models = [example_statistics(data.spec, each, data.truth[select]) for each in outputs]
    write_models(study, models)
    trial = study.get_trials(deepcopy=False)[number]
    history = read_history(study, trial.user_attrs.get(KNOWN, number), len(select))
    point = in_cube(trial.params, trial.distributions)
    return AdaptiveReporter(data.spec, metric, history, read_models(study), len(select), (seed, number), point)
