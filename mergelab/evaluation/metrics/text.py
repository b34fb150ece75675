"""Metrics of generated texts: per-example statistics, kept so that resamples cost no second look at the texts.

Each metric is an ``evaluate`` module of this package, loaded at first use, in two steps. ``statistics`` looks at every
text once and answers one row of numbers per example; ``from_statistics`` computes the metric from rows, of all examples
or of any choice of them. For ROUGE a row is the example's F1; for BLEU and chrF it is its n-gram counts, because these
are metrics of a whole corpus and no mean of sentence scores.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from mergelab.config import cache_dir
from mergelab.errors import DataError
from mergelab.tasks.metric_table import TEXT_METRICS

if TYPE_CHECKING:
    from mergelab.evaluation.metrics.text_modules import TextMetric

Array = np.ndarray[Any, Any]


def statistics(
    name: str, predictions: Sequence[str], references: Sequence[Sequence[str]], *, labels: Sequence[str] = ()
) -> Array:
    """Look at every example once and answer what the metric ``name`` needs of it.

    Args:
        name: one of `TEXT_METRICS`.
        predictions: n texts, or answers as `mergelab.tasks.prompting.answer` found them: empty where there is none.
        references: for each example one text or more.
        labels: the words that stand for the labels, in the dataset's order; metrics of labels need them.

    Returns:
        (n, k) float64, k depending on the metric alone.

    Raises:
        DataError: an example has no reference, the numbers of examples differ, or words for labels are missing.
    """
    if len(predictions) != len(references):
        raise DataError(f"{name}: {len(predictions)} predictions do not fit {len(references)} examples' references")
    if missing := [i for i, texts in enumerate(references) if not texts]:
        raise DataError(f"{name}: {len(missing)} examples have no reference (the first is number {missing[0]})")
    if TEXT_METRICS[name].needs_labels and not labels:
        raise DataError(f"{name}: needs the words that stand for the labels")
    return text_metric(name).statistics(predictions, references, labels)


def from_statistics(name: str, rows: Array) -> float:
    """Compute the metric ``name``, as a fraction, of the examples with these ``rows`` (n, k) of `statistics`.

    Raises:
        DataError: there are too few rows.
    """
    if len(rows) < TEXT_METRICS[name].at_least:
        raise DataError(f"{name}: {len(rows)} examples are too few to score")
    return text_metric(name).value(rows)


@functools.cache
def text_metric(name: str) -> TextMetric:
    """Load the ``evaluate`` module of one of `TEXT_METRICS`; its ``compute`` does both steps."""
    entry = TEXT_METRICS[name]
    # In memory: the default writes every prediction to a locked file in the user's home.
    found: TextMetric = getattr(import_module(entry.module), entry.cls)(
        keep_in_memory=True, cache_dir=str(cache_dir() / "metrics")
    )
    return found
