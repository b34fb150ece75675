"""Iso-CTS: common and task-specific directions of the task vectors, with an isotropic spectrum."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mergelab.engine.method import merge_method
from mergelab.engine.parameters import Fraction
from mergelab.ops.layout import inputs_first, is_matrix
from mergelab.ops.rounding import rounding_norm
from mergelab.ops.site import Site
from mergelab.ops.spectral import merge_directions
from mergelab.ops.svd import tall_matrix
from mergelab.ops.task_vectors import mean


@merge_method(
    lambda_=1.0,
    identical_at=None,
    prepare=inputs_first,
    family="spectral",
    work="decomposes every matrix of every expert",
    paper="Marczak et al. 2025, arXiv:2502.04959",
    tuned=("lambda_",),
    use="as iso_c, for so many tasks that the common directions do not suffice",
)
def iso_cts(
    vectors: Sequence[Tensor],
    experts: Sequence[Tensor],
    *,
    site: Site,
    prepared: frozenset[str] = frozenset(),
    common_fraction: Fraction = 0.8,
) -> Tensor:
    """Merge as `iso_c` does, with the weakest common directions replaced by task-specific ones.

    Per matrix of k = min(m, n) directions: keep the k_c leading triplets of Σ τ_t. Of each τ_t − U_c U_cᵀ τ_t take the
    (k − k_c)/T leading triplets. Make all U, and all V, orthonormal as `tsv_m` does. The result is θ0 + λ·σ̄ Ũ Ṽᵀ with
    σ̄ the mean of the σ of all triplets (Marczak et al. 2025, arXiv:2502.04959, Iso-CTS). k_c is about
    ``common_fraction``·k, such that T divides k − k_c, rounded as in the authors' code. Every two-dimensional tensor is
    a matrix, embeddings too; other tensors get the mean task vector.

    Departures: triplets whose σ is 0 are dropped, as in `tsv_m`. Where rounding would give the tasks more directions
    than exist (few directions, many tasks), they get as many as exist. U is on the side of a layer's outputs also where
    GPT-2's Conv1D stores the matrix transposed.

    Args:
        vectors: T task vectors, float32 or float64; whole tensors. Decompositions are in float64.
        experts: T tensors in their stored dtypes.
        site: names the tensor.
        prepared: names of the matrices that are stored transposed.
        common_fraction: fraction of the directions that are the sum's.
        lambda_: scale of the merged task vector; the engine applies it.

    Returns:
        σ̄ Ũ Ṽᵀ, of the vectors' shape and dtype.
    """
    if not is_matrix(vectors[0]):
        return mean(vectors)
    rows, columns = vectors[0].shape
    # Square matrices are transposed so that outputs lie along the columns, where the projection is cheaper.
    transposed = rows == columns and site.name not in prepared
    matrices = [vector.T for vector in vectors] if transposed else vectors
    outputs_are_columns = transposed or (rows < columns) != (site.name in prepared)
    tall = [tall_matrix(matrix) for matrix in matrices]
    noise = [rounding_norm([expert]) for expert in experts]
    merged = merge_directions(tall, outputs_are_columns, common_fraction, matrices[0], noise=noise)
    return merged.T if transposed else merged
