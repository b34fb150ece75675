"""Matthews' correlation."""

from __future__ import annotations

from typing import Any

import numpy as np

from mergelab.evaluation.metrics._ratio import ratio
from mergelab.tasks.metric import BEST_CONSTANT, Array, LabelMetric


class MatthewsCorrelation(LabelMetric):
    """Matthews' correlation (beyond two classes, Gorodkin's R_K); 0 where predictions or labels are constant.

    Answers that are no label are a class that is never true.
    """

    name = "matthews_correlation"
    citation = "Gorodkin 2004; Pedregosa et al. 2011, Scikit-learn: Machine Learning in Python, JMLR 12"
    direction = "maximize"
    chance = BEST_CONSTANT
    min_examples = 1

    def score(self, predictions: Any, references: Any) -> float:
        """Compute scikit-learn's ``matthews_corrcoef``."""
        from sklearn.metrics import matthews_corrcoef

        return float(matthews_corrcoef(references, predictions))

    def from_counts(self, rows: Array, counts: Array) -> Array:
        """Compute R_K from the margins of the confusion matrices."""
        classes = np.arange(rows.min(), rows.max() + 1)
        predicted, true = (counts @ (column[:, None] == classes) for column in rows.T)  # (samples, C)
        total, right = counts.sum(axis=1), counts @ (rows[:, 0] == rows[:, 1])
        spread = (total**2 - (predicted**2).sum(axis=1)) * (total**2 - (true**2).sum(axis=1))
        return ratio(right * total - (predicted * true).sum(axis=1), np.sqrt(spread))
