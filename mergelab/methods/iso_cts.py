"""Iso-CTS: common and task-specific directions with equal singular values."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mergelab.engine.method import merge_method
from mergelab.engine.parameters import Fraction
from mergelab.ops.layout import inputs_first, is_matrix
from mergelab.ops.site import Site
from mergelab.ops.spectral import with_own
from mergelab.ops.svd import tall_matrix
from mergelab.ops.task_vectors import mean


@merge_method(
    lambda_=1.0,
    identical_at=None,
    prepare=inputs_first,
    family="spectral",
    work="decomposes every matrix of every expert",
    paper="Marczak et al. 2025, arXiv:2502.04959",
)
def iso_cts(
    vectors: Sequence[Tensor], *, site: Site, prepared: frozenset[str] = frozenset(), common_fraction: Fraction = 0.8
) -> Tensor:
    """Merge as `iso_c` does, the weakest common directions replaced by each task's own.

    Per matrix of k = min(m, n) directions: keep the k_c leading triplets of Σ τ_t; of each τ_t − U_c U_cᵀ τ_t take the
    (k − k_c)/T leading triplets; make all U, and all V, orthonormal as `tsv_m` does; θ0 + λ·σ̄ Ũ Ṽᵀ with σ̄ the mean of
    the σ of all triplets (Marczak et al. 2025, arXiv:2502.04959, Iso-CTS). k_c is about ``common_fraction``·k, such
    that T divides k − k_c, rounded as in the authors' code. Every two-dimensional tensor is a matrix, embeddings too;
    other tensors get the mean task vector.

    Departures: triplets whose σ is 0 take no part, as in `tsv_m`; where rounding would give the tasks more directions
    than there are (few directions, many tasks), they get as many as there are. U is on the side of a layer's outputs
    also where GPT-2's Conv1D stores the matrix transposed.

    Args:
        vectors: T task vectors, float32 or float64; whole tensors. Decompositions are in float64.
        site: whose ``name`` is looked up in ``prepared``.
        prepared: the matrices that are stored transposed.
        common_fraction: fraction of directions that are the sum's.
        lambda_: scale of the merged task vector; the engine applies it.

    Returns:
        σ̄ Ũ Ṽᵀ, of the vectors' shape and dtype.
    """
    if not is_matrix(vectors[0]):
        return mean(vectors)
    rows, columns = vectors[0].shape
    # Outputs are along the columns where they can be: the projection is cheaper on that side.
    turned = rows == columns and site.name not in prepared
    upright = [vector.T for vector in vectors] if turned else vectors
    outputs_are_columns = turned or (rows < columns) != (site.name in prepared)
    merged = with_own([tall_matrix(vector) for vector in upright], outputs_are_columns, common_fraction, upright[0])
    return merged.T if turned else merged
