"""The score that a trial stopped early would have on all selecting examples, estimated from those that it saw."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from mergelab.evaluation.metrics import part_members, value_of_rows
from mergelab.tasks.metric import get_metric
from mergelab.tracking import names

if TYPE_CHECKING:
    from mergelab.tasks.metric import Metric
    from mergelab.tasks.spec import TaskSpec

Array = np.ndarray[Any, Any]
_GROUPS = 40  # of the jackknife: each costs one score
_LEVEL = 0.95
QUANTILE = 1.96  # of a normal distribution's interval of that level


@dataclass(frozen=True)
class Estimate:
    """An estimated score with its 95 % interval, and what it is estimated from.

    Attributes:
        value: on all selecting examples.
        low, high: the interval's bounds; None where too few examples were seen for one.
        seen: the trial's score on the examples that it saw.
        best_seen: the best complete trial's on the same; None where there was no such trial.
    """

    value: float
    low: float | None
    high: float | None
    seen: float
    best_seen: float | None


def estimates(
    spec: TaskSpec,
    seen: Array,
    statistics: Mapping[str, Array],
    best: Mapping[str, Array] | None,
    parts: Array,
) -> dict[str, Estimate]:
    """Estimate each metric of a task, and of each of its splits where it has several.

    Args:
        spec: the task.
        seen: (k,) positions, among the n selecting examples, of those that the trial saw.
        statistics: (k, c) by metric, what `mergelab.evaluation.metrics.example_statistics` returns of these.
        best: (n, c) by metric, the same of the best complete trial for all selecting examples; None without one.
        parts: (n,) position in ``spec.splits`` of each selecting example's split.

    Returns:
        The estimates by the names that `mergelab.evaluation.metrics.score` uses. A metric that is not defined on so few
        examples is missing.
    """
    found = {}
    for suffix, members in [("", np.arange(len(parts))), *((f"_{name}", m) for name, m in part_members(spec, parts))]:
        of_part = np.isin(seen, members)
        for metric, rows in statistics.items():
            others = None if best is None else best[metric][members]
            place = np.searchsorted(members, seen[of_part])
            if (one := estimate(spec, metric, rows[of_part], others, place, len(members))) is not None:
                found[metric + suffix] = one
    return found


def estimate(spec: TaskSpec, metric: str, own: Array, best: Array | None, seen: Array, count: int) -> Estimate | None:
    """Estimate a trial's score on ``count`` examples as the best trial's, plus the difference on those that both saw.

    For a mean over examples that difference is the mean paired difference. For a metric of a whole corpus (F1, BLEU, a
    correlation) it is the difference of the metrics of the same examples. Its standard error is that of the
    delete-a-group jackknife (Kott 2001, J. Official Statistics 17:521), which for a mean of at most 40 examples is the
    usual one. With k of n examples seen, only the others are uncertain: it shrinks by √(1 − k/n).

    Where no example differs there is no variance to estimate. By the rule of three, at most about 3/k of the others
    differ (Hanley & Lippman-Hand 1983, doi:10.1001/jama.1983.03330370053031).

    Args:
        spec, metric: the task and one of its metrics.
        own: (k, c) statistics of the examples seen.
        best: (n, c) those of the best complete trial; None: the estimate is the score so far.
        seen: (k,) positions of the examples seen.
        count: n.

    Returns:
        None where the metric is not defined on the examples seen.
    """
    found = unbounded(spec, metric, own, best, seen, count)
    if found is None:
        return None
    score, of_best, whole = found.score, found.of_best, found.whole
    fraction = max(score, whole, of_best or 0.0) <= 1
    return bounded(get_metric(metric), whole + found.difference, found.half, score, of_best, fraction)


@dataclass(frozen=True)
class Unbounded:
    """An estimate before it is cut to what the metric can be.

    Attributes:
        whole: the best trial's score on all examples; without such a trial, the trial's own on those seen.
        score, of_best: the trial's and the best one's on the examples seen.
        half: half the width of the 95 % interval of the difference; None where too few examples were seen for one.
    """

    whole: float
    score: float
    of_best: float | None
    half: float | None

    @property
    def difference(self) -> float:
        """How much greater the trial's score is than the best one's."""
        return 0.0 if self.of_best is None else self.score - self.of_best


def unbounded(spec: TaskSpec, metric: str, own: Array, best: Array | None, seen: Array, count: int) -> Unbounded | None:
    """Compute what `estimate` is made of; see there."""
    declared, value_of = get_metric(metric), partial(value_of_rows, spec, metric)
    if len(own) < max(declared.min_examples, 1):
        return None
    same = None if best is None else best[seen]
    score, of_best = value_of(own), None if same is None else value_of(same)
    whole = score if best is None else value_of(best)
    if not math.isfinite(whole if of_best is None else whole + score - of_best):
        return None

    def difference(members: Array) -> float:
        return value_of(own[members]) - (0.0 if same is None else value_of(same[members]))

    unseen = 1 - len(own) / count
    half = _half_width(difference, len(own), declared.min_examples)
    if half:
        half *= math.sqrt(unseen)
    elif half == 0:
        half = min(3 / len(own), 1.0) * unseen * max(abs(whole), abs(1 - whole) if abs(whole) <= 1 else 0.0)
    return Unbounded(whole, score, of_best, half)


def bounded(
    metric: Metric, value: float, half: float | None, seen: float, best_seen: float | None, fraction: bool
) -> Estimate:
    """Return an estimate within what the metric can be: at most 1 for a fraction or a correlation, none below 0."""
    ceiling, floor = math.inf, -math.inf
    if metric.direction == "minimize":
        floor = 0.0
    elif fraction:
        ceiling = 1.0
    value = min(max(value, floor), ceiling)
    low = None if half is None else max(value - half, floor)
    high = None if half is None else min(value + half, ceiling)
    return Estimate(value, low, high, seen, best_seen)


def _half_width(statistic: Callable[[Array], float], count: int, least: int) -> float | None:
    """Return half the width of a statistic's 95 % interval over ``count`` examples, by the delete-a-group jackknife.

    Args:
        statistic: computes it of the examples that a mask (count,) has.
        count: examples.
        least: the fewest that it is defined on.
    """
    from scipy.special import stdtrit

    groups = min(count, _GROUPS)
    if groups < 2 or count - math.ceil(count / groups) < max(least, 1):
        return None
    group = np.arange(count) % groups
    without = np.array([statistic(group != one) for one in range(groups)])
    if not np.isfinite(without).all():
        return None
    error = math.sqrt((groups - 1) / groups * float(((without - without.mean()) ** 2).sum()))
    # Rounding makes no difference between examples.
    return 0.0 if error < 1e-12 else error * float(stdtrit(groups - 1, (1 + _LEVEL) / 2))


def estimate_metrics(logged: Mapping[str, float], estimated: Mapping[str, Estimate]) -> dict[str, float]:
    """Return the metrics of a trial's estimates with their bounds: of a complete one its scores.

    Args:
        logged: what is logged of the trial: ``select/<metric>`` only where it is complete.
        estimated: of a trial that was stopped early, by metric.
    """
    prefix = names.select_metric("")
    found: dict[str, float] = {}
    for name, value in logged.items():
        if name.startswith(prefix) and name not in (names.SELECT_EXAMPLES, names.SELECT_NORMALISED):
            metric = names.estimate_metric(name.removeprefix(prefix))
            found |= {metric: value, names.low(metric): value, names.high(metric): value}
    for name, one in estimated.items():
        metric = names.estimate_metric(name)
        found[metric] = one.value
        if one.low is not None and one.high is not None:
            found |= {names.low(metric): one.low, names.high(metric): one.high}
    return found
