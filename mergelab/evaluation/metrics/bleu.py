"""BLEU."""

from __future__ import annotations

from typing import Any

from mergelab.evaluation.metrics._sacrebleu import CorpusMetric


class Bleu(CorpusMetric):
    """BLEU of the corpus up to 4-grams, sacrebleu's 13a tokens, exponential smoothing; any number of references."""

    name = "bleu"
    citation = "Papineni et al. 2002; Post 2018, arXiv:1804.08771"

    def make_scorer(self) -> Any:
        """Return sacrebleu's BLEU; ``force`` silences its warning about texts that look tokenised."""
        from sacrebleu.metrics import BLEU

        return BLEU(force=True)
