"""Correlations of predicted with true scores, as ``evaluate`` modules built on SciPy."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import datasets
import evaluate
from scipy.stats import pearsonr, spearmanr

_CITATION = "Virtanen et al. 2020, SciPy 1.0, Nature Methods 17"
_INPUTS = "predictions and references: scores, n ≥ 2 of each"


def _info(description: str) -> Any:
    features = datasets.Features({"predictions": datasets.Value("float64"), "references": datasets.Value("float64")})
    return evaluate.MetricInfo(description, _CITATION, features, inputs_description=_INPUTS)


def _correlation(function: Callable[..., Any], predictions: Any, references: Any) -> float:
    """Call ``function``; constant scores tell nothing, which counts as a correlation of 0 and not as NaN."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = float(function(predictions, references).statistic)
    return 0.0 if math.isnan(value) else value


def pearson(predictions: Any, references: Any) -> float:
    """Compute Pearson's correlation of two sequences of n ≥ 2 numbers."""
    return _correlation(pearsonr, predictions, references)


def spearman(predictions: Any, references: Any) -> float:
    """Compute Spearman's rank correlation of two sequences of n ≥ 2 numbers."""
    return _correlation(spearmanr, predictions, references)


class Pearson(evaluate.Metric):  # type: ignore[misc]
    """Pearson's linear correlation."""

    def _info(self) -> Any:
        return _info("Pearson's linear correlation.")

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"pearson": pearson(predictions, references)}


class Spearmanr(evaluate.Metric):  # type: ignore[misc]
    """Spearman's rank correlation."""

    def _info(self) -> Any:
        return _info("Spearman's rank correlation.")

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"spearmanr": spearman(predictions, references)}
