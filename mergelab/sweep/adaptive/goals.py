"""What a sweep's objectives are to adaptive evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mergelab.sweep.adaptive.estimator import Estimator, Goal, best_of
from mergelab.sweep.adaptive.policy import Field
from mergelab.sweep.objective import AVERAGE
from mergelab.sweep.targets import family, unsupported
from mergelab.tasks.metric import get_metric

if TYPE_CHECKING:
    from mergelab.sweep.adaptive.history import MeasuredTrial, Models
    from mergelab.sweep.objective import Objective
    from mergelab.tasks.spec import TaskSpec

Array = np.ndarray[Any, Any]


def goals_of(objectives: Sequence[Objective], tasks: Sequence[TaskSpec]) -> list[Goal]:
    """Return what each objective is the mean of, by the name that its estimate has."""
    found = []
    for one in objectives:
        parts = [(spec, one.metric) for spec in tasks if spec.name == one.task]
        if one.task is None:
            parts = [(spec, spec.primary) for spec in tasks]
        name = one.metric if len(tasks) == 1 else AVERAGE if one.task is None else f"{one.task}/{one.metric}"
        found.append(Goal(name, tuple(parts)))
    return found


def not_estimated(goals: Sequence[Goal]) -> str | None:
    """Say why one of the goals cannot be estimated; None where all can."""
    reasons = (unsupported(spec, metric) for goal in goals for spec, metric in goal.parts)
    return next((reason for reason in reasons if reason is not None), None)


def estimators_of(goals: Sequence[Goal], history: Sequence[MeasuredTrial], models: Models) -> list[Estimator]:
    """Return an estimator for each goal; those that are made from the same scores share what is known of trials."""
    best = best_of(history, goals[0].sign)
    assert best is not None
    known: dict[Any, Estimator] = {}
    found = []
    for goal in goals:
        one = Estimator(goal, history, models, best)
        if (same := known.setdefault(goal.families, one)) is not one:
            one.__dict__["trials"] = same.trials
        found.append(one)
    return found


def field_of(goals: Sequence[Goal], history: Sequence[MeasuredTrial]) -> Field:
    """Return the trials that others are compared with."""
    rivals = np.array([one.values for one in history if one.whole])
    best = best_of(history, goals[0].sign)
    assert best is not None
    steps = np.array([_step(goal, best) for goal in goals])
    return Field(rivals, np.array([one.values for one in history]), steps, np.array([goal.sign for goal in goals]))


def _step(goal: Goal, best: MeasuredTrial) -> float:
    """Return the least difference of two values that counts: of right answers one more, in the largest task."""
    counts = [best.tasks[spec.name].count for spec, _ in goal.parts]
    right = all(family(spec, metric) == "right" or _is_exact(best, spec, metric) for spec, metric in goal.parts)
    return 1 / (max(counts) * len(counts)) if right else 0.0


def _is_exact(best: MeasuredTrial, spec: TaskSpec, metric: str) -> bool:
    rows = best.tasks[spec.name].statistics[metric]
    return get_metric(metric).direction == "maximize" and rows.shape[1] == 1 and bool(np.isin(rows, (0, 1)).all())
