"""Methods on the singular vectors of the task vectors, matrix by matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergelab.methods.factorised import (
    Tall,
    Triplets,
    assembled,
    decompose,
    decompose_leading,
    is_wide,
    orthogonalised,
    tall,
    total,
)
from mergelab.methods.matrix_names import inputs_first
from mergelab.methods.parameters import Fraction, Site
from mergelab.methods.registry import merge_method
from mergelab.methods.task_vectors import weighted_sum


def is_matrix(tensor: Tensor) -> bool:
    """Tell whether a tensor has two dimensions, and entries."""
    return tensor.ndim == 2 and tensor.numel() > 0


def mean(vectors: Sequence[Tensor]) -> Tensor:
    """Answer the mean task vector, which is what tensors other than matrices get."""
    return weighted_sum(vectors, (1.0,) * len(vectors)) / len(vectors)


@merge_method(lambda_=1.0, identical_at=None, family="spectral", paper="Gargiulo et al. 2025, arXiv:2412.00081")
def tsv_m(vectors: Sequence[Tensor]) -> Tensor:
    """Add up the leading singular triplets of the task vectors after taking their vectors apart.

    Per matrix of rank bound k = min(m, n): τ_t ≈ U_t Σ_t V_tᵀ with the k/T largest triplets of each; U = [U_1 … U_T], V
    likewise, both replaced by the nearest matrix of orthonormal columns; θ0 + λ·Ũ Σ Ṽᵀ (Gargiulo et al. 2025,
    arXiv:2412.00081, TSV-Merge). Every two-dimensional tensor is a matrix, embeddings too; other tensors get the mean
    task vector, both as in the authors' code, which excepts CLIP's ``text_projection`` alone.

    Departures: each expert keeps at least one triplet (the authors' code drops a matrix whose smaller side is under T).
    Triplets whose σ is 0 take no part, and directions that experts share to within 1e-5 count once, where the authors'
    SVD fills up with arbitrary vectors; so T equal experts give their τ cut to k/T triplets.

    Args:
        vectors: T task vectors, float32 or float64; whole tensors. Decompositions are in float64.
        lambda_: scale of the merged task vector; the engine applies it.

    Returns:
        Ũ Σ Ṽᵀ, of the vectors' shape and dtype.
    """
    if not is_matrix(vectors[0]):
        return mean(vectors)
    rank = max(1, min(vectors[0].shape) // len(vectors))
    parts = [decompose_leading(tall(vector), rank) for vector in vectors]
    return orthogonalised(parts, torch.cat([part.values for part in parts]), vectors[0])


@merge_method(lambda_=1.0, identical_at=None, family="spectral", paper="Marczak et al. 2025, arXiv:2502.04959")
def iso_c(vectors: Sequence[Tensor]) -> Tensor:
    """Add up the task vectors and give every singular direction of the sum the same weight.

    Per matrix: Σ τ_t = U diag(σ) Vᵀ; θ0 + λ·σ̄ U Vᵀ with σ̄ the mean of the min(m, n) singular values (Marczak et al.
    2025, arXiv:2502.04959, Iso-C). Every two-dimensional tensor is a matrix, embeddings too; other tensors get the mean
    task vector, both as in the authors' code. The authors choose λ on validation data.

    Departure: directions whose σ is 0 within float64's rounding stay at 0, where the authors' SVD fills up with
    arbitrary vectors.

    Args:
        vectors: T task vectors, float32 or float64; whole tensors. Decompositions are in float64.
        lambda_: scale of the merged task vector; the engine applies it.

    Returns:
        σ̄ U Vᵀ, of the vectors' shape and dtype.
    """
    if not is_matrix(vectors[0]):
        return mean(vectors)
    whole = decompose(total([tall(vector) for vector in vectors]))
    level = whole.values.sum() / whole.matrix.columns
    return assembled(whole.matrix, (whole.right * (level / whole.values)) @ whole.right.T, vectors[0])


@merge_method(
    lambda_=1.0,
    identical_at=None,
    prepare=inputs_first,
    family="spectral",
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
    first = vectors[0]
    if not is_matrix(first):
        return mean(vectors)
    matrices = [tall(vector) for vector in vectors]
    common_rank, own_rank = directions(matrices[0].columns, len(vectors), common_fraction)
    common = decompose(total(matrices)).leading(common_rank)
    parts = [common]
    if own_rank:
        outputs_are_columns = is_wide(first.shape) != (site.name in prepared)
        remove = without_right if outputs_are_columns else without_left
        parts += [decompose_leading(remove(matrix, common), own_rank) for matrix in matrices]
    values = torch.cat([part.values for part in parts])
    level = values.sum() / matrices[0].columns
    return orthogonalised(parts, level.expand_as(values), first)


def directions(rank: int, tasks: int, common_fraction: float) -> tuple[int, int]:
    """Answer how many directions are common, and how many each task has of its own."""
    own = min(rank // tasks, round((rank - int(rank * common_fraction)) / tasks))
    return rank - own * tasks, own


def without_right(matrix: Tall, common: Triplets) -> Tall:
    """Answer X − X V Vᵀ."""

    def product(part: slice, right: Tensor) -> Tensor:
        return matrix.times(part, right - common.right @ (common.right.T @ right))

    def read(part: slice) -> Tensor:
        rows = matrix.read(part)
        return rows - (rows @ common.right) @ common.right.T

    return Tall(read, matrix.rows, matrix.columns, product)


def without_left(matrix: Tall, common: Triplets) -> Tall:
    """Answer X − U Uᵀ X, with U = S V/σ for S the matrix that the common triplets are of."""
    shares = [common.matrix.read(part).T @ matrix.read(part) for part in matrix.parts()]
    scaled = common.right / common.values
    share = scaled @ (scaled.T @ torch.stack(shares).sum(0))

    def product(part: slice, right: Tensor) -> Tensor:
        return matrix.times(part, right) - common.matrix.times(part, share @ right)

    def read(part: slice) -> Tensor:
        return matrix.read(part) - common.matrix.times(part, share)

    return Tall(read, matrix.rows, matrix.columns, product)
