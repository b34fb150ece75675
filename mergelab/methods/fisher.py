"""Merging by Fisher information: an expert counts for a parameter as much as its outputs depend on it."""

from __future__ import annotations

import math
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
from mergelab.weights.numerics import norm


def prepare_fisher(
    models: AlignedModels, examples: Examples, *, seed: int, samples: int, normalize: bool, estimator: Estimator
) -> tuple[Diagonal, ...]:
    """Compute the experts' Fisher information, and the factors that bring it to one scale."""
    found = diagonals(models, examples, samples, seed, estimator)
    if not normalize:
        return found
    sizes = [math.prod(models.experts[0].shape(name)) for name in models.names]
    return tuple(Diagonal(each.tensors, _unit_scale(each, models.names, sum(sizes))) for each in found)


def _unit_scale(diagonal: Diagonal, names: Sequence[str], size: int) -> float:
    """Return the factor that makes the root mean square of all entries 1."""
    lengths = [norm(diagonal.tensors[name]) for name in names if name in diagonal.tensors]
    total = math.fsum(length * length for length in lengths)
    return math.sqrt(size / total) if total else 1.0


@merge_method(
    needs=("data", "gradients"),
    elementwise=True,
    prepare=prepare_fisher,
    unsupported_for_generation=of_writers,
    family="data",
    paper="Matena & Raffel 2022, arXiv:2111.09832",
)
def fisher(
    experts: Sequence[Tensor],
    *,
    prepared: Sequence[Diagonal],
    site: Site,
    weights: MeanWeights = None,
    samples: Samples = 4096,
    normalize: bool = True,
    floor: Positive = 1e-6,
    estimator: Estimator = "auto",
) -> Tensor:
    """Average the experts, each entry weighted by the expert's diagonal Fisher information.

    Σ w_t F_t θ_t / Σ w_t F_t with F_t = E_x Σ_c p(c|x) (∂ log p(c|x)/∂θ)² over examples of the expert's training data
    (Matena & Raffel 2022, arXiv:2111.09832, equation 4). Where every F_t is under ``floor`` the result is the weighted
    mean of the experts. Departures: F_t is raised to ``floor`` for every expert (the authors' code does so for the
    first one by default), and after it is normalised, so that the floor does not depend on the scale of the outputs;
    ``normalize`` divides F_t by its root mean square over the merged entries, which is the division by its norm in the
    authors' code up to a factor that all experts share. Computed in float64.

    Args:
        experts: T tensors (parts of them, flattened) of one shape, any float dtype.
        prepared: the experts' F_t.
        site: which tensor, and which part of it.
        weights: per expert, at least 0; default 1.
        samples: how many training examples of each expert.
        normalize: give the experts' F_t one scale.
        floor: smallest F_t that counts.
        estimator: "expected": exact over classes; "sampled": one class drawn from the model's own distribution for
            each example; "empirical": the example's label. Of models that write tokens a token is drawn at each
            position, or the text's own taken; there is no "expected". "auto": "expected" where there is one, else
            "sampled".

    Returns:
        Tensor of the experts' shape, float32 (float64 for float64 inputs).

    Raises:
        ConfigError: a negative weight, or all weights 0; "expected" for a model that writes tokens.
    """
    numerator = torch.zeros_like(experts[0], dtype=torch.float64)
    denominator = torch.zeros_like(numerator)
    for expert, diagonal, weight in zip(experts, prepared, factors(weights, len(experts)), strict=True):
        share = diagonal.part(site, expert).clamp_(min=floor).mul_(weight)
        numerator.addcmul_(share, expert.double())
        denominator.add_(share)
    return numerator.div_(denominator).to(experts[0].dtype)
