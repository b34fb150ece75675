"""Uncertainty-based gradient matching: task vectors preconditioned by diagonal Hessians."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from mergelab.engine.method import merge_method
from mergelab.engine.parameters import MeanWeights, OfExperts, Positive, Samples
from mergelab.engine.sweep_range import NotSwept, SweepRange
from mergelab.estimation.examples import ExampleSource
from mergelab.estimation.fisher import Estimator, FisherDiagonal, fisher_diagonals, unsupported_estimator
from mergelab.ops.site import Site
from mergelab.ops.task_vectors import factors, of_each
from mergelab.weights.align import AlignedModels

# How many examples each expert's Hessian is the sum of; one number for all, or one for each.
Sizes = Annotated[float | Sequence[float], OfExperts(Positive), NotSwept()]


def prepare_hessians(
    models: AlignedModels, examples: ExampleSource, *, seed: int, samples: int, estimator: Estimator
) -> tuple[FisherDiagonal, ...]:
    """Compute the experts' diagonal Fisher information, which approximates their Hessians."""
    return fisher_diagonals(models, examples, samples, seed, estimator)


@merge_method(
    needs=("data", "gradients"),
    elementwise=True,
    prepare=prepare_hessians,
    unsupported_for_generation=unsupported_estimator,
    identical_at=None,
    family="data",
    paper="Daheim et al. 2024, arXiv:2310.12808",
    use="as fisher, on task vectors: adding tasks to, or removing them from, a base",
)
def gradient_matching(
    vectors: Sequence[Tensor],
    *,
    prepared: Sequence[FisherDiagonal],
    site: Site,
    weights: MeanWeights = None,
    sizes: Sizes = 1.0,
    samples: Samples = 4096,
    delta0: Annotated[Positive, SweepRange(1e-12, 1e-2, log=True)] = 1e-12,
    estimator: Estimator = "auto",
) -> Tensor:
    """Add up the task vectors, each scaled by the ratio of its expert's Hessian to the merged model's.

    θ0 + Σ_t α_t H̄⁻¹ (H0 + H_t) τ_t with H̄ = H0 + Σ_t α_t H_t (Daheim et al. 2024, arXiv:2310.12808, equation 12), α_t
    the weights. H_t is n_t times the expert's diagonal Fisher information on its training examples. H0 = ``delta0`` in
    every entry, as in the paper when the base's training data are not available. Where no H_t reaches ``delta0``, the
    result is task arithmetic with λ = 1. Computed in float64.

    Departures: n_t = ``sizes`` is 1, so that H_t is the mean over examples, not their sum, and does not grow with
    ``samples``. The authors multiply H_t, and only H_t, by the number of examples that expert t was trained on; give
    these as ``sizes``. Their α_t is one factor of all experts.

    Args:
        vectors: T task vectors (parts of them, flattened) of one shape.
        prepared: the experts' H_t.
        site: names the tensor and its part.
        weights: α_t per expert, at least 0; default 1.
        sizes: n_t, the factor of each expert's Fisher information, such as the number of its training examples.
        samples: number of training examples of each expert.
        delta0: the base's Hessian, in every entry.
        estimator: of the Fisher information, as for ``fisher``.

    Returns:
        The merged task vector, float32 (float64 for float64 inputs).

    Raises:
        ConfigError: a negative weight, or all weights 0.
    """
    numerator = torch.zeros_like(vectors[0], dtype=torch.float64)
    hessian = torch.full_like(numerator, delta0)
    counts, alphas = of_each(sizes, len(vectors)), factors(weights, len(vectors))
    for vector, diagonal, count, alpha in zip(vectors, prepared, counts, alphas, strict=True):
        own = diagonal.part(site, vector).mul_(count)
        hessian.add_(own, alpha=alpha)
        numerator.addcmul_(own.add_(delta0), vector.double(), value=alpha)
    return numerator.div_(hessian).to(vectors[0].dtype)
