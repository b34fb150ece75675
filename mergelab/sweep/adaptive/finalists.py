"""The stopped trials of a sweep that are measured further in the end, since the winner is among complete ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mergelab.sweep.adaptive.estimator import Goal
from mergelab.sweep.adaptive.goals import estimators_of, field_of
from mergelab.sweep.adaptive.history import read_history, read_models
from mergelab.sweep.adaptive.policy import POLICY, expected_gain

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mergelab.sweep.adaptive.history import MeasuredTrial, Models
    from mergelab.sweep.outcome import TrialOutcome
    from mergelab.sweep.study import SweepStudy


@dataclass(frozen=True)
class Finalist:
    """What a job found that measured a stopped trial further; ``measured`` is what `MeasuredTrial.written` returned."""

    outcome: TrialOutcome
    measured: Mapping[str, Any]


def next_finalists(study: SweepStudy, goals: Sequence[Goal], count: int) -> list[int]:
    """Return the numbers of at most ``count`` stopped trials to measure further next."""
    done = study.measured_later(study.count)
    count = min(count, POLICY.finalists - len(done))
    if count <= 0:
        return []
    only = goals[0].parts[0][0].name
    history, models = read_history(study.study, study.count, only), read_models(study.study, only)
    return [number for number in likely_best(goals, history, models) if number not in done][:count]


def likely_best(goals: Sequence[Goal], history: Sequence[MeasuredTrial], models: Models) -> list[int]:
    """Return the stopped trials that are worth measuring further, those with the greatest expected gain first.

    Each is estimated anew, from all that the sweep has measured since it was stopped.

    Args:
        goals: what the sweep selects by.
        history: all trials.
        models: the statistics of base and experts, by task.
    """
    if all(one.whole for one in history) or not any(one.whole for one in history):
        return []
    estimators, field = estimators_of(goals, history, models), field_of(goals, history)
    gains = {}
    for one in history:
        if not one.whole:
            values, errors = np.transpose([each.estimate_again(one) for each in estimators])
            gains[one.number] = expected_gain(values, errors, field)
    wanted = [number for number, gain in gains.items() if gain >= POLICY.gain]
    return sorted(wanted, key=lambda number: (-gains[number], number))
