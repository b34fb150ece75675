"""The stopped trials of a sweep that are measured whole in the end, so that the winner is among complete ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergelab.sweep.adaptive.estimator import Estimator
from mergelab.sweep.adaptive.history import read_history, read_models
from mergelab.sweep.adaptive.policy import POLICY, finalists

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mergelab.sweep.adaptive.history import MeasuredTrial
    from mergelab.sweep.outcome import TrialOutcome
    from mergelab.sweep.study import SweepStudy
    from mergelab.tasks.metric import Array
    from mergelab.tasks.spec import TaskSpec


@dataclass(frozen=True)
class MeasuredWhole:
    """What a job found that measured a stopped trial whole; ``measured`` is what `MeasuredTrial.written` returned."""

    outcome: TrialOutcome
    measured: Mapping[str, Any]


def next_finalists(study: SweepStudy, spec: TaskSpec, metric: str, count: int) -> list[int]:
    """Return the numbers of at most ``count`` stopped trials to measure whole next."""
    count = min(count, POLICY.finalists - study.measured_later(study.count))
    if count <= 0:
        return []
    history = read_history(study.study, study.count)
    return likely_best(spec, metric, history, read_models(study.study))[:count]


def likely_best(
    spec: TaskSpec, metric: str, history: Sequence[MeasuredTrial], models: Sequence[Mapping[str, Array]]
) -> list[int]:
    """Return the stopped trials that may be better than the best complete one, the likeliest first.

    Each is estimated anew, from all that the sweep has measured since it was stopped.

    Args:
        spec, metric: what the sweep selects by.
        history: all trials.
        models: (n, c) by metric, the statistics of base and experts.
    """
    if all(one.whole for one in history) or not any(one.whole for one in history):
        return []
    estimator = Estimator(spec, metric, history, models)
    estimates = {one.number: estimator.estimate_again(one) for one in history if not one.whole}
    return finalists(estimates, estimator.field)
