"""chrF."""

from __future__ import annotations

from typing import Any

from mergelab.evaluation.metrics._sacrebleu import CorpusMetric


class Chrf(CorpusMetric):
    """chrF2 of the corpus: characters up to 6-grams; of several references each sentence's best one counts."""

    name = "chrf"
    citation = "Popović 2015; Post 2018, arXiv:1804.08771"

    def make_scorer(self) -> Any:
        """Return sacrebleu's chrF."""
        from sacrebleu.metrics import CHRF

        return CHRF()
