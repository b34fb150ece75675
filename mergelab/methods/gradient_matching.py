"""Merging that makes up for the mismatch between the experts' gradients, with diagonal Hessians."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergelab.engine.method import merge_method
from mergelab.engine.parameters import MeanWeights, Positive, Samples
from mergelab.estimation.examples import Examples
from mergelab.estimation.fisher import Diagonal, Estimator, diagonals, of_writers
from mergelab.ops.site import Site
from mergelab.ops.task_vectors import factors
from mergelab.weights.align import AlignedModels


def prepare_hessians(
    models: AlignedModels, examples: Examples, *, seed: int, samples: int, estimator: Estimator
) -> tuple[Diagonal, ...]:
    """Compute the experts' diagonal Fisher information, which stands for their Hessians."""
    return diagonals(models, examples, samples, seed, estimator)


@merge_method(
    needs=("data", "gradients"),
    elementwise=True,
    prepare=prepare_hessians,
    unsupported_for_generation=of_writers,
    identical_at=None,
    family="data",
    paper="Daheim et al. 2024, arXiv:2310.12808",
)
def gradient_matching(
    vectors: Sequence[Tensor],
    *,
    prepared: Sequence[Diagonal],
    site: Site,
    weights: MeanWeights = None,
    samples: Samples = 4096,
    delta0: Positive = 1e-12,
    estimator: Estimator = "auto",
) -> Tensor:
    """Add up the task vectors, each scaled by its own Hessian over that of the merged model.

    θ0 + Σ_t α_t H̄⁻¹ (H0 + H_t) τ_t with H̄ = H0 + Σ_t α_t H_t (Daheim et al. 2024, arXiv:2310.12808, equation 12), α_t
    the weights. H_t is the expert's diagonal Fisher information on its training examples, H0 = ``delta0`` in every
    entry, as in the paper where the base's own data are not to be had. Departure: H_t is the mean over examples, not
    their sum, so that it does not grow with ``samples``. Where no H_t reaches ``delta0`` the result is task arithmetic
    with λ = 1. Computed in float64.

    Args:
        vectors: T task vectors (parts of them, flattened) of one shape.
        prepared: the experts' H_t.
        site: which tensor, and which part of it.
        weights: α_t per expert, at least 0; default 1.
        samples: how many training examples of each expert.
        delta0: the Hessian of the base.
        estimator: of the Fisher information, as for ``fisher``.

    Returns:
        The merged task vector, float32 (float64 for float64 inputs).

    Raises:
        ConfigError: a negative weight, or all weights 0.
    """
    numerator = torch.zeros_like(vectors[0], dtype=torch.float64)
    hessian = torch.full_like(numerator, delta0)
    for vector, diagonal, alpha in zip(vectors, prepared, factors(weights, len(vectors)), strict=True):
        own = diagonal.part(site, vector)
        hessian.add_(own, alpha=alpha)
        numerator.addcmul_(own.add_(delta0), vector.double(), value=alpha)
    return numerator.div_(hessian).to(vectors[0].dtype)
