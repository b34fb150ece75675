"""The stopped trials of a sweep that are measured whole in the end, so that the winner is among complete ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergelab.sweep.adaptive.estimator import Estimator
from mergelab.sweep.adaptive.history import read_history, read_models
from mergelab.sweep.adaptive.policy import POLICY, finalists

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mergelab.sweep.outcome import TrialOutcome
    from mergelab.sweep.study import SweepStudy
    from mergelab.tasks.spec import TaskSpec


@dataclass(frozen=True)
class MeasuredWhole:
    """What a job found that measured a stopped trial whole; ``measured`` is what `Measured.written` returned."""

    outcome: TrialOutcome
    measured: Mapping[str, Any]


def next_finalists(study: SweepStudy, spec: TaskSpec, metric: str, count: int) -> list[int]:
    """Return the numbers of at most ``count`` stopped trials to measure whole next.

    Every stopped trial is estimated anew, from all that the sweep has measured since.
    """
    history = read_history(study.study, study.count)
    stopped = [one for one in history if not one.whole]
    left = POLICY.finalists - study.measured_later(study.count)
    if not stopped or left <= 0 or len(stopped) == len(history):
        return []
    models = read_models(study.study)
    estimates = {}
    for one in stopped:
        estimator = Estimator(spec, metric, [other for other in history if other is not one], models)
        estimates[one.number] = estimator.estimate(estimator.partial(one))
    field = Estimator(spec, metric, history, models).field
    return finalists(estimates, field)[: min(count, left)]
