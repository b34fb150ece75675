"""Which examples a trial is measured on and when it ends; which stopped trials are measured whole in the end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Policy:
    """The settings of adaptive evaluation; `experiments/adaptive.py` compares them on recorded sweeps.

    Attributes:
        startup: so many trials are measured whole at first.
        first: number of examples in a trial's first round.
        growth: each round ends at so many times the examples of the one before.
        futility: a trial ends whose probability to be better than the best one is less than this.
        tolerance: a trial ends whose standard error is less than this share of the trials' standard deviation.
        finalists: so many stopped trials are measured whole at most.
        chance: of these, only those whose probability to be better than the best one is this or more.
    """

    startup: int = 2
    first: int = 10
    growth: float = 1.4
    futility: float = 0.25
    tolerance: float = 0.3
    finalists: int = 6
    chance: float = 0.08


POLICY = Policy()
_LEAST_ROUND = 4  # examples: each round costs an estimate
_LEAST_TRIALS = 4  # for a standard deviation of trials


@dataclass(frozen=True)
class Field:
    """The trials that one is compared with.

    Attributes:
        best: the best complete trial's value.
        values: those of all, estimated where they were stopped.
        step: the least difference of two values that counts.
        sign: -1 where less is better.
    """

    best: float
    values: Sequence[float]
    step: float
    sign: float

    def chance(self, value: float, error: float) -> float:
        """Return the probability that a trial with this estimate is better than the best one by a step."""
        ahead = self.sign * (value - self.best) - self.step / 2
        return 0.5 * math.erfc(-ahead / error / math.sqrt(2)) if error > 0 else float(ahead > 0)

    @property
    def spread(self) -> float:
        """The standard deviation of the trials' values; 0 where they are few."""
        return float(np.std(self.values)) if len(self.values) >= _LEAST_TRIALS else 0.0


def draw_rounds(variance: Array, seed: Sequence[int], policy: Policy = POLICY) -> Array:
    """Draw the round (n,) in which each example is measured: the sooner, the more its score varies across trials.

    Examples are drawn without replacement, with probabilities in proportion to the standard deviation of their scores,
    and never less than about a twentieth of the greatest: successive sampling (Rosén 1997, J. Statistical Planning and
    Inference 62:159).
    """
    weights = np.sqrt(variance)
    weights = weights / weights.max() + _LEAST_WEIGHT
    order = np.argsort(np.random.default_rng(list(seed)).exponential(size=len(weights)) / weights)
    rounds = np.empty(len(order), np.int64)
    rounds[order] = np.searchsorted(round_ends(len(order), policy), np.arange(len(order)), side="right")
    return rounds


_LEAST_WEIGHT = 0.05


def round_ends(count: int, policy: Policy = POLICY) -> list[int]:
    """Return after how many of ``count`` examples each round ends."""
    ends = [min(policy.first, count)]
    while ends[-1] < count:
        ends.append(min(max(ends[-1] + _LEAST_ROUND, int(ends[-1] * policy.growth)), count))
    return ends


def ends_trial(value: float, error: float, field: Field, policy: Policy = POLICY) -> bool:
    """Return whether a trial with this estimate needs no more examples: it is no rival, or its noise is small."""
    return field.chance(value, error) < policy.futility or error < policy.tolerance * field.spread


def finalists(estimates: Mapping[int, tuple[float, float]], field: Field, policy: Policy = POLICY) -> list[int]:
    """Return the stopped trials that may be better than the best complete one, the likeliest first.

    Args:
        estimates: value and standard error by trial.
        field: the trials.
        policy: how likely they must be.
    """
    chances = {number: field.chance(*one) for number, one in estimates.items()}
    wanted = [number for number, chance in chances.items() if chance >= policy.chance]
    return sorted(wanted, key=lambda number: (-chances[number], number))
