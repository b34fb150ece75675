"""Metrics of answers that were found in generated texts, as ``evaluate`` modules.

An answer that was not found is empty, and wrong. References are answers too: a number, a label's word, a score.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mergelab.evaluation.metrics import regression
from mergelab.evaluation.metrics.text_modules import Array, TextMetric, Texts

_SKLEARN = "Pedregosa et al. 2011, Scikit-learn: Machine Learning in Python, JMLR 12"
_SCIPY = "Virtanen et al. 2020, SciPy 1.0, Nature Methods 17"

# What an invalid answer counts as where answers are scores; the scale of STS-B starts at 0 (Raffel et al. 2020).
_NO_SCORE = -1.0


class ExactMatch(TextMetric):
    """The fraction of answers that are one of their references."""

    metric = "exact_match"
    citation = "Rajpurkar et al. 2016, arXiv:1606.05250"

    def _rows(self, predictions: Texts, references: Sequence[Texts], labels: Texts) -> Array:
        hits = [
            bool(prediction) and prediction in texts for prediction, texts in zip(predictions, references, strict=True)
        ]
        return np.asarray(hits, dtype=np.float64)[:, None]


class Accuracy(ExactMatch):
    """The fraction of answers that are the label's word."""

    metric = "accuracy"
    citation = _SKLEARN


class InvalidRate(TextMetric):
    """The fraction of texts in which no answer was found."""

    metric = "invalid_rate"
    citation = "Raffel et al. 2020, arXiv:1910.10683"

    def _rows(self, predictions: Texts, references: Sequence[Texts], labels: Texts) -> Array:
        return np.asarray([not prediction for prediction in predictions], dtype=np.float64)[:, None]


class _Classes(TextMetric):
    """Rows are (predicted, true) positions among the labels' words, -1 for what is none of them."""

    citation = _SKLEARN

    def _rows(self, predictions: Texts, references: Sequence[Texts], labels: Texts) -> Array:
        position = {word: index for index, word in enumerate(labels)}
        pairs = [
            (position.get(prediction, -1), position.get(texts[0], -1))
            for prediction, texts in zip(predictions, references, strict=True)
        ]
        return np.asarray(pairs, dtype=np.float64).reshape(-1, 2)


class F1(_Classes):
    """The harmonic mean of precision and recall on label 1; 0 where label 1 is neither answered nor true."""

    metric = "f1"

    def _value(self, rows: Array) -> float:
        said, true = rows[:, 0] == 1, rows[:, 1] == 1
        either = int(said.sum() + true.sum())
        return 2 * int((said & true).sum()) / either if either else 0.0


class MatthewsCorrelation(_Classes):
    """Gorodkin's R_K of answered and true labels, an invalid answer being a class that is never true."""

    metric = "matthews_correlation"

    def _value(self, rows: Array) -> float:
        # From the margins of the confusion matrix: scikit-learn takes milliseconds a call, and resamples are many.
        said, true = rows.astype(np.int64).T + 1
        size = int(max(said.max(), true.max())) + 1
        total, right = len(rows), int((said == true).sum())
        p, t = np.bincount(said, minlength=size), np.bincount(true, minlength=size)
        spread = float(total**2 - p @ p) * float(total**2 - t @ t)
        return float(right * total - p @ t) / math.sqrt(spread) if spread else 0.0


class _Correlation(TextMetric):
    """Rows are (answered, true) scores."""

    citation = _SCIPY

    def _rows(self, predictions: Texts, references: Sequence[Texts], labels: Texts) -> Array:
        pairs = [
            (float(prediction or _NO_SCORE), float(texts[0]))
            for prediction, texts in zip(predictions, references, strict=True)
        ]
        return np.asarray(pairs, dtype=np.float64).reshape(-1, 2)


class Pearson(_Correlation):
    """Pearson's correlation of answered and true scores; an invalid answer counts as -1."""

    metric = "pearson"

    def _value(self, rows: Array) -> float:
        return regression.pearson(rows[:, 0], rows[:, 1])


class Spearmanr(_Correlation):
    """Spearman's correlation of answered and true scores; an invalid answer counts as -1."""

    metric = "spearmanr"

    def _value(self, rows: Array) -> float:
        return regression.spearman(rows[:, 0], rows[:, 1])
