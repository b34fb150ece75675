"""The rate of invalid answers."""

from __future__ import annotations

from typing import Any

import numpy as np

from mergelab.tasks.metric import Array, MeanTextMetric


class InvalidRate(MeanTextMetric):
    """The fraction of texts in which no answer was found."""

    name = "invalid_rate"
    citation = "Raffel et al. 2020, arXiv:1910.10683"
    answers = ("number", "label", "score")
    direction = "minimize"
    chance = None  # any valid constant gets 0, which no model can better
    min_examples = 1

    def statistics(self, predictions: Any, references: Any) -> Array:
        """Return 1 for an empty answer, else 0: (n, 1) float64."""
        return np.asarray([not said for said in predictions], dtype=np.float64)[:, None]
