"""How sure a score is: bootstrap intervals, a paired test of two models, and what a constant answer would get.

Every class metric depends on an example only through its cell in the confusion matrix. Drawing n examples with
replacement is therefore drawing the cells' counts from a multinomial distribution, which costs the same for 70 examples
as for 40 000. Correlations are computed from how often each example was drawn. Metrics of generated texts and of the
likelihood of given text are computed from the statistics of the drawn examples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mergelab.evaluation.metrics import (
    check_scorable,
    example_statistics,
    part_members,
    predicted,
    score,
    value_of_rows,
)

if TYPE_CHECKING:
    from mergelab.tasks.spec import TaskSpec

Array = np.ndarray[Any, Any]

# Resamples × examples that are worked on at a time: about 16 MB per array.
_CHUNK = 2_000_000


def bootstrap_interval(
    spec: TaskSpec,
    outputs: Array,
    truth: Array,
    *,
    samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    parts: Array | None = None,
) -> dict[str, tuple[float, float]]:
    """Compute each metric's percentile bootstrap interval over examples (Efron & Tibshirani 1993, ch. 13).

    Args:
        spec, outputs, truth, parts: as `mergelab.evaluation.metrics.score` takes them; the same names come back.
        samples: resamples.
        seed: of the draws.
        level: the share of resamples inside the interval.

    Raises:
        DataError: the examples have no labels, or shapes do not fit.
    """
    check_scorable(spec, outputs, truth)
    tail = (1 - level) / 2
    bounds: dict[str, tuple[float, float]] = {}
    for suffix, members in [("", np.arange(len(truth))), *((f"_{name}", m) for name, m in part_members(spec, parts))]:
        random = np.random.default_rng([seed, len(bounds)])
        (values,) = _resampled(spec, [outputs[members]], truth[members], samples, random)
        for name in spec.metrics:
            low, high = np.quantile(values[name], [tail, 1 - tail])
            bounds[name + suffix] = (float(low), float(high))
    return bounds


def paired_test(
    spec: TaskSpec, first: Array, second: Array, truth: Array, *, samples: int = 10_000, seed: int = 0
) -> float:
    """Test whether two models differ on the task's primary metric: paired bootstrap, two-sided.

    Both models are scored on the same resamples. With δ the difference on the data and δ* that on a resample, the
    distribution of δ* − δ stands for that of the difference were there none; the p-value is the share of resamples with
    |δ* − δ| ≥ |δ|, the data themselves counted in: (1 + hits) / (1 + samples).

    Efron & Tibshirani 1993, ch. 16; Berg-Kirkpatrick, Burkett & Klein 2012 (whose test is the one-sided δ* ≥ 2δ);
    the added one: Davison & Hinkley 1997, §4.2.

    Args:
        first, second: outputs of the two models, as `mergelab.evaluation.metrics.score` takes them.
        truth: as there.

    Raises:
        DataError: the examples have no labels, or shapes do not fit.
    """
    spec = replace(spec, metrics=(spec.primary,))
    at = [score(spec, outputs, truth)[spec.primary] for outputs in (first, second)]
    delta = at[0] - at[1]
    drawn = _resampled(spec, [first, second], truth, samples, np.random.default_rng(seed))
    moved = drawn[0][spec.primary] - drawn[1][spec.primary] - delta
    # The tolerance keeps ties, which are common with few examples, from being decided by rounding.
    hits = int((np.abs(moved) >= abs(delta) - 1e-12).sum())
    return (1 + hits) / (1 + samples)


def chance_level(spec: TaskSpec, truth: Array) -> float | None:
    """Return what the best constant prediction gets on the primary metric; ``None`` where there is no such thing.

    Correlations, which a constant has not, are 0, and so is what an empty text gets.
    """
    if spec.direction == "minimize" or not spec.metrics:
        return None
    if spec.kind == "generation" and spec.labels is not None:
        constants = [np.full(len(truth), word) for word in spec.verbalizer or spec.labels]
        return max(score(replace(spec, metrics=(spec.primary,)), c, truth)[spec.primary] for c in constants)
    if spec.labels is None:
        return 0.0
    constants = [np.full(len(truth), label) for label in range(spec.outputs)]
    return max(float(_from_counts(spec.primary, _confusion(spec, c, truth)[None])[0]) for c in constants)


# -------------------------------------------------------------------------------------------------------------- drawing


def _resampled(
    spec: TaskSpec, outputs: Sequence[Array], truth: Array, samples: int, random: np.random.Generator
) -> list[dict[str, Array]]:
    """Score each model's outputs on the same resamples: per model and metric, (samples,) values."""
    if not spec.outputs:
        return _resampled_rows(spec, [example_statistics(spec, own, truth) for own in outputs], samples, random)
    predictions = [predicted(spec, own) for own in outputs]
    if spec.is_regression:
        found: list[list[dict[str, Array]]] = [[] for _ in predictions]
        for counts in _draw_counts(len(truth), samples, random):
            for model, values in zip(found, predictions, strict=True):
                model.append(_correlations(spec.metrics, values, truth, counts))
        return [{name: np.concatenate([chunk[name] for chunk in model]) for name in spec.metrics} for model in found]
    classes = spec.outputs
    shape = (classes,) * (len(predictions) + 1)
    cells = np.ravel_multi_index((*predictions, truth), shape)
    frequency = np.bincount(cells, minlength=int(np.prod(shape))) / len(truth)
    drawn = random.multinomial(len(truth), frequency, size=samples).reshape(samples, *shape)
    models = range(len(predictions))
    confusions = [drawn.sum(axis=tuple(1 + other for other in models if other != model)) for model in models]
    return [{name: _from_counts(name, confusion) for name in spec.metrics} for confusion in confusions]


def _resampled_rows(
    spec: TaskSpec, models: Sequence[dict[str, Array]], samples: int, random: np.random.Generator
) -> list[dict[str, Array]]:
    found = [{name: np.empty(samples) for name in spec.metrics} for _ in models]
    count = len(models[0][spec.metrics[0]])
    for index in range(samples):
        drawn = random.integers(count, size=count)
        for values, rows in zip(found, models, strict=True):
            for name in spec.metrics:
                values[name][index] = value_of_rows(spec, name, rows[name][drawn])
    return found


def _draw_counts(examples: int, samples: int, random: np.random.Generator) -> Iterator[Array]:
    """Yield, in chunks, how often each resample has each example: (chunk, n) float64."""
    step = max(1, _CHUNK // examples)
    for start in range(0, samples, step):
        rows = min(step, samples - start)
        drawn = random.integers(examples, size=(rows, examples)) + np.arange(rows)[:, None] * examples
        yield np.bincount(drawn.ravel(), minlength=rows * examples).reshape(rows, examples).astype(np.float64)


# -------------------------------------------------------------------------------------------------------- class metrics


def _confusion(spec: TaskSpec, predictions: Array, labels: Array) -> Array:
    """Count (predicted, true) pairs: (K, K)."""
    classes = spec.outputs
    return np.bincount(predictions * classes + labels, minlength=classes**2).reshape(classes, classes)


def _from_counts(metric: str, confusion: Array) -> Array:
    """Compute a class metric from confusion matrices (samples, predicted, true): (samples,)."""
    counts = confusion.astype(np.float64)
    total, right = counts.sum(axis=(1, 2)), np.trace(counts, axis1=1, axis2=2)
    said, true = counts.sum(axis=2), counts.sum(axis=1)
    if metric == "accuracy":
        return np.asarray(right / total)
    if metric == "f1":
        return _ratio(2 * counts[:, 1, 1], said[:, 1] + true[:, 1])
    # Gorodkin 2004, R_K; with two classes Matthews' φ.
    spread = (total**2 - (said**2).sum(axis=1)) * (total**2 - (true**2).sum(axis=1))
    return _ratio(right * total - (said * true).sum(axis=1), np.sqrt(spread))


def _ratio(numerator: Array, denominator: Array) -> Array:
    """Divide, with 0 where there is nothing to divide by."""
    return np.divide(numerator, denominator, out=np.zeros_like(denominator), where=denominator > 0)


# --------------------------------------------------------------------------------------------------------- correlations


def _correlations(metrics: Sequence[str], predictions: Array, labels: Array, counts: Array) -> dict[str, Array]:
    """Compute correlations of predictions and labels (n,) on resamples with ``counts`` (samples, n): (samples,)."""
    x, y = np.asarray(predictions, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    found = {}
    if "pearson" in metrics:
        found["pearson"] = _weighted_pearson(x[None], y[None], counts)
    if "spearmanr" in metrics:
        found["spearmanr"] = _weighted_pearson(_ranks(x, counts), _ranks(y, counts), counts)
    return found


def _weighted_pearson(x: Array, y: Array, counts: Array) -> Array:
    """Pearson's r of (samples or 1, n) values with weights (samples, n): (samples,); 0 where one is constant."""
    total = counts.sum(axis=1, keepdims=True)
    mean_x, mean_y = ((counts * values).sum(axis=1, keepdims=True) / total for values in (x, y))
    dx, dy = x - mean_x, y - mean_y
    norm_x, norm_y = (np.sqrt((counts * d * d).sum(axis=1)) for d in (dx, dy))
    # What remains of a constant after subtracting its rounded mean is not variation.
    rounding = 1e-13 * np.sqrt(total)
    varies = (norm_x > (rounding * np.abs(mean_x))[:, 0]) & (norm_y > (rounding * np.abs(mean_y))[:, 0])
    return np.where(varies, _ratio((counts * dx * dy).sum(axis=1), norm_x * norm_y), 0.0)


def _ranks(values: Array, counts: Array) -> Array:
    """Rank the examples (n,) within each resample, ties and repeats sharing their mean rank: (samples, n)."""
    distinct, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(len(distinct)))
    in_group = np.add.reduceat(counts[:, order], starts, axis=1)
    last = np.cumsum(in_group, axis=1)
    mean_rank: Array = last - (in_group - 1) / 2
    return mean_rank[:, group]
