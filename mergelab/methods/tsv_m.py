"""TSV-Merge: leading singular triplets of the task vectors, decorrelated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergelab.engine.method import merge_method
from mergelab.ops.layout import is_matrix
from mergelab.ops.rounding import rounding_norm
from mergelab.ops.svd import concatenated_left, decompose_leading, orthogonalised, tall_matrix
from mergelab.ops.task_vectors import mean


@merge_method(
    lambda_=1.0,
    identical_at=None,
    family="spectral",
    work="decomposes every matrix of every expert",
    paper="Gargiulo et al. 2025, arXiv:2412.00081",
    use="full fine-tunes of many tasks, without data",
)
def tsv_m(vectors: Sequence[Tensor], experts: Sequence[Tensor]) -> Tensor:
    """Add up the leading singular triplets of the task vectors after decorrelating their singular vectors.

    Per matrix of rank bound k = min(m, n): τ_t ≈ U_t Σ_t V_tᵀ with the k/T largest triplets of each; U = [U_1 … U_T], V
    likewise, both replaced by the nearest matrix of orthonormal columns; θ0 + λ·Ũ Σ Ṽᵀ (Gargiulo et al. 2025,
    arXiv:2412.00081, TSV-Merge). Every two-dimensional tensor is a matrix, embeddings too; other tensors get the mean
    task vector, both as in the authors' code, which excepts CLIP's ``text_projection`` alone.

    Departures: each expert keeps at least one triplet (the authors' code drops a matrix whose smaller side is below T).
    Triplets whose σ is no larger than rounding to the dtype that the experts are stored in alone makes it
    (`mergelab.ops.rounding.rounding_norm`) are dropped, and directions that experts share to within 1e-5 count once,
    where the authors' SVD adds arbitrary vectors. So T equal experts give their τ truncated to k/T triplets.

    Args:
        vectors: T task vectors, float32 or float64; whole tensors. Decompositions are in float64.
        experts: T tensors in their stored dtypes.
        lambda_: scale of the merged task vector; the engine applies it.

    Returns:
        Ũ Σ Ṽᵀ, of the vectors' shape and dtype.
    """
    if not is_matrix(vectors[0]):
        return mean(vectors)
    rank = max(1, min(vectors[0].shape) // len(vectors))
    parts = [
        decompose_leading(tall_matrix(vector), rank, noise=rounding_norm([expert]))
        for vector, expert in zip(vectors, experts, strict=True)
    ]
    right = torch.cat([part.right for part in parts], dim=1)
    return orthogonalised(concatenated_left(parts), right, torch.cat([part.values for part in parts]), vectors[0])
