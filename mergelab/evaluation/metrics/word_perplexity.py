"""Perplexity per word."""

from __future__ import annotations

from mergelab.evaluation.metrics._perplexity import Perplexity


class WordPerplexity(Perplexity):
    """The perplexity per word: exp(Σ negative log likelihood / Σ words). Tokenizers can differ."""

    name = "word_perplexity"
    units = 2
