"""What BLEU and chrF of a corpus share.

sacrebleu's metrics of a corpus are functions of sums over its sentences, and no means of sentences' scores. An
example's statistics are what is summed.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from typing import Any

import numpy as np

from mergelab.tasks.metric import Array, TextMetric


class CorpusMetric(TextMetric, base=True):
    """A metric of sacrebleu, as a fraction; examples may have different numbers of references."""

    answers = ("text",)
    direction = "maximize"
    chance = 0.0
    min_examples = 1

    @abstractmethod
    def make_scorer(self) -> Any:
        """Return sacrebleu's metric."""

    @functools.cached_property
    def _scorer(self) -> Any:
        return self.make_scorer()

    def statistics(self, predictions: Any, references: Any) -> Array:
        """Count n-grams and lengths in each text: (n, k) float64."""
        # sacrebleu takes one stream per position in the list of references, None where an example has fewer.
        most = max((len(texts) for texts in references), default=0)
        streams = [[texts[i] if i < len(texts) else None for texts in references] for i in range(most)]
        rows = self._scorer._extract_corpus_statistics(predictions, streams) if streams else []
        return np.asarray(rows, dtype=np.float64)

    def from_statistics(self, rows: Array) -> float:
        """Compute the score of the sums."""
        sums = [int(total) for total in rows.sum(axis=0)]
        return float(self._scorer._compute_score_from_stats(sums).score) / 100
