"""Subspace Boosting: after another merge, raise its small singular values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mergelab.engine.chaining import ChainedWeights, check_then
from mergelab.engine.merged_vector import MergedVector, prepare_merged
from mergelab.engine.method import merge_method
from mergelab.engine.parameters import Fraction
from mergelab.ops.blocks import working
from mergelab.ops.layout import is_embedding, is_matrix
from mergelab.ops.site import Site
from mergelab.ops.svd import assembled, decompose, tall_matrix


@merge_method(
    needs_base=True,
    prepare=prepare_merged,
    check=check_then,
    order_matters=True,
    identical_at=None,
    family="spectral",
    use="after a method on task vectors, for so many experts that their sum spans few directions",
    work="decomposes every merged matrix",
    paper="Skorobogat et al. 2025, arXiv:2506.16506",
)
def subspace_boosting(
    base: Tensor,
    *,
    site: Site,
    prepared: MergedVector,
    then: str | Mapping[str, Any] = "task_arithmetic",
    beta: Fraction = 0.01,
    weights: ChainedWeights = None,
) -> Tensor:
    """Merge by another method, and raise the small singular values of each merged matrix.

    Per matrix, with τ_m = U diag(σ) Vᵀ the other method's merged task vector, λ included, and σ in falling order: σ_r
    becomes max(σ_r, σ_k), where k is the first index at which (σ_1 + … + σ_k) / Σ σ reaches β (Skorobogat et al. 2025,
    arXiv:2506.16506). β = 0 makes all singular values equal to the largest, β = 1 leaves them. As in the authors' code,
    embeddings are no such matrices; tensors other than matrices are what the other method makes of them.

    Departures: directions whose σ is no larger than rounding to the dtype that the experts are stored in alone makes it
    (`mergelab.engine.merged_vector.MergedVector.noise`) are dropped, where the authors' SVD raises arbitrary vectors:
    those of merged low-rank adapters, for example. Attention matrices are whole; the authors also try heads
    one by one, with a β of their own.

    Args:
        base: θ0, whole.
        site: names the tensor.
        prepared: the other method's merged task vector.
        then: the method that merges: its name, or a mapping of ``name`` and its parameters, λ among them.
        beta: β, fraction of the sum of the singular values, from 0 to 1.
        weights: per expert, passed on to ``then``; default 1.

    Returns:
        Tensor of the base's shape, float32 (float64 for float64 inputs). Decompositions are in float64.

    Raises:
        ConfigError: ``then`` cannot merge these models.
    """
    change = prepared.of(site.name).to(base.device)
    start = working(base)
    if not is_matrix(change) or is_embedding(site.name):
        return start + change
    found = decompose(tall_matrix(change), noise=prepared.noise(site.name))
    if not len(found.values):
        return start.clone()
    reached = found.values.cumsum(dim=0) / found.values.sum() >= beta
    level = found.values[int(reached.int().argmax())] if bool(reached.any()) else found.values[-1]
    scale = torch.maximum(found.values, level) / found.values
    return start + assembled(found.matrix, (found.right * scale) @ found.right.T, change)
