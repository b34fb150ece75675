"""BLEU and chrF of a corpus, as ``evaluate`` modules built on sacrebleu.

sacrebleu's metrics of a corpus are functions of sums over its sentences; what is summed is what a row holds.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from sacrebleu.metrics import BLEU, CHRF

from mergelab.evaluation.metrics.text_modules import Array, TextMetric, Texts


class _Sums(TextMetric):
    @functools.cached_property
    def _sacrebleu(self) -> Any:
        raise NotImplementedError

    def _rows(self, predictions: Texts, references: Sequence[Texts], labels: Texts) -> Array:
        # sacrebleu takes one stream per position in the list of references, None where an example has fewer.
        most = max((len(texts) for texts in references), default=0)
        streams = [[texts[i] if i < len(texts) else None for texts in references] for i in range(most)]
        rows = self._sacrebleu._extract_corpus_statistics(predictions, streams) if streams else []
        return np.asarray(rows, dtype=np.float64)

    def _value(self, rows: Array) -> float:
        sums = [int(total) for total in rows.sum(axis=0)]
        return float(self._sacrebleu._compute_score_from_stats(sums).score) / 100


class Bleu(_Sums):
    """BLEU of the corpus up to 4-grams, sacrebleu's 13a tokens, exponential smoothing; any number of references."""

    metric = "bleu"
    citation = "Papineni et al. 2002; Post 2018, arXiv:1804.08771"

    @functools.cached_property
    def _sacrebleu(self) -> Any:
        # force: no warning where generated texts look tokenised.
        return BLEU(force=True)


class Chrf(_Sums):
    """chrF2 of the corpus: characters up to 6-grams; of several references each sentence's best one counts."""

    metric = "chrf"
    citation = "Popović 2015; Post 2018, arXiv:1804.08771"

    @functools.cached_property
    def _sacrebleu(self) -> Any:
        return CHRF()
