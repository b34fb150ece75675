"""Which number of each example a metric is estimated from, and how the metric follows from their sums."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mergelab.evaluation.metrics._perplexity import Perplexity
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

    def with_error(self, sums: Array, covariance: Array) -> tuple[float, float]:
        """Return the metric at uncertain ``sums`` (G,), and its standard error by their ``covariance`` (G, G).

        The error is the root of the sum, over the covariance's axes, of the squared half difference of the metric one
        standard deviation to both sides: exact for a linear metric.
        """
        variances, axes = np.linalg.eigh(covariance)
        steps = np.sqrt(np.maximum(variances, 0.0)) * axes
        halves = [(self.value(sums + step) - self.value(sums - step)) / 2 for step in steps.T]
        return self.value(sums), float(np.sqrt(np.sum(np.square(halves))))


def unsupported(spec: TaskSpec, metric: str) -> str | None:
    """Say why a metric cannot be estimated from its examples' scores; None where it can."""
    declared = get_metric(metric)
    if isinstance(declared, LabelMetric):
        binary = spec.kind == "classification" and spec.outputs == 2
        return None if metric == "accuracy" or binary else f"{metric} of {spec.outputs or 'written'} labels"
    if isinstance(declared, MeanTextMetric):
        own = type(declared).from_statistics is not MeanTextMetric.from_statistics
        return f"{metric} is no mean over examples" if own else None
    return None if isinstance(declared, Perplexity) else f"{metric} is no function of its examples' scores"


def scores_for(spec: TaskSpec, metric: str, rows: Array) -> Array:
    """Return the scores (k,) that a metric is estimated from, of its statistics (k, c).

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
