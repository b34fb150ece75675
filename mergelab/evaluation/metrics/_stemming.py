"""rouge-score with a stemmer that remembers: most of the work is stemming, and texts repeat their words."""

from __future__ import annotations

import functools
from typing import Any

from nltk.stem.porter import PorterStemmer
from rouge_score import rouge_scorer, tokenize, tokenizers


class _Stemmer(PorterStemmer):  # type: ignore[misc]
    """Porter's stemmer with a cache."""

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


def make_scorer(variant: str) -> Any:
    """Return rouge-score's scorer of one variant, such as ``rougeL``."""
    return rouge_scorer.RougeScorer([variant], tokenizer=_Tokenizer())
