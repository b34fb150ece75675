"""Uncertainty of scores: bootstrap intervals, a paired test of two models, and the chance level.

A metric of classes depends on an example only through its cell in the confusion matrix. Drawing n examples with
replacement is therefore drawing the cells' counts from a multinomial distribution, which costs the same for 70 examples
as for 40 000. Correlations are computed from how often each example was drawn. Metrics of generated texts and of the
likelihood of given text are computed from the statistics of the drawn examples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from mergelab.evaluation.metrics import check_scorable, example_statistics, part_members, value_of_rows
from mergelab.tasks.metric import BEST_CONSTANT, PairMetric, get_metric

if TYPE_CHECKING:
    from mergelab.tasks.spec import TaskSpec

Array = np.ndarray[Any, Any]

# Resamples × examples that are worked on at a time: about 16 MB per array.
_CHUNK = 2_000_000
# Resamples of those of lm-eval's metrics that go through pairs or texts in Python, for their intervals.
_SLOW_RESAMPLES = 200


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
        for name, drawn in values.items():
            low, high = np.quantile(drawn, [tail, 1 - tail])
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
    at = []
    for outputs in (first, second):
        check_scorable(spec, outputs, truth)
        at.append(value_of_rows(spec, spec.primary, example_statistics(spec, outputs, truth)[spec.primary]))
    delta = at[0] - at[1]
    drawn = _resampled(spec, [first, second], truth, samples, np.random.default_rng(seed))
    moved = drawn[0][spec.primary] - drawn[1][spec.primary] - delta
    # The tolerance keeps ties, which are common with few examples, from being decided by rounding.
    hits = int((np.abs(moved) >= abs(delta) - 1e-12).sum())
    return (1 + hits) / (1 + samples)


def chance_level(spec: TaskSpec, truth: Array) -> float | None:
    """Return what a constant answer gets on the primary metric, as the metric declares it; ``None``: nothing does."""
    if not spec.metrics:
        return None
    metric = get_metric(spec.primary)
    if metric.chance != BEST_CONSTANT:
        return metric.chance
    spec = replace(spec, metrics=(spec.primary,))
    scores = [
        value_of_rows(spec, spec.primary, example_statistics(spec, outputs, truth)[spec.primary])
        for outputs in _constant_outputs(spec, len(truth))
    ]
    return max(scores) if metric.direction == "maximize" else min(scores)


def _constant_outputs(spec: TaskSpec, count: int) -> list[Array]:
    """Return the outputs of models that always answer the same: one per label; without labels, empty texts."""
    if spec.kind == "classification":
        return [np.eye(spec.outputs)[np.full(count, label)] for label in range(spec.outputs)]
    return [np.full(count, word, dtype=object) for word in spec.verbalizer or spec.labels or ("",)]


# -------------------------------------------------------------------------------------------------------------- drawing


def _resampled(
    spec: TaskSpec, outputs: Sequence[Array], truth: Array, samples: int, random: np.random.Generator
) -> list[dict[str, Array]]:
    """Score each model's outputs on the same resamples: per model and metric, (samples,) values."""
    models = [example_statistics(spec, own, truth) for own in outputs]
    if spec.kind == "classification":
        return _resampled_cells(spec, models, samples, random)
    if spec.kind == "regression":
        return _resampled_counts(spec, models, samples, random)
    if spec.kind == "lm_eval":
        return _resampled_documents(models, truth, samples, random)
    return _resampled_rows(spec, models, samples, random)


def _resampled_cells(
    spec: TaskSpec, models: Sequence[dict[str, Array]], samples: int, random: np.random.Generator
) -> list[dict[str, Array]]:
    """Draw how often each cell of the joint confusion matrix of all models occurs."""
    pairs = [rows[spec.metrics[0]].astype(np.int64) for rows in models]  # each (n, 2): predicted and true
    classes, count = spec.outputs, len(pairs[0])
    shape = (classes,) * (len(models) + 1)
    cells = np.ravel_multi_index((*(own[:, 0] for own in pairs), pairs[0][:, 1]), shape)
    frequency = np.bincount(cells, minlength=int(np.prod(shape))) / count
    distinct = np.array(list(np.ndindex(classes, classes)), dtype=np.float64)  # (C², 2)
    found = [{name: np.empty(samples) for name in spec.metrics} for _ in models]
    step = max(1, _CHUNK // len(frequency))
    for start in range(0, samples, step):
        rows = min(step, samples - start)
        drawn = random.multinomial(count, frequency, size=rows).reshape(rows, *shape)
        for model, values in enumerate(found):
            confusion = drawn.sum(axis=tuple(1 + other for other in range(len(models)) if other != model))
            counts = confusion.reshape(rows, -1).astype(np.float64)
            for name in spec.metrics:
                values[name][start : start + rows] = _pair_metric(name).from_counts(distinct, counts)
    return found


def _resampled_counts(
    spec: TaskSpec, models: Sequence[dict[str, Array]], samples: int, random: np.random.Generator
) -> list[dict[str, Array]]:
    """Draw how often each example occurs."""
    found: list[dict[str, list[Array]]] = [{name: [] for name in spec.metrics} for _ in models]
    for counts in _draw_counts(len(models[0][spec.metrics[0]]), samples, random):
        for values, rows in zip(found, models, strict=True):
            for name in spec.metrics:
                values[name].append(_pair_metric(name).from_counts(rows[name], counts))
    return [{name: np.concatenate(chunks) for name, chunks in values.items()} for values in found]


def _resampled_rows(
    spec: TaskSpec, models: Sequence[dict[str, Array]], samples: int, random: np.random.Generator
) -> list[dict[str, Array]]:
    """Draw examples, and compute each resample's metrics from its examples' statistics."""
    found = [{name: np.empty(samples) for name in spec.metrics} for _ in models]
    count = len(models[0][spec.metrics[0]])
    for index in range(samples):
        drawn = random.integers(count, size=count)
        for values, rows in zip(found, models, strict=True):
            for name in spec.metrics:
                values[name][index] = value_of_rows(spec, name, rows[name][drawn])
    return found


def _resampled_documents(
    models: Sequence[dict[str, Array]], tasks: Array, samples: int, random: np.random.Generator
) -> list[dict[str, Array]]:
    """Draw documents of each of lm-eval's tasks among its own, and compute each resample's metrics.

    Metrics of pairs or texts have fewer values, where they are not alone.
    """
    strata = [np.flatnonzero(tasks == task) for task in np.unique(tasks)]
    few = [name for name, rows in models[0].items() if rows.dtype == object and len(models[0]) > 1]
    counts = {name: min(samples, _SLOW_RESAMPLES) if name in few else samples for name in models[0]}
    found = [{name: np.empty(counts[name]) for name in rows} for rows in models]
    having = [
        {name: [at for at, own in enumerate(strata) if (rows[own, 0] >= 0).any()] for name, rows in model.items()}
        for model in models
    ]
    for index in range(samples):
        drawn = [own[random.integers(len(own), size=len(own))] for own in strata]
        for values, model, places in zip(found, models, having, strict=True):
            for name, rows in model.items():
                if index < counts[name]:
                    of_tasks = np.concatenate([drawn[at] for at in places[name]])
                    values[name][index] = get_metric(name).from_statistics(rows[of_tasks])
    return found


def _pair_metric(name: str) -> PairMetric:
    """Return a metric of classes or scores, which by its declaration is a `PairMetric`."""
    return cast(PairMetric, get_metric(name))


def _draw_counts(examples: int, samples: int, random: np.random.Generator) -> Iterator[Array]:
    """Yield, in chunks, how often each resample has each example: (chunk, n) float64."""
    step = max(1, _CHUNK // examples)
    for start in range(0, samples, step):
        rows = min(step, samples - start)
        drawn = random.integers(examples, size=(rows, examples)) + np.arange(rows)[:, None] * examples
        yield np.bincount(drawn.ravel(), minlength=rows * examples).reshape(rows, examples).astype(np.float64)
