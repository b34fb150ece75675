"""Perplexity per token."""

from __future__ import annotations

from mergelab.evaluation.metrics._perplexity import Perplexity


class TokenPerplexity(Perplexity):
    """The perplexity per token: exp(Σ negative log likelihood / Σ tokens). It depends on the tokenizer."""

    name = "token_perplexity"
    units = 1
