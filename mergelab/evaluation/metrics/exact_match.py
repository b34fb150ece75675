"""Exact match."""

from __future__ import annotations

from typing import Any

import numpy as np

from mergelab.tasks.metric import BEST_CONSTANT, Array, MeanTextMetric


class ExactMatch(MeanTextMetric):
    """The fraction of answers that are one of their references; an answer that was not found is wrong."""

    name = "exact_match"
    citation = "Rajpurkar et al. 2016, arXiv:1606.05250"
    answers = ("text", "number", "label", "score")
    direction = "maximize"
    chance = BEST_CONSTANT
    min_examples = 1

    def statistics(self, predictions: Any, references: Any) -> Array:
        """Return 1 for an answer that is one of its references, else 0: (n, 1) float64."""
        hits = [bool(said) and said in texts for said, texts in zip(predictions, references, strict=True)]
        return np.asarray(hits, dtype=np.float64)[:, None]
