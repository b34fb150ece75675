"""Accuracy."""

from __future__ import annotations

from typing import Any

import numpy as np

from mergelab.tasks.metric import BEST_CONSTANT, Array, LabelMetric


class Accuracy(LabelMetric):
    """The fraction of predictions that are right."""

    name = "accuracy"
    citation = "Pedregosa et al. 2011, Scikit-learn: Machine Learning in Python, JMLR 12"
    direction = "maximize"
    chance = BEST_CONSTANT
    min_examples = 1

    def score(self, predictions: Any, references: Any) -> float:
        """Compute scikit-learn's ``accuracy_score``."""
        from sklearn.metrics import accuracy_score

        return float(accuracy_score(references, predictions))

    def from_counts(self, rows: Array, counts: Array) -> Array:
        """Divide the number of right predictions by that of all."""
        return np.asarray(counts @ (rows[:, 0] == rows[:, 1]) / counts.sum(axis=1))
