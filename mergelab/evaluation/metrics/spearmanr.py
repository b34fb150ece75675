"""Spearman's rank correlation."""

from __future__ import annotations

from typing import Any

import numpy as np

from mergelab.evaluation.metrics._correlation import Correlation, defined, weighted_pearson
from mergelab.tasks.metric import Array


class Spearmanr(Correlation):
    """Spearman's rank correlation, ties sharing their mean rank; 0 where predictions or references are constant."""

    name = "spearmanr"

    def score(self, predictions: Any, references: Any) -> float:
        """Compute SciPy's ``spearmanr``."""
        from scipy.stats import spearmanr

        return defined(spearmanr, predictions, references)

    def from_counts(self, rows: Array, counts: Array) -> Array:
        """Compute the correlation of the ranks within each resample, with counts as weights."""
        return weighted_pearson(mean_ranks(rows[:, 0], counts), mean_ranks(rows[:, 1], counts), counts)


def mean_ranks(values: Array, counts: Array) -> Array:
    """Rank the examples (n,) within each resample, ties and repeats sharing their mean rank: (samples, n)."""
    distinct, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(len(distinct)))
    in_group = np.add.reduceat(counts[:, order], starts, axis=1)
    last = np.cumsum(in_group, axis=1)
    mean_rank: Array = last - (in_group - 1) / 2
    return mean_rank[:, group]
