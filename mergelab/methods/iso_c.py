"""Iso-C: the sum of the task vectors, with an isotropic spectrum."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mergelab.engine.method import merge_method
from mergelab.ops.layout import is_matrix
from mergelab.ops.rounding import rounding_norm
from mergelab.ops.svd import assembled, decompose, matrix_sum, tall_matrix
from mergelab.ops.task_vectors import mean


@merge_method(
    lambda_=1.0,
    identical_at=None,
    family="spectral",
    work="decomposes every matrix",
    paper="Marczak et al. 2025, arXiv:2502.04959",
    tuned=("lambda_",),
    use="full fine-tunes of many tasks, where a few directions dominate the sum",
)
def iso_c(vectors: Sequence[Tensor], experts: Sequence[Tensor]) -> Tensor:
    """Add up the task vectors and make all singular values of the sum equal.

    Per matrix: Σ τ_t = U diag(σ) Vᵀ; θ0 + λ·σ̄ U Vᵀ with σ̄ the mean of the min(m, n) singular values (Marczak et al.
    2025, arXiv:2502.04959, Iso-C). Every two-dimensional tensor is a matrix, embeddings too; other tensors get the mean
    task vector, both as in the authors' code. The authors choose λ on validation data.

    Departure: directions whose σ is no larger than rounding alone makes it, to float64 or to the dtype that the experts
    are stored in (`mergelab.ops.rounding.rounding_norm`), stay at 0. The authors' SVD adds arbitrary vectors for them,
    as large as all others: of LoRA experts that are stored dense, most of the merged change.

    Args:
        vectors: T task vectors, float32 or float64; whole tensors. Decompositions are in float64.
        experts: T tensors in their stored dtypes.
        lambda_: scale of the merged task vector; the engine applies it.

    Returns:
        σ̄ U Vᵀ, of the vectors' shape and dtype.
    """
    if not is_matrix(vectors[0]):
        return mean(vectors)
    whole = decompose(matrix_sum([tall_matrix(vector) for vector in vectors]), noise=rounding_norm(experts))
    level = whole.values.sum() / whole.matrix.columns
    return assembled(whole.matrix, (whole.right * (level / whole.values)) @ whole.right.T, vectors[0])
