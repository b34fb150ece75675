"""Ways to measure the trials of a recorded sweep; what is here only looks their statistics up, `mergelab` decides."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from experiments import irt
from experiments.recorded import Recorded
from mergelab.evaluation.metrics import value_of_rows
from mergelab.sweep.adaptive import finalists as chosen
from mergelab.sweep.adaptive.estimator import Goal
from mergelab.sweep.adaptive.history import MeasuredTrial
from mergelab.sweep.adaptive.policy import POLICY
from mergelab.sweep.adaptive.reporter import AdaptiveReporter
from mergelab.sweep.futility import Futility
from mergelab.sweep.metric_reporter import PARTS, MetricReporter
from mergelab.sweep.objective import AVERAGE, Objective
from mergelab.sweep.reporting import Pruned, Rival
from mergelab.sweep.targets import is_linearised, is_mean_of_scores, scores_for
from mergelab.tasks.spec import TaskSpec

Array = np.ndarray[Any, Any]
CHECK = 8  # examples between two questions of whether a trial is pruned


@dataclass
class Simulated:
    """What a simulated sweep has measured.

    Attributes:
        used: number of examples.
        whole: values of the trials that were measured whole, the better the higher.
        estimates: value, half of the interval's width, and what comes out, of each trial that was stopped.
    """

    used: int = 0
    whole: dict[int, float] = field(default_factory=dict)
    estimates: list[tuple[float, float, float]] = field(default_factory=list)


def full(sweep: Recorded, seed: int) -> Simulated:
    """Measure every trial whole."""
    return Simulated(len(sweep.points) * sweep.size, dict(enumerate(sweep.values)))


def pruned(sweep: Recorded, seed: int) -> Simulated:
    """Stop a trial for futility, after every eight examples in random order, or by its metric after its parts."""
    if len(sweep.tasks) > 1 or not is_mean_of_scores(sweep.tasks[0], sweep.tasks[0].primary):
        return _pruned_by_metric(sweep, seed)
    (task,) = sweep.tasks
    sign = -1.0 if task.direction == "minimize" else 1.0
    scores_of = np.stack([sign * scores_for(task, task.primary, rows) for rows in sweep.trials[task.name]])
    rng, pruner, found = np.random.default_rng(seed), Futility(), Simulated()
    best: Array | None = None
    for number, scores in enumerate(scores_of):
        order, count, value = rng.permutation(len(scores)), len(scores), float(sweep.values[number])
        for end in range(CHECK, count, CHECK) if best is not None else ():
            if pruner.is_futile((scores - best)[order[:end]], count - end):
                found.used += end
                break
        else:
            found.used += count
            best = scores if value > max(found.whole.values(), default=-np.inf) else best
            found.whole[number] = value
    return found


def _pruned_by_metric(sweep: Recorded, seed: int) -> Simulated:
    rng, found, best = np.random.default_rng(seed), Simulated(), 0
    first = sweep.tasks[0]
    objective = Objective(AVERAGE, None, "", first.direction)
    if len(sweep.tasks) == 1:
        objective = Objective(first.primary, first.name, first.primary, first.direction)
    tasks = list(zip(sweep.tasks, sweep.counts, strict=True))
    for number in range(len(sweep.points)):
        orders = {task.name: rng.permutation(count) for task, count in tasks}
        share = PARTS[0]

        def statistics(name: str, of: int = number, orders: Any = orders) -> tuple[Array, dict[str, Array]]:
            seen = np.sort(orders[name][: max(round(share * len(orders[name])), 1)])  # noqa: B023
            metric = next(task.primary for task in sweep.tasks if task.name == name)
            return seen, {metric: sweep.trials[name][of][seen]}

        reporter = MetricReporter(None, None, number, objective, tasks, statistics)  # type: ignore[arg-type]
        if number:
            keys = {
                task.name: f"{task.name}/{task.primary}" if len(tasks) > 1 else task.primary for task in sweep.tasks
            }
            whole = {keys[task.name]: sweep.trials[task.name][best] for task in sweep.tasks}
            reporter.pruner, reporter.rival = Futility(), Rival(best, whole, None)
        try:
            for share in PARTS:
                reporter.done = sum(max(round(share * count), 1) for _, count in tasks)
                reporter.decide()
        except Pruned:
            found.used += reporter.done
            continue
        found.used += sweep.size
        found.whole[number] = float(sweep.values[number])
        best = max(found.whole, key=lambda one: (found.whole[one], -one))
    return found


def adaptive(sweep: Recorded, seed: int) -> Simulated:
    """Measure the trials as ``sweep.evaluation=adaptive`` does."""
    history: list[MeasuredTrial] = []
    found = Simulated()
    goal = Goal(AVERAGE, tuple((task, task.primary) for task in sweep.tasks))
    models = {task.name: [{task.primary: rows} for rows in sweep.models.get(task.name, ())] for task in sweep.tasks}
    for number in range(len(sweep.points)):
        history.append(_measured(sweep, number, history, goal, models, (seed, number), found))
    done: set[int] = set()
    while len(done) < POLICY.finalists:
        likely = [one for one in chosen.likely_best([goal], history, models) if one not in done]
        if not likely:
            break
        done.add(likely[0])
        history[likely[0]] = _measured(
            sweep, likely[0], history, goal, models, (seed, likely[0], 1), found, history[likely[0]]
        )
    found.whole = {one.number: float(sweep.values[one.number]) for one in history if one.whole}
    return found


def _measured(
    sweep: Recorded,
    number: int,
    history: Sequence[MeasuredTrial],
    goal: Goal,
    models: Any,
    seed: Sequence[int],
    found: Simulated,
    again: MeasuredTrial | None = None,
) -> MeasuredTrial:
    counts = {task.name: count for task, count in zip(sweep.tasks, sweep.counts, strict=True)}
    firsts = np.cumsum([0, *sweep.counts])
    point = sweep.points[number]
    reporter = AdaptiveReporter([goal], list(history), models, counts, seed, point, again)
    before, truth = reporter.done, goal.sign * float(sweep.values[number])
    try:
        for one in np.unique(reporter.rounds[reporter.rounds >= 0]):
            for task, first, count in zip(sweep.tasks, firsts[:-1], sweep.counts, strict=True):
                members = np.flatnonzero(reporter.rounds[first : first + count] == one)
                if len(members):
                    reporter.report(first + members, {task.primary: sweep.trials[task.name][number][members]})
    except Pruned:
        found.used += reporter.done - before
        estimates = reporter.estimates({name: np.zeros(count, np.int64) for name, count in counts.items()})
        estimate = estimates[goal.name if len(sweep.tasks) > 1 else sweep.tasks[0].primary]
        assert estimate.low is not None
        assert estimate.high is not None
        if again is None:
            half = max(estimate.value - estimate.low, estimate.high - estimate.value)  # one may be cut
            found.estimates.append((estimate.value, half, truth))
        return MeasuredTrial(number, (estimate.value,), reporter.measured(), whole=False, point=point)
    found.used += sweep.size - before
    return MeasuredTrial(number, (truth,), reporter.measured(), whole=True, point=point)


def subset(sweep: Recorded, seed: int, share: float) -> Simulated:
    """Measure every trial on the same random examples, and the best of them whole."""
    members = _members(sweep, seed, share)
    return _best_whole(sweep, members, np.mean([_values_on(sweep, task, members) for task in sweep.tasks], axis=0))


def merge3(sweep: Recorded, seed: int, share: float) -> Simulated:
    """Measure every trial on the same random examples, and the best by MERGE³'s estimate whole."""
    members, values = _members(sweep, seed, share), []
    for task in sweep.tasks:
        models = np.stack([scores_for(task, task.primary, rows) for rows in sweep.models[task.name]])
        trials = np.stack([scores_for(task, task.primary, rows) for rows in sweep.trials[task.name]])
        model, experts, at = irt.fit(models), np.arange(1, len(models)), members[task.name]
        values.append([irt.estimate(model, experts, at, scores[at]) for scores in trials])
    return _best_whole(sweep, members, np.mean(values, axis=0))


def takes_answers(sweep: Recorded) -> bool:
    """Return whether all scores are right or wrong, which an item response model is of."""
    return all(
        not is_linearised(task, task.primary)
        and bool(np.isin(scores_for(task, task.primary, np.concatenate(list(sweep.trials[task.name]))), (0, 1)).all())
        and len(sweep.models.get(task.name, ())) > 1
        for task in sweep.tasks
    )


def _members(sweep: Recorded, seed: int, share: float) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {
        task.name: rng.permutation(count)[: max(round(share * count), 2)]
        for task, count in zip(sweep.tasks, sweep.counts, strict=True)
    }


def _values_on(sweep: Recorded, task: TaskSpec, members: Mapping[str, Array]) -> Array:
    sign = -1.0 if task.direction == "minimize" else 1.0
    rows = sweep.trials[task.name][:, members[task.name]]
    return np.array([sign * value_of_rows(task, task.primary, one) for one in rows])


def _best_whole(sweep: Recorded, members: Mapping[str, Array], values: Array) -> Simulated:
    best, count = int(np.argmax(values)), sum(map(len, members.values()))
    return Simulated(len(values) * count + sweep.size - count, {best: float(sweep.values[best])})


SHARES = (0.05, 0.1, 0.2, 0.4)
WAYS: Mapping[str, Callable[[Recorded, int], Simulated]] = {
    "full": full,
    "pruned": pruned,
    "adaptive": adaptive,
    **{f"random subset, {share:.0%}": partial(subset, share=share) for share in SHARES},
    **{f"MERGE³'s estimate, {share:.0%}": partial(merge3, share=share) for share in SHARES},
}
