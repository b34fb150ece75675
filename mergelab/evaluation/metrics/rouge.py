"""ROUGE of summaries, as ``evaluate`` modules built on rouge-score."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from nltk.stem.porter import PorterStemmer
from rouge_score import rouge_scorer, tokenize, tokenizers

from mergelab.evaluation.metrics.text_modules import Array, TextMetric, Texts


class _Stemmer(PorterStemmer):  # type: ignore[misc]
    """Porter's stemmer, which remembers: most of the work is stemming, and texts repeat their words."""

    @functools.lru_cache(maxsize=100_000)  # noqa: B019  (there is one)
    def stem(self, word: str) -> str:
        stemmed: str = super().stem(word)
        return stemmed


class _Tokenizer(tokenizers.Tokenizer):  # type: ignore[misc]
    """rouge-score's own tokenizer with `_Stemmer`."""

    _stemmer = _Stemmer()

    def tokenize(self, text: str) -> list[str]:
        found: list[str] = tokenize.tokenize(text, self._stemmer)
        return found


class _Rouge(TextMetric):
    citation = "Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries"

    @functools.cached_property
    def _scorer(self) -> Any:
        return rouge_scorer.RougeScorer([self.metric], tokenizer=_Tokenizer())

    def _rows(self, predictions: Texts, references: Sequence[Texts], labels: Texts) -> Array:
        scores = [
            [self._scorer.score_multi(texts, prediction)[self.metric].fmeasure]
            for prediction, texts in zip(predictions, references, strict=True)
        ]
        return np.asarray(scores, dtype=np.float64).reshape(-1, 1)


class Rouge1(_Rouge):
    """The mean over examples of the F1 of words, stemmed; of several references the best one counts."""

    metric = "rouge1"


class Rouge2(_Rouge):
    """The mean over examples of the F1 of pairs of words, stemmed; of several references the best one counts."""

    metric = "rouge2"


class RougeL(_Rouge):
    """The mean F1 of the longest common subsequence of stemmed words; of several references the best one counts."""

    metric = "rougeL"


class RougeLsum(_Rouge):
    """The mean F1 of the union of sentences' longest common subsequences, sentences being lines; as `RougeL` else."""

    metric = "rougeLsum"
