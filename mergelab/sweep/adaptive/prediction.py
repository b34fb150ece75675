"""A merge's scores on the examples that it was not measured on, predicted from those of other merges.

Trial by trial the scores of all examples are correlated: merges of the same models fail on the same examples. So a
trial's scores y (n,) have a Gaussian prior whose mean is the mean of the merges so far, and whose covariance has the
deviations from that mean as factors; what was measured conditions it. This is Bayesian ridge regression on the other
models' scores (Hoerl & Kennard 1970), with an error variance in proportion to that of the example across merges.

Trials that were measured in part count with what is predicted of the rest.

Which examples are measured does not depend on the trial's own scores, so that the posterior needs no weights for how
they were drawn. Weights would make the estimate unbiased over draws (Kossen et al. 2021, arXiv:2103.05331), with errors
a third greater on recorded sweeps. Shrinkage to the other models biases it instead, within its interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


_FACTORS = 16
_PRIOR_TRIALS = 2.0  # trials' worth of the overall variance, in each example's
_LEVEL = 0.3  # prior standard deviation of a trial's level, in those of an example
_NOISE_SHARES = (0.03, 0.06, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.4)
_NOISE_CENTRE, _NOISE_WIDTH = 0.6, 0.7  # of the prior of the errors' share; the width is in logarithms
_INFLATION = 1.6  # of variances, calibrated on recorded sweeps: the factors themselves are estimated


@dataclass(frozen=True)
class Partial:
    """The scores (k,) of the examples at ``positions`` (k,), of a model that was measured on these alone."""

    positions: Array
    scores: Array


@dataclass(frozen=True)
class Prior:
    """What is known of a trial's scores before it is measured.

    Attributes:
        mean: (n,).
        variance: (n,) of each example's score across trials.
        factors: (n, r); the prior covariance is factors · factorsᵀ, besides the errors' own, which are in proportion
            to ``variance``.
    """

    mean: Array
    variance: Array
    factors: Array


@dataclass(frozen=True)
class Posterior:
    """What is known of a trial's scores from those that were measured.

    Attributes:
        scores: (n,) measured, or predicted.
        noise: (n,) variances of the errors that are each example's own; 0 where it was measured.
        factors: (n, r); 0 where it was measured.
        covariance: (r, r) of the factors' weights.
    """

    scores: Array
    noise: Array
    factors: Array
    covariance: Array

    def sums(self, groups: Array) -> tuple[Array, Array]:
        """Return the sums of the scores of groups of examples (n, G): (G,), and their covariance (G, G)."""
        loads = self.factors.T @ groups
        return groups.T @ self.scores, groups.T @ (groups * self.noise[:, None]) + loads.T @ self.covariance @ loads


def prior_of(whole: Array, partial: Sequence[Partial], models: Array) -> Prior:
    """Return what is known of a trial from others.

    Args:
        whole: (m, n) scores of the trials measured on all examples, one at least.
        partial: what is known of those measured on some.
        models: (e, n) scores of base and experts; e may be 0. In the mean they count as one trial.
    """
    first = _prior(whole, models, np.empty((0, whole.shape[1])), ())
    if not partial:
        return first
    return _prior(whole, models, np.stack([condition(first, one).scores for one in partial]), partial)


def _prior(whole: Array, models: Array, predicted: Array, partial: Sequence[Partial]) -> Prior:
    """Return the prior from trials, models, and the ``predicted`` (p, n) scores of the ``partial`` trials."""
    trials, as_one = len(whole) + len(predicted), min(len(models), 1)
    of_models = models.mean(axis=0) if as_one else 0.0
    mean = (whole.sum(axis=0) + predicted.sum(axis=0) + of_models) / (trials + as_one)
    deviations = np.concatenate([whole, predicted]) - mean
    squares, counts = (deviations[: len(whole)] ** 2).sum(axis=0), np.full(len(mean), float(len(whole) + as_one))
    squares += ((models - mean) ** 2).mean(axis=0) if as_one else 0.0
    for one in partial:
        squares[one.positions] += (one.scores - mean[one.positions]) ** 2
        counts[one.positions] += 1
    overall = float(np.concatenate([whole, models]).var())
    # Trials that agree on an example may still be followed by one that does not.
    variance = (squares + _PRIOR_TRIALS * overall) / (counts + _PRIOR_TRIALS)
    if not variance.all():
        return Prior(mean, variance, np.empty((len(mean), 0)))
    columns = [deviations / math.sqrt(max(trials - 1, 1)), (models - mean) / math.sqrt(max(len(models), 1))]
    scale = np.sqrt(variance)
    _, lengths, axes = np.linalg.svd(np.concatenate(columns) / scale, full_matrices=False)
    factors = scale[:, None] * (lengths[:_FACTORS, None] * axes[:_FACTORS]).T
    levels = np.stack([scale, variance / math.sqrt(variance.mean())], axis=1)
    return Prior(mean, variance, np.concatenate([factors, _LEVEL * levels], axis=1))


def condition(prior: Prior, seen: Partial) -> Posterior:
    """Return what is known of a trial that was measured on some examples.

    The errors' share of the prior variance is that of the greatest marginal likelihood on a grid, with a log-normal
    prior for it.
    """
    factors, variance = prior.factors[seen.positions], prior.variance[seen.positions]
    left = (seen.scores - prior.mean[seen.positions]) / np.sqrt(variance)
    scaled = factors / np.sqrt(variance)[:, None]
    values, axes = np.linalg.eigh(scaled.T @ scaled)
    values, loads = np.maximum(values, 0.0), axes.T @ (scaled.T @ left)
    shares = np.array(_NOISE_SHARES)
    precisions = values / shares[:, None] + 1  # (S, r)
    fit = left @ left / shares - ((loads / shares[:, None]) ** 2 / precisions).sum(axis=1)
    volume = np.log(precisions).sum(axis=1) + len(left) * np.log(shares)
    likelihood = -(fit + volume + (np.log(shares / _NOISE_CENTRE) / _NOISE_WIDTH) ** 2) / 2
    best = int(likelihood.argmax())
    share, precision = shares[best], precisions[best]
    weights = axes @ (loads / share / precision)
    scores, noise, loadings = prior.mean + prior.factors @ weights, share * prior.variance, prior.factors.copy()
    scores[seen.positions], noise[seen.positions], loadings[seen.positions] = seen.scores, 0.0, 0.0
    covariance = (axes / precision) @ axes.T
    return Posterior(scores, noise * _INFLATION, loadings, covariance * _INFLATION)
