"""Pearson's correlation."""

from __future__ import annotations

from typing import Any

from mergelab.evaluation.metrics._correlation import Correlation, defined, weighted_pearson
from mergelab.tasks.metric import Array


class Pearson(Correlation):
    """Pearson's linear correlation; 0 where predictions or references are constant."""

    name = "pearson"

    def score(self, predictions: Any, references: Any) -> float:
        """Compute SciPy's ``pearsonr``."""
        from scipy.stats import pearsonr

        return defined(pearsonr, predictions, references)

    def from_counts(self, rows: Array, counts: Array) -> Array:
        """Compute the correlation with counts as weights."""
        return weighted_pearson(rows[None, :, 0], rows[None, :, 1], counts)
