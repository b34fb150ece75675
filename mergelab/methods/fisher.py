"""Fisher merging: average the experts, each entry weighted by the expert's diagonal Fisher information."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from mergelab.engine.method import merge_method
from mergelab.engine.parameters import MeanWeights, Positive, Samples
from mergelab.estimation.examples import ExampleSource
from mergelab.estimation.fisher import Estimator, FisherDiagonal, fisher_diagonals, unsupported_estimator
from mergelab.ops.site import Site
from mergelab.ops.task_vectors import factors
from mergelab.weights.align import AlignedModels
from mergelab.weights.numerics import norm


def prepare_fisher(
    models: AlignedModels,
    examples: ExampleSource,
    *,
    first: str,
    seed: int,
    samples: int,
    normalize: bool,
    estimator: Estimator,
) -> tuple[FisherDiagonal, ...]:
    """Compute the experts' diagonal Fisher information; with ``normalize``, scale each to a root mean square of 1."""
    found = fisher_diagonals(models, examples, samples, seed, estimator)
    diagonals = tuple(replace(f, first=e.name == first) for f, e in zip(found, models.experts, strict=True))
    if not normalize:
        return diagonals
    sizes = [math.prod(models.experts[0].shape(name)) for name in models.names]
    return tuple(replace(each, scale=_unit_scale(each, models.names, sum(sizes))) for each in diagonals)


def _unit_scale(diagonal: FisherDiagonal, names: Sequence[str], size: int) -> float:
    """Return the factor that scales the root mean square of all entries to 1."""
    lengths = [norm(diagonal.tensors[name]) for name in names if name in diagonal.tensors]
    total = math.fsum(length * length for length in lengths)
    return math.sqrt(size / total) if total else 1.0


@merge_method(
    needs=("data", "gradients"),
    elementwise=True,
    prepare=prepare_fisher,
    unsupported_for_generation=unsupported_estimator,
    family="data",
    paper="Matena & Raffel 2022, arXiv:2111.09832",
    authors={"floor_of": "first"},
    tuned=("weights",),
    use="experts of one architecture with labelled or unlabelled examples, where some weights matter to one task only",
)
def fisher(
    experts: Sequence[Tensor],
    *,
    prepared: Sequence[FisherDiagonal],
    site: Site,
    weights: MeanWeights = None,
    samples: Samples = 4096,
    normalize: bool = True,
    floor: Positive = 1e-6,
    floor_of: Literal["all", "first"] = "all",
    estimator: Estimator = "auto",
) -> Tensor:
    """Average the experts, each entry weighted by the expert's diagonal Fisher information.

    Σ w_t F_t θ_t / Σ w_t F_t with F_t = E_x Σ_c p(c|x) (∂ log p(c|x)/∂θ)² over examples of the expert's training data
    (Matena & Raffel 2022, arXiv:2111.09832, equation 4). Where every F_t is below ``floor``, the result is the weighted
    mean of the experts. Computed in float64.

    Departures: F_t is raised to ``floor`` for every expert, after normalisation, so that neither the order of the
    experts nor the scale of their outputs counts. The authors' code raises F before it normalises, and that of the
    first expert alone, their target: ``floor_of="first"``; entries that only the others have no information on are
    theirs then. ``normalize`` divides F_t by its root mean square over the merged entries, which equals the authors'
    division by its norm up to a factor that all experts share. Where no information is left, the result is the weighted
    mean, where their code divides 0 by 0.

    Args:
        experts: T tensors (parts of them, flattened) of one shape, any float dtype.
        prepared: the experts' F_t.
        site: names the tensor and its part.
        weights: per expert, at least 0; default 1.
        samples: number of training examples of each expert.
        normalize: whether to scale each expert's F_t to a root mean square of 1.
        floor: lower bound of F_t.
        floor_of: whose F_t has it: of "all" experts, or, before it is normalised, of the "first" that is given.
        estimator: "expected": exact over classes. "sampled": one class per example, drawn from the model's predictions.
            "empirical": the example's label. For models that generate tokens, "sampled" draws a token at each position,
            "empirical" uses the text's tokens, and there is no "expected". "auto": "expected" where it exists, else
            "sampled".

    Returns:
        Tensor of the experts' shape, float32 (float64 for float64 inputs).

    Raises:
        ConfigError: a negative weight, or all weights 0; "expected" for a model that generates tokens.
    """
    numerator = torch.zeros_like(experts[0], dtype=torch.float64)
    denominator = torch.zeros_like(numerator)
    for expert, diagonal, weight in zip(experts, prepared, factors(weights, len(experts)), strict=True):
        least = floor if floor_of == "all" else floor * diagonal.scale if diagonal.first else 0.0
        importance = diagonal.part(site, expert).clamp_(min=least).mul_(weight)
        numerator.addcmul_(importance, expert.double())
        denominator.add_(importance)
    unknown = denominator == 0
    if unknown.any():
        total = math.fsum(factors(weights, len(experts)))
        for expert, weight in zip(experts, factors(weights, len(experts)), strict=True):
            numerator.add_(expert.double().mul_(weight / total) * unknown)
        denominator.masked_fill_(unknown, 1.0)
    return numerator.div_(denominator).to(experts[0].dtype)
