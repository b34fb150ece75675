"""What the variants of ROUGE share."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from mergelab.tasks.metric import Array, MeanTextMetric


class Rouge(MeanTextMetric, base=True):
    """The mean over examples of the F1 that rouge-score computes under the metric's name, with Porter's stemmer."""

    citation = "Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries"
    answers = ("text",)
    direction = "maximize"
    chance = 0.0
    min_examples = 1

    @functools.cached_property
    def _scorer(self) -> Any:
        from mergelab.evaluation.metrics._stemming import make_scorer

        return make_scorer(self.name)

    def statistics(self, predictions: Any, references: Any) -> Array:
        """Compute the F1 of each text and its best reference: (n, 1) float64."""
        scores = [
            [self._scorer.score_multi(texts, said)[self.name].fmeasure]
            for said, texts in zip(predictions, references, strict=True)
        ]
        return np.asarray(scores, dtype=np.float64).reshape(-1, 1)
