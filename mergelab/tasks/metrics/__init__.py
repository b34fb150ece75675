"""Score predictions with a task's official metrics.

The metrics are ``evaluate`` modules of this package, loaded at first use: ``import evaluate`` takes seconds.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mergelab.config import cache_dir
from mergelab.errors import DataError

if TYPE_CHECKING:
    from mergelab.tasks.spec import TaskSpec

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class MetricEntry:
    """Where a metric's class is, and what kind of task it is for."""

    kind: Literal["classification", "regression"]
    module: str
    cls: str


METRICS: dict[str, MetricEntry] = {
    "accuracy": MetricEntry("classification", "mergelab.tasks.metrics.classification", "Accuracy"),
    "f1": MetricEntry("classification", "mergelab.tasks.metrics.classification", "F1"),
    "matthews_correlation": MetricEntry(
        "classification", "mergelab.tasks.metrics.classification", "MatthewsCorrelation"
    ),
    "pearson": MetricEntry("regression", "mergelab.tasks.metrics.regression", "Pearson"),
    "spearmanr": MetricEntry("regression", "mergelab.tasks.metrics.regression", "Spearmanr"),
}


def score(spec: TaskSpec, logits: Array, labels: Array, *, parts: Array | None = None) -> dict[str, float]:
    """Compute a task's metrics as fractions.

    Args:
        spec: the task.
        logits: (n, C) outputs with one column per dataset label, in the dataset's order; (n, 1) for regression.
        labels: (n,) true labels.
        parts: (n,) position in ``spec.splits`` of the split that each example is from. Where the task has several
            splits, adds each metric of each: ``accuracy_matched`` beside ``accuracy``.

    Raises:
        DataError: the examples have no labels, or shapes do not fit.
    """
    check_scorable(spec, logits, labels)
    predictions = predicted(spec, logits)
    values = {name: _compute(name, predictions, labels) for name in spec.metrics}
    for suffix, members in part_members(spec, parts):
        values |= {f"{name}_{suffix}": _compute(name, predictions[members], labels[members]) for name in spec.metrics}
    return values


def predicted(spec: TaskSpec, logits: Array) -> Array:
    """Answer the predictions that ``logits`` (n, C) say: class indices (n,) int64, or scores (n,) float64."""
    return logits[:, 0].astype(np.float64) if spec.is_regression else logits.argmax(axis=1)


def part_members(spec: TaskSpec, parts: Array | None) -> list[tuple[str, Array]]:
    """Name the parts of a task with several splits (``matched``) and say which examples (positions) are in each."""
    if parts is None or len(spec.splits) < 2:
        return []
    found = [
        (split.removeprefix("validation_"), np.flatnonzero(parts == index)) for index, split in enumerate(spec.splits)
    ]
    return [(name, members) for name, members in found if len(members)]


def check_scorable(spec: TaskSpec, logits: Array, labels: Array) -> None:
    """Check that predictions fit the task and that there are labels to score them against.

    Raises:
        DataError: they do not, or there are none.
    """
    if logits.shape != (len(labels), spec.outputs):
        raise DataError(
            f"{spec.name}: outputs of shape {logits.shape} do not fit {len(labels)} examples × {spec.outputs}"
        )
    check_labels(spec, labels)
    if len(labels) < (2 if spec.is_regression else 1):
        raise DataError(f"{spec.name}: {len(labels)} examples are too few to score")


def check_labels(spec: TaskSpec, labels: Array) -> None:
    """Check that the labels are known.

    Raises:
        DataError: they are hidden, as in GLUE's test splits.
    """
    if (np.isnan(labels) if spec.is_regression else labels < 0).any():
        raise DataError(f"{spec.name}: the labels of this split are hidden; it can be predicted, but not scored here")


def _compute(name: str, predictions: Array, references: Array) -> float:
    found = _metric(name).compute(predictions=predictions, references=references)
    return float(found[name])


@functools.cache
def _metric(name: str) -> Any:
    entry = METRICS[name]
    # In memory: the default writes every prediction to a locked file in the user's home.
    return getattr(import_module(entry.module), entry.cls)(keep_in_memory=True, cache_dir=str(cache_dir() / "metrics"))
