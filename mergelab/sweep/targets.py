"""Which number of each example a metric is estimated from, and how the metric follows from their sums."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mergelab.evaluation.metrics._perplexity import Perplexity
from mergelab.evaluation.metrics._sacrebleu import CorpusMetric
from mergelab.evaluation.metrics.pearson import Pearson
from mergelab.tasks.metric import LabelMetric, MeanTextMetric, get_metric

if TYPE_CHECKING:
    from mergelab.tasks.spec import TaskSpec

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Target:
    """A metric as a function of the sums of its examples' scores.

    Attributes:
        groups: (n, G) float64, 1 where an example is in a group; a metric of the whole has one group.
        value: computes the metric from the groups' sums (G,).
    """

    groups: Array
    value: Callable[[Array], float]

    def gradient(self, sums: Array, steps: Array) -> Array:
        """Return the metric's slope (G,) in each sum, between ``steps`` (G,) to both sides; 0 where a step is 0."""
        slopes = np.zeros(len(sums))
        for group in np.flatnonzero(steps):
            step = np.where(np.arange(len(sums)) == group, steps, 0.0)
            slopes[group] = (self.value(sums + step) - self.value(sums - step)) / (2 * steps[group])
        return slopes

    def with_error(self, sums: Array, covariance: Array) -> tuple[float, float]:
        """Return the metric at uncertain ``sums`` (G,), and its standard error by their ``covariance`` (G, G).

        The error is that of the metric with its slopes in place of itself: exact for a linear metric.
        """
        slopes = self.gradient(sums, np.sqrt(np.maximum(np.diag(covariance), 0.0)))
        return self.value(sums), math.sqrt(max(float(slopes @ covariance @ slopes), 0.0))


def mean_of(targets: Sequence[Target]) -> Target:
    """Return the mean of the metrics of several tasks, whose examples come one task after the other."""
    if len(targets) == 1:
        return targets[0]
    rows = np.cumsum([0, *(len(one.groups) for one in targets)])
    columns = np.cumsum([0, *(one.groups.shape[1] for one in targets)])
    groups = np.zeros((rows[-1], columns[-1]))
    for index, one in enumerate(targets):
        groups[rows[index] : rows[index + 1], columns[index] : columns[index + 1]] = one.groups

    def value(sums: Array) -> float:
        parts = np.split(sums, columns[1:-1])
        return float(np.mean([one.value(part) for one, part in zip(targets, parts, strict=True)]))

    return Target(groups, value)


def unsupported(spec: TaskSpec, metric: str) -> str | None:
    """Say why a metric cannot be estimated from its examples' scores; None where it can."""
    declared = get_metric(metric)
    if isinstance(declared, LabelMetric | Perplexity | Pearson | CorpusMetric):
        written = isinstance(declared, LabelMetric) and not spec.outputs and metric != "accuracy"
        return f"{metric} of written labels" if written else None
    if isinstance(declared, MeanTextMetric):
        own = type(declared).from_statistics is not MeanTextMetric.from_statistics
        return f"{metric} is no mean over examples" if own else None
    return f"{metric} is no function of sums over its examples"


def is_linearised(spec: TaskSpec, metric: str) -> bool:
    """Return whether a metric's examples have several numbers each, whose sums it is no simple function of."""
    declared = get_metric(metric)
    if isinstance(declared, LabelMetric):
        return metric != "accuracy" and spec.outputs != 2
    return isinstance(declared, Pearson | CorpusMetric)


def is_mean_of_scores(spec: TaskSpec, metric: str) -> bool:
    """Return whether a metric grows with the sum of `mergelab.sweep.selecting.example_scores`."""
    declared = get_metric(metric)
    if spec.kind == "classification":
        return metric == "accuracy"
    mean = isinstance(declared, Perplexity | MeanTextMetric) and unsupported(spec, metric) is None
    return metric == spec.primary and (mean or metric == "accuracy")


def family(spec: TaskSpec, metric: str) -> str:
    """Name what the scores of a metric's examples are: metrics of the same name are estimated from the same scores."""
    labelled = isinstance(get_metric(metric), LabelMetric) and not is_linearised(spec, metric)
    return "right" if labelled else metric


def scores_for(spec: TaskSpec, metric: str, rows: Array) -> Array:
    """Return the scores (k,) that a metric is estimated from, of its statistics (k, c), unless it is linearised.

    Right or wrong for labels, nats for perplexity, the metric of the text alone for others.
    """
    if isinstance(get_metric(metric), LabelMetric):
        return np.asarray(rows[:, 0] == rows[:, 1], np.float64)
    return np.asarray(rows[:, 0], np.float64)


def target_of(spec: TaskSpec, metric: str, rows: Array, members: Array | None = None) -> Target:
    """Return what a metric is of its examples, of which ``rows`` (n, c) are the statistics of any model.

    Of these only what is the same for all models counts: true labels, numbers of tokens.

    Args:
        spec, metric: the task and its metric.
        rows: the statistics of all examples.
        members: (m,) positions of those that the metric is of; None: all.
    """
    declared = get_metric(metric)
    if is_linearised(spec, metric):
        return Target(np.ones((len(rows), 1)), lambda sums: float(sums[0]))
    inside = np.ones((len(rows), 1)) if members is None else np.isin(np.arange(len(rows)), members)[:, None] * 1.0
    if isinstance(declared, LabelMetric):
        return _of_labels(declared, rows[:, 1], inside)
    if isinstance(declared, MeanTextMetric):
        return Target(inside, lambda sums: float(sums[0]) / float(inside.sum()))
    units = (inside.T @ rows)[0, 1:]
    return Target(inside, lambda sums: declared.from_statistics(np.concatenate([sums, units])[None]))


def _of_labels(metric: LabelMetric, truth: Array, inside: Array) -> Target:
    """Return a metric of the number of right answers for each true label; of two labels each wrong one is known."""
    labels = np.unique(truth)
    groups = np.asarray(truth[:, None] == labels, np.float64) * inside
    sizes = groups.sum(axis=0)
    other = np.where(labels == 0, 1, 0)
    pairs = np.concatenate([np.stack([labels, labels], axis=1), np.stack([other, labels], axis=1)])

    def value(sums: Array) -> float:
        right = np.clip(sums, 0, sizes)
        return float(metric.from_counts(pairs, np.concatenate([right, sizes - right])[None])[0])

    return Target(groups, value)


# --------------------------------------------------------------------------------- metrics of several sums, linearised


def linear_scores(spec: TaskSpec, metric: str, rows: Array, seen: Array, best: Array) -> Array:
    """Return what each example adds to a metric of several sums, where that is linear near the sums of the model.

    A model that was measured on all examples has scores whose sum is its metric.

    Args:
        spec, metric: the task and its metric, one that `is_linearised`.
        rows: (k, c) statistics of the model on the examples that it was measured on.
        seen: (k,) positions of these.
        best: (n, c) statistics of another model on all examples: where the model's sums are not known, they are thought
            to be like the other's.
    """
    if isinstance(get_metric(metric), Pearson):
        return _of_correlation(rows, seen, best)
    count, summed, of_best = len(best), summands(spec, metric, rows), summands(spec, metric, best)
    # As the other's, and by as much per example more or less as on those that both were measured on.
    sums = of_best.sum(axis=0) + count * (summed - of_best[seen]).mean(axis=0)
    sums = np.maximum(sums.round(), 0.0)
    whole = Target(np.empty((0, len(sums))), lambda at: _of_sums(spec, metric, at))
    slopes = whole.gradient(sums, np.maximum((sums / 100).round(), 1.0))  # those over a hundredth of each sum
    found: Array = summed @ slopes + (whole.value(sums) - float(sums @ slopes)) / count
    return found


def _of_correlation(rows: Array, seen: Array, best: Array) -> Array:
    """Return what each example (k,) adds to a correlation, by its influence function.

    With standardised x and y that is r + xy - r(x² + y²)/2 (Devlin, Gnanadesikan & Kettenring 1975, Biometrika 62:531).
    Mean, deviation and r of predictions that are not all known are the other model's, by how both differ on the same.
    """
    (x, y), (others, truth) = rows.T, best.T
    mean, deviation = x.mean(), x.std()
    r = _correlation(x, y)
    if len(seen) < len(best):
        scale = deviation / others[seen].std() if others[seen].std() > 0 else 1.0
        mean += (others.mean() - others[seen].mean()) * scale
        deviation = others.std() * scale
        r = _correlation(others, truth) + r - _correlation(others[seen], y)
        r = min(max(r, -1.0), 1.0)
    if deviation == 0 or truth.std() == 0:
        return np.zeros(len(rows))
    x, y = (x - mean) / deviation, (y - truth.mean()) / truth.std()
    return np.asarray((r + x * y - r * (x * x + y * y) / 2) / len(best))


def _correlation(x: Array, y: Array) -> float:
    spread = float(x.std() * y.std())
    return float(((x - x.mean()) * (y - y.mean())).mean()) / spread if spread > 0 else 0.0


def summands(spec: TaskSpec, metric: str, rows: Array) -> Array:
    """Return the numbers (k, m) of each example whose sums a linearised metric follows from, of statistics (k, c)."""
    declared = get_metric(metric)
    if isinstance(declared, LabelMetric):
        cells = rows[:, 0].astype(int) * spec.outputs + rows[:, 1].astype(int)
        return np.asarray(np.eye(spec.outputs**2)[cells])
    return rows


def _of_sums(spec: TaskSpec, metric: str, sums: Array) -> float:
    declared = get_metric(metric)
    if isinstance(declared, LabelMetric):
        cells = np.stack(np.divmod(np.arange(len(sums)), spec.outputs), axis=1).astype(np.float64)
        return float(declared.from_counts(cells, np.maximum(sums, 0.0)[None])[0])
    return declared.from_statistics(np.maximum(sums, 0.0)[None])
