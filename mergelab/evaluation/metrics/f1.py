"""F1 of two labels."""

from __future__ import annotations

from typing import Any

import numpy as np

from mergelab.evaluation.metrics._ratio import ratio
from mergelab.tasks.metric import BEST_CONSTANT, Array, LabelMetric


class F1(LabelMetric):
    """The harmonic mean of precision and recall on label 1; 0 where label 1 is neither predicted nor true."""

    name = "f1"
    citation = "Pedregosa et al. 2011, Scikit-learn: Machine Learning in Python, JMLR 12"
    direction = "maximize"
    chance = BEST_CONSTANT
    min_examples = 1
    num_labels = 2

    def score(self, predictions: Any, references: Any) -> float:
        """Compute scikit-learn's ``f1_score`` of label 1 against all else."""
        from sklearn.metrics import f1_score

        return float(f1_score(np.equal(references, 1), np.equal(predictions, 1), zero_division=0))

    def from_counts(self, rows: Array, counts: Array) -> Array:
        """Compute 2 · true positives / (predicted + true positives)."""
        predicted, true = rows.T == 1
        return ratio(2 * (counts @ (predicted & true)), counts @ predicted + counts @ true)
