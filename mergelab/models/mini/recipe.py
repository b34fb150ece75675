"""How much is generated and trained: every number of the miniature in one place."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Expert:
    """How one expert is fine-tuned."""

    seed: int
    rate: float
    epochs: int = 2
    batch: int = 32
    head_speed: float = 20.0


@dataclass(frozen=True)
class Recipe:
    """How the base is shaped and pretrained."""

    seed: int = 0
    hidden: int = 96
    layers: int = 3
    heads: int = 2
    feed_forward: int = 192
    spread: float = 0.06
    word_spread: float = 0.03
    position_width: int = 32
    position_spread: float = 0.04
    match_spread: float = 0.15
    documents: int = 25000
    pretrain_batch: int = 32
    pretrain_rate: float = 1e-3
    masked: float = 0.12
    swapped: float = 0.12
    swapped_weight: float = 8.0
