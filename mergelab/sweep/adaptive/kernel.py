"""How alike two trials are by their points of the search space: near points make merges that err on the same examples.

A Gaussian process over the points, with one covariance of trials for all examples (Bonilla, Chai & Williams 2007,
"Multi-task Gaussian process prediction"): cov(y_ti, y_uj) = A_tu · Σ_ij. A is a Matérn kernel with ν = 5/2, plus a
share that is each trial's own, plus the noise of trials that are known in part. Its parameters maximise the likelihood
of the trials' rows with Σ's scale profiled out, and a log-normal prior for the lengths.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

_LENGTHS = (0.15, 0.25, 0.4, 0.7, 1.2, 2.0)  # the space is a unit cube
_OWN_SHARES = (0.02, 0.06, 0.15, 0.4)
_STEPS = (0.5, 0.7, 1.4, 2.0)  # of single lengths
_CENTRE, _WIDTH, _STRENGTH = 0.5, 0.8, 0.1  # of the prior of lengths; the width is in logarithms
_MOST_TRIALS = 40  # that the parameters are fitted to
_LEAST_SHARE = 1e-3


@dataclass(frozen=True)
class Kernel:
    """The covariance of trials with one another.

    Attributes:
        points: (t, d) in the unit cube.
        noise: (t,) of each trial's row, 0 where it was measured whole.
        lengths: (d,) over which merges change.
        own: share of a trial's variance that no other trial tells.
    """

    points: Array
    noise: Array
    lengths: Array
    own: float

    @cached_property
    def covariance(self) -> Array:
        """(t, t) A."""
        found = (1 - self.own) * _matern(self.points, self.points, self.lengths)
        found[np.diag_indices(len(found))] = 1 + self.noise
        return found

    @cached_property
    def inverse(self) -> Array:
        """(t, t) of A."""
        return np.linalg.inv(self.covariance)

    def whitened(self, rows: Array) -> Array:
        """Return what each row (t, n) differs by from its prediction by those before it, over the error of that."""
        found: Array = np.linalg.solve(np.linalg.cholesky(self.covariance), rows)
        return found

    def alike(self, point: Array) -> Array:
        """Return how alike the trials (t,) are to one at a point: 1 at the same, 0 far away."""
        found: Array = _matern(point[None], self.points, self.lengths)[0]
        return found

    def at(self, point: Array) -> tuple[Array, float]:
        """Return the weights (t,) of the trials' rows at a point, and the share of the variance that is left."""
        alike = (1 - self.own) * self.alike(point)
        weights = alike @ self.inverse
        return weights, max(1 - float(weights @ alike), _LEAST_SHARE)

    def without(self, index: int) -> tuple[Array, float]:
        """Return the same for the point of a trial, from the others (Rasmussen & Williams 2006, section 5.4.2)."""
        left = 1 / self.inverse[index, index]
        weights = -self.inverse[index] * left
        weights[index] = 0.0
        return weights, max(float(left - self.noise[index]), _LEAST_SHARE)


def fit_kernel(points: Array, noise: Array, rows: Array) -> Kernel:
    """Return the kernel under which the rows (t, n), each about 0 and of unit variance, are the likeliest."""
    used = np.linspace(0, len(points) - 1, min(len(points), _MOST_TRIALS)).round().astype(int)
    gram = rows[used] @ rows[used].T / rows.shape[1]

    def misfit(lengths: Array, own: float) -> float:
        kernel = Kernel(points[used], noise[used], lengths, own)
        triangle = np.linalg.cholesky(kernel.covariance)
        fit = float((kernel.inverse * gram).sum()) / len(used)
        prior = _STRENGTH / len(used) * float(np.square(np.log(lengths / _CENTRE) / _WIDTH).sum()) / 2
        return 2 * float(np.log(np.diag(triangle)).mean()) + math.log(max(fit, 1e-12)) + prior

    dimensions = points.shape[1]
    candidates = [(np.full(dimensions, length), own) for length in _LENGTHS for own in _OWN_SHARES]
    best = min(candidates, key=lambda one: misfit(*one))
    for index in range(dimensions if dimensions > 1 else 0):
        best = min([best, *_stretched(*best, index)], key=lambda one: misfit(*one))
    return Kernel(points, noise, *best)


def _stretched(lengths: Array, own: float, index: int) -> Iterator[tuple[Array, float]]:
    for step in _STEPS:
        yield np.where(np.arange(len(lengths)) == index, step, 1.0) * lengths, own


def _matern(one: Array, other: Array, lengths: Array) -> Array:
    distances = math.sqrt(5) * np.sqrt((((one[:, None] - other[None]) / lengths) ** 2).sum(axis=2))
    found: Array = (1 + distances + distances**2 / 3) * np.exp(-distances)
    return found
