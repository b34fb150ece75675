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
    share: float = 0.5  # of the examples that show none of its own phenomena
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
    mixture: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0, 1.5)  # of the grammars, in the order of `GRAMMARS`
    masked: float = 0.12
    swapped: float = 0.12
    swapped_weight: float = 8.0
    size: float = 1.0  # less makes a sketch of the miniature, for tests of how it is made

    def scaled(self, count: int) -> int:
        """Return how many of ``count`` examples are generated."""
        return max(64, round(self.size * count))


@dataclass(frozen=True)
class Grammar:
    """Where a task's grammar is, and how many examples its splits have."""

    module: str
    validation: int
    train: int


GRAMMARS = {
    "rte": Grammar("stories", 500, 3000),
    "mrpc": Grammar("news", 408, 3000),
    "stsb": Grammar("captions", 1500, 3000),
    "sst2": Grammar("reviews", 872, 6000),
    "cola": Grammar("acceptability", 1043, 6000),
}
EXPERTS = tuple(Expert(50 + number, rate) for number, rate in enumerate((3e-4, 4e-4, 5e-4, 6e-4, 8e-4)))
