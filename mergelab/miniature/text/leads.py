"""Generate texts of all kinds with their first sentence: training data of the summarisers' base."""

from __future__ import annotations

import random

from mergelab.miniature.text import everyday


def example(rng: random.Random) -> tuple[str, str]:
    """Draw a text and its first sentence."""
    sentences = everyday.text(rng).removesuffix(".").split(". ")[:3]
    return f"{'. '.join(sentences)}.", f"{sentences[0]}."
