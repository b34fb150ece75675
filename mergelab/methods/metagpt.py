"""MetaGPT: task arithmetic with coefficients in closed form, from the norms of the task vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from mergelab.engine.method import merge_method
from mergelab.ops.blocks import blocks
from mergelab.ops.task_vectors import open_task_vectors, weighted_sum
from mergelab.ops.threads import in_order
from mergelab.weights.align import AlignedModels
from mergelab.weights.numerics import norm


def prepare_coefficients(models: AlignedModels) -> tuple[float, ...]:
    """Return ‖τ_t‖² / Σ_k ‖τ_k‖² for each expert, over its whole task vector, in float64; 0 where nothing changed."""

    def lengths(name: str) -> list[list[float]]:
        assert models.base is not None
        read = open_task_vectors(models, name)
        count = math.prod(models.base.shape(name))
        return [[norm(vector) for vector in read(part)] for part in blocks(count)]

    parts = [part for found in in_order(lengths, models.names) for part in found]
    norms = [math.hypot(*each) for each in zip(*parts, strict=True)] or [0.0] * len(models.experts)
    whole = math.hypot(*norms)
    return tuple((length / whole) ** 2 if whole else 0.0 for length in norms)


@merge_method(
    elementwise=True,
    prepare=prepare_coefficients,
    family="task vectors",
    use="several tasks without data, where one λ for all experts does not fit",
    paper="Zhou et al. 2024, arXiv:2406.11385",
)
def metagpt(vectors: Sequence[Tensor], *, prepared: Sequence[float]) -> Tensor:
    """Add up the task vectors in proportion to their squared norms.

    θ0 + Σ λ_t τ_t with λ_t = ‖τ_t‖² / Σ_k ‖τ_k‖², norms over an expert's whole task vector (Zhou et al. 2024,
    arXiv:2406.11385). These λ minimise the paper's bound on the mean increase of the experts' losses, if the model is
    linear around the base and the task vectors are orthogonal. They add up to 1.

    Departures: none. The authors publish no code.

    Args:
        vectors: T task vectors, float32 or float64.
        prepared: the λ_t, one per expert.

    Returns:
        Σ λ_t τ_t, of the vectors' shape and dtype.
    """
    return weighted_sum(vectors, prepared)
