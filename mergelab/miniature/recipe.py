"""Define the amounts of data and training: every number of the miniature in one place."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Expert:
    """Settings of the fine-tuning of one expert."""

    seed: int
    rate: float
    epochs: int = 2
    batch: int = 32
    share: float = 0.5  # fraction of the examples that show none of its own phenomena
    head_speed: float = 20.0


@dataclass(frozen=True)
class Recipe:
    """Architecture and pretraining of the base."""

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
    mixture: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0, 1.5)  # weights of the grammars, in the order of `GRAMMARS`
    masked: float = 0.12
    swapped: float = 0.12
    swapped_weight: float = 8.0
    size: float = 1.0  # less than 1 gives a sketch, for tests of the build

    def scaled(self, count: int) -> int:
        """Return the number of examples to generate in place of ``count``."""
        return max(64, round(self.size * count))


@dataclass(frozen=True)
class Grammar:
    """A task's grammar, and the number of examples of its splits."""

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
