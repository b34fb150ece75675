"""Which examples a trial is measured on and when it ends; which stopped trials are measured further in the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import ndtr

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
        finalists: so many stopped trials are measured further at most.
        gain: of these, only those are, and as long, of which is expected that they are better than the best one by this
            share of the trials' standard deviation or more.
        caution: standard errors are multiplied by this where a gain is expected: estimates are low of trials that ended
            because they were low.
    """

    startup: int = 2
    first: int = 10
    growth: float = 1.4
    futility: float = 0.25
    tolerance: float = 0.5
    finalists: int = 20
    gain: float = 0.05
    caution: float = 2.0


POLICY = Policy()
_LEAST_ROUND = 4  # examples: each round costs an estimate
_LEAST_TRIALS = 4  # for a standard deviation of trials


@dataclass(frozen=True)
class Field:
    """The trials that one is compared with, in each of J objectives.

    Attributes:
        rivals: (w, J) values of those that are whole.
        values: (t, J) those of all, estimated where they were stopped.
        steps: (J,) the least differences of two values that count.
        signs: (J,) -1 where less is better.
    """

    rivals: Array
    values: Array
    steps: Array
    signs: Array

    def chance(self, values: Array, errors: Array) -> float:
        """Return the probability that a trial with these estimates (J,) is better than every whole one in something."""
        ahead = self.signs * (values - self.rivals) - self.steps / 2
        found = np.where(errors > 0, ndtr(ahead / np.where(errors > 0, errors, 1.0)), ahead > 0)
        return float(found.max(axis=1).min())

    def gain(self, values: Array, errors: Array) -> float:
        """Return by how much a trial with these estimates (J,) is expected to be better than every whole one.

        That is the expected improvement (Mockus 1975) in the objective in which it is the greatest, in the trials'
        standard deviations.
        """
        ahead, deviations = self.signs * (values - self.rivals), np.maximum(errors, 1e-12)
        at = ahead / deviations
        found = ahead * ndtr(at) + deviations * np.exp(-(at**2) / 2) / math.sqrt(2 * math.pi)
        spread = self.values.std(axis=0)
        return float((found / np.where(spread > 0, spread, 1.0)).max(axis=1).min())

    @property
    def spread(self) -> Array:
        """(J,) the standard deviation of the trials' values; 0 where they are few."""
        return self.values.std(axis=0) if len(self.values) >= _LEAST_TRIALS else np.zeros(len(self.steps))


def draw_weights(deviations: Array) -> Array:
    """Return the weights (n,) that examples are drawn with, by how much (n,) each may change what is estimated."""
    return deviations / (deviations.max() or 1.0) + _LEAST_WEIGHT


def draw_rounds(
    deviations: Array, seed: Sequence[int], tasks: int = 1, before: int = 0, policy: Policy = POLICY
) -> Array:
    """Draw the round (n,) in which each example is measured: the sooner, the more its score varies across trials.

    Examples are drawn without replacement, with probabilities in proportion to ``deviations`` (n,), and never less than
    about a twentieth of the greatest: successive sampling (Rosén 1997, J. Statistical Planning and Inference 62:159).
    """
    weights = draw_weights(deviations)
    order = np.argsort(np.random.default_rng(list(seed)).exponential(size=len(weights)) / weights)
    rounds = np.empty(len(order), np.int64)
    ends = round_ends(len(order), tasks, before, policy)
    rounds[order] = np.searchsorted(ends, np.arange(len(order)), side="right")
    return rounds


_LEAST_WEIGHT = 0.05


def round_ends(count: int, tasks: int = 1, before: int = 0, policy: Policy = POLICY) -> list[int]:
    """Return after how many of ``count`` examples of some tasks each round ends, where others were measured before."""
    ends = [] if before else [min(policy.first * tasks, count)]
    while not ends or ends[-1] < count:
        last = before + (ends[-1] if ends else 0)
        ends.append(min(max(last + _LEAST_ROUND, int(last * policy.growth)) - before, count))
    return ends


def ends_trial(values: Array, errors: Array, field: Field, policy: Policy = POLICY) -> bool:
    """Return whether a trial with these estimates needs no more examples: it is no rival, or its noise is small."""
    return field.chance(values, errors) < policy.futility or bool((errors < policy.tolerance * field.spread).all())


def is_finalist(values: Array, errors: Array, field: Field, policy: Policy = POLICY) -> bool:
    """Return whether a stopped trial with these estimates is worth measuring further."""
    return expected_gain(values, errors, field, policy) >= policy.gain


def expected_gain(values: Array, errors: Array, field: Field, policy: Policy = POLICY) -> float:
    """Return what `Field.gain` is of a stopped trial, whose errors are greater than they seem."""
    return field.gain(values, policy.caution * errors)
