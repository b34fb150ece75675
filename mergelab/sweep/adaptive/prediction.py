"""A merge's scores on the examples that it was not measured on, predicted from those of other merges.

Trial by trial the scores of all examples are correlated: merges of the same models fail on the same examples. So a
trial's scores y (n,) have a Gaussian prior whose mean is the mean of the merges so far, and whose covariance has the
deviations from that mean as factors; what was measured conditions it. This is Bayesian ridge regression on the other
models' scores (Hoerl & Kennard 1970), with an error variance in proportion to that of the example across merges.

Which examples are measured does not depend on their scores, so that the posterior ignores how they were drawn. It is
no design-unbiased estimate, as importance weights would give it (Kossen et al. 2021, arXiv:2103.05331), whose errors
are a third greater on recorded sweeps; the bias that shrinkage leaves is within its interval.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


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
class Partial:
    """The scores (k,) of the examples at ``positions`` (k,), of a model that was measured on these alone."""

    positions: Array
    scores: Array
