"""A sweep's objectives: one or several scores of the selecting examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from mergelab.errors import SweepError, did_you_mean, listed
from mergelab.tasks.metric import get_metric

if TYPE_CHECKING:
    from mergelab.sweep.config import Direction
    from mergelab.tasks.spec import TaskSpec

AVERAGE = "average"


@dataclass(frozen=True)
class Objective:
    """One score: a metric of a task, or (``task`` None) the mean of the tasks' primary metrics."""

    name: str
    task: str | None
    metric: str
    direction: Direction

    @property
    def label(self) -> str:
        """What a trial's score is called: the metric, or the average."""
        return self.metric or self.name

    def value(self, scores: Mapping[str, Mapping[str, float]], primary: Mapping[str, str]) -> float:
        """Return it from the metrics of each task."""
        if self.task is None:
            return fmean(scores[task][metric] for task, metric in primary.items())
        return scores[self.task][self.metric]


def objectives(
    wanted: str | Sequence[str] | None, directions: str | Sequence[str] | None, tasks: Sequence[TaskSpec]
) -> list[Objective]:
    """Return the objectives that a sweep's ``objective`` names, in the order given.

    Args:
        wanted: metrics of the one task; of a suite: tasks (their primary metric), ``task/metric``, or ``average``.
            None: the primary metric, the average.
        directions: as the user gave them; None: each metric's own.
        tasks: what is measured.

    Raises:
        SweepError: a task does not report such a metric, or there are not as many directions as objectives.
    """
    if wanted is not None and not wanted:
        raise SweepError("sweep.objective: names nothing; null is the primary metric, of a suite the average")
    names = [wanted] if isinstance(wanted, str) else list(wanted or [tasks[0].primary if len(tasks) == 1 else AVERAGE])
    found = [_objective(name, tasks) for name in names]
    given = [directions] * len(found) if isinstance(directions, str) else list(directions or [])
    if given and len(given) != len(found):
        raise SweepError(f"sweep.direction: {len(given)} directions for {len(found)} objectives ({listed(names)})")
    if given and (wrong := [o for o, direction in zip(found, given, strict=True) if o.direction != direction]):
        raise SweepError(f"sweep.direction: {wrong[0].name} is better when it is {_BETTER[wrong[0].direction]}")
    return found


_BETTER = {"maximize": "greater (maximize)", "minimize": "less (minimize)"}


def _objective(name: str, tasks: Sequence[TaskSpec]) -> Objective:
    by_name = {task.name: task for task in tasks}
    if name == AVERAGE and len(tasks) > 1:
        directions = {task.direction for task in tasks}
        if len(directions) > 1:
            raise SweepError(
                "sweep.objective: an average of metrics that are better when greater and of ones that are better when "
                f"less says nothing; name tasks: sweep.objective=[{','.join(by_name)}]"
            )
        return Objective(name, None, "", directions.pop())
    if len(tasks) == 1 and name in tasks[0].metrics:  # lm-eval's metrics have a slash
        return Objective(name, tasks[0].name, name, get_metric(name).direction)
    task, _, metric = name.rpartition("/") if "/" in name else (name, "", "") if name in by_name else ("", "", name)
    if not task and len(tasks) == 1:
        task = tasks[0].name
    if task not in by_name:
        options = [*by_name, AVERAGE] if len(tasks) > 1 else list(tasks[0].metrics)
        raise SweepError(
            f"sweep.objective={name}: not among what is measured{did_you_mean(name, options)} "
            f"(there are {listed(options)})"
        )
    spec = by_name[task]
    metric = metric or spec.primary
    if metric not in spec.metrics:
        raise SweepError(
            f"sweep.objective={name}: {task} does not report {metric!r}{did_you_mean(metric, spec.metrics)} "
            f"(there are {listed(spec.metrics)})"
        )
    return Objective(name, task, metric, get_metric(metric).direction)
