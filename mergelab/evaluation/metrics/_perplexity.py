"""What perplexity per token and per word share."""

from __future__ import annotations

import math
from typing import ClassVar

from mergelab.tasks.metric import Array, LikelihoodMetric


class Perplexity(LikelihoodMetric, base=True):
    """exp(Σ negative log likelihood / Σ units) over all examples."""

    citation = "Jelinek et al. 1977, Perplexity: a measure of the difficulty of speech recognition tasks"
    direction = "minimize"
    chance = None  # what is predicted is a distribution over tokens; there is no constant answer
    min_examples = 1

    units: ClassVar[int]
    """The column of the units in an example's statistics: negative log likelihood in nats, tokens, words."""

    def from_statistics(self, rows: Array) -> float:
        """Compute the perplexity; infinite where there are no units."""
        total = rows.sum(axis=0)
        units = total[self.units]
        # Past what a float holds it is infinite for every purpose.
        return math.exp(min(total[0] / units, 700.0)) if units else math.inf
