"""What Pearson's and Spearman's correlations share."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from mergelab.evaluation.metrics._ratio import ratio
from mergelab.tasks.metric import Array, ScoreMetric


class Correlation(ScoreMetric, base=True):
    """A correlation of predicted and true scores; 0 where one of them is constant."""

    citation = "Virtanen et al. 2020, SciPy 1.0, Nature Methods 17"
    direction = "maximize"
    chance = 0.0
    min_examples = 2


def defined(function: Callable[..., Any], predictions: Any, references: Any) -> float:
    """Compute a correlation by SciPy's ``function``; of constant scores, for which that is NaN, it is 0."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = float(function(predictions, references).statistic)
    return 0.0 if math.isnan(value) else value


def weighted_pearson(x: Array, y: Array, counts: Array) -> Array:
    """Compute Pearson's r of (samples or 1, n) values with weights (samples, n): (samples,); of constants it is 0."""
    total = counts.sum(axis=1, keepdims=True)
    mean_x, mean_y = ((counts * values).sum(axis=1, keepdims=True) / total for values in (x, y))
    dx, dy = x - mean_x, y - mean_y
    norm_x, norm_y = (np.sqrt((counts * d * d).sum(axis=1)) for d in (dx, dy))
    # What remains of a constant after subtracting its rounded mean is not variation.
    rounding = 1e-13 * np.sqrt(total)
    varies = (norm_x > (rounding * np.abs(mean_x))[:, 0]) & (norm_y > (rounding * np.abs(mean_y))[:, 0])
    return np.where(varies, ratio((counts * dx * dy).sum(axis=1), norm_x * norm_y), 0.0)
