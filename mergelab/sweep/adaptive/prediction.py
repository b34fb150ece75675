"""A merge's scores on the examples that it was not measured on, predicted from those of other merges.

Trial by trial the scores of all examples are correlated: merges of the same models fail on the same examples, and
merges at near points of the search space on nearly the same. So a trial's scores y (n,) have a Gaussian prior. Its mean
follows from the trials so far by their distance in the space (`mergelab.sweep.adaptive.kernel`), and its covariance has
these trials' deviations from such predictions as factors; what was measured conditions it. This joins a Gaussian
process over the space with Bayesian ridge regression on the other models' scores (Hoerl & Kennard 1970). The variance
of an example's error is in proportion to that of its score among near merges.

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

from mergelab.sweep.adaptive.kernel import Kernel, fit_kernel

Array = np.ndarray[Any, Any]


_FACTORS = 16
_PRIOR_TRIALS = 2.0  # trials' worth of the overall variance, in each example's
_LEVEL = 0.2  # prior standard deviation of a trial's level, in those of an example, over the root of the trials' number
_MODELS = 0.3  # weight of the deviations of base and experts, which differ by more than merges do
_LEAST_TRIALS = 3  # for a kernel
_ANYWHERE = 1.0  # trials' worth of an example's variance in the whole space, in that near a point
_NOISE_SHARES = (0.03, 0.06, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.4)
_NOISE_CENTRE, _NOISE_WIDTH = 0.6, 0.7  # of the prior of the errors' share; the width is in logarithms
_INFLATION = 1.6  # of variances, calibrated on recorded sweeps: the factors themselves are estimated


@dataclass(frozen=True)
class Seen:
    """The scores (k,) of the examples at ``positions`` (k,) that a trial was measured on."""

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


@dataclass(frozen=True)
class Trials:
    """What trials and models tell of another trial.

    Attributes:
        mean, variance, factors: as a `Prior` has them, of a trial at no point in particular.
        deviations: (t, n) of the trials' rows from the mean.
        squares: (t, n) of what is left of these beside the other trials, over its standard error; 0 where not measured.
        measured: (t, n) whether a trial was measured on an example.
        kernel: of the trials; None where too few tell how alike near ones are.
    """

    mean: Array
    variance: Array
    factors: Array
    deviations: Array
    squares: Array
    measured: Array
    kernel: Kernel | None

    def prior(self, point: Array) -> Prior:
        """Return what is known of a trial at a point (d,)."""
        if self.kernel is None:
            return Prior(self.mean, self.variance, self.factors)
        return self._prior(*self.kernel.at(point), self.kernel.alike(point))

    def prior_without(self, index: int) -> Prior:
        """Return what the others tell of the trial with this index."""
        if self.kernel is None:
            return Prior(self.mean, self.variance, self.factors)
        alike = self.kernel.alike(self.kernel.points[index])
        alike[index] = 0.0
        return self._prior(*self.kernel.without(index), alike)

    def _prior(self, weights: Array, left: float, alike: Array) -> Prior:
        """Return what trials tell with ``weights`` (t,) in the mean; examples vary as they do among those ``alike``."""
        total, count = alike @ self.squares, alike @ self.measured
        ratio = (total / self.variance + _ANYWHERE) / (count + _ANYWHERE) if self.variance.all() else 1.0
        variance = left * ratio * self.variance
        factors = np.sqrt(left * ratio * np.ones(len(self.mean)))[:, None] * self.factors
        return Prior(self.mean + weights @ self.deviations, variance, factors)


def trials_of(trials: Sequence[Seen], models: Array, points: Array, blocks: Array | None = None) -> Trials:
    """Return what trials and models tell.

    Args:
        trials: what each was measured on, one at least on all examples.
        models: (e, n) scores of base and experts; e may be 0. In the mean they count as one trial.
        points: (t, d) of the trials, in the unit cube.
        blocks: (n,) the task of each example, by number; None: there is one.
    """
    count = models.shape[1]
    blocks = np.zeros(count, np.int64) if blocks is None else blocks
    whole = [one for one in trials if len(one.positions) == count]
    # A row counts the less for its neighbours in the space, the less of it was measured.
    space = points, np.array([1 - len(one.positions) / count for one in trials])
    if len(whole) == len(trials):
        return _trials(trials, np.stack([one.scores for one in whole]), models, blocks, space)
    found = _trials(whole, np.stack([one.scores for one in whole]), models, blocks, None)
    rows = _filled(trials, [found.prior_without(0)] * len(trials))
    found = _trials(trials, rows, models, blocks, space)
    rows = _filled(trials, [found.prior_without(index) for index in range(len(trials))])
    return _trials(trials, rows, models, blocks, None, found.kernel)


def _filled(trials: Sequence[Seen], priors: Sequence[Prior]) -> Array:
    """Return the trials' rows (t, n), predicted where they were not measured."""
    return np.stack([condition(prior, one).scores for one, prior in zip(trials, priors, strict=True)])


def _trials(
    trials: Sequence[Seen],
    rows: Array,
    models: Array,
    blocks: Array,
    space: tuple[Array, Array] | None,
    kernel: Kernel | None = None,
) -> Trials:
    """Return what trials tell whose ``rows`` (t, n) are measured or predicted.

    The kernel is fitted where the trials' points and noise are given; without either, no trial is nearer than others.
    """
    as_one = min(len(models), 1)
    mean = (rows.sum(axis=0) + (models.mean(axis=0) if as_one else 0.0)) / (len(rows) + as_one)
    deviations = rows - mean
    whole = [one.scores for one in trials if len(one.positions) == len(mean)]
    overall = _overall(np.concatenate([whole, models]), blocks)
    if space is not None and len(rows) >= _LEAST_TRIALS and space[0].shape[1] and overall.any():
        first = np.sqrt((deviations**2).mean(axis=0) + _PRIOR_TRIALS * overall / (len(rows) + _PRIOR_TRIALS))
        kernel = fit_kernel(*space, deviations / first)
    independent = deviations if kernel is None else kernel.whitened(deviations)
    measured = np.zeros(rows.shape)
    for index, one in enumerate(trials):
        measured[index, one.positions] = 1.0
    squares = independent**2 * measured
    total = squares.sum(axis=0) + (((models - mean) ** 2).mean(axis=0) if as_one else 0.0)
    # Trials that agree on an example may still be followed by one that does not.
    variance = (total + _PRIOR_TRIALS * overall) / (measured.sum(axis=0) + as_one + _PRIOR_TRIALS)
    factors = np.empty((len(mean), 0))
    if variance.all():
        factors = _factors(independent, _MODELS * (models - mean), variance, blocks)
    return Trials(mean, variance, factors, deviations, squares, measured, kernel)


def _overall(scores: Array, blocks: Array) -> Array:
    """Return the variance (n,) of all scores (m, n) of each example's task.

    A task on which all models agree has a hundredth of the greatest of the others: the next model may not agree.
    """
    of_blocks = np.array([scores[:, blocks == one].var() for one in range(blocks[-1] + 1)])
    return np.asarray(np.maximum(of_blocks, of_blocks.max() / 100)[blocks])


def _factors(trials: Array, models: Array, variance: Array, blocks: Array) -> Array:
    """Return the factors (n, r) of the covariance of examples, from deviations (t, n) and (e, n), and of levels."""
    scale = np.sqrt(variance)
    columns = [trials / math.sqrt(max(len(trials) - 1, 1)), models / math.sqrt(max(len(models), 1))]
    scaled = np.concatenate(columns) / scale
    _, axes = np.linalg.eigh(scaled @ scaled.T)  # in ascending order
    factors = scale[:, None] * (axes[:, -_FACTORS:].T @ scaled).T
    members = [blocks == one for one in range(blocks[-1] + 1)]
    levels = [level * inside for inside in members for level in (scale, variance / math.sqrt(variance[inside].mean()))]
    return np.concatenate([factors, _LEVEL / math.sqrt(len(trials)) * np.stack(levels, axis=1)], axis=1)


def condition(prior: Prior, seen: Seen) -> Posterior:
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
