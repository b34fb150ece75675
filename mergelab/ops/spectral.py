"""Methods on the singular vectors of the task vectors, matrix by matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from mergelab.engine.parameters import Fraction, Site
from mergelab.engine.registry import merge_method
from mergelab.ops.layout import inputs_first
from mergelab.ops.svd import (
    Tall,
    Triplets,
    assembled,
    beside,
    decompose,
    decompose_leading,
    orthogonalised,
    self_product,
    tall,
    total,
)
from mergelab.ops.task_vectors import weighted_sum
from mergelab.weights.numerics import norm


def is_matrix(tensor: Tensor) -> bool:
    """Tell whether a tensor has two dimensions, and entries."""
    return tensor.ndim == 2 and tensor.numel() > 0


def mean(vectors: Sequence[Tensor]) -> Tensor:
    """Answer the mean task vector, which is what tensors other than matrices get."""
    return weighted_sum(vectors, (1.0,) * len(vectors)) / len(vectors)


@merge_method(
    lambda_=1.0,
    identical_at=None,
    family="spectral",
    work="decomposes every matrix of every expert",
    paper="Gargiulo et al. 2025, arXiv:2412.00081",
)
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
    right = torch.cat([part.right for part in parts], dim=1)
    return orthogonalised(beside(parts), right, torch.cat([part.values for part in parts]), vectors[0])


@merge_method(
    lambda_=1.0,
    identical_at=None,
    family="spectral",
    work="decomposes every matrix",
    paper="Marczak et al. 2025, arXiv:2502.04959",
)
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
    merged = _with_own([tall(vector) for vector in upright], outputs_are_columns, common_fraction, upright[0])
    return merged.T if turned else merged


def _with_own(matrices: Sequence[Tall], outputs_are_columns: bool, common_fraction: float, like: Tensor) -> Tensor:
    """Merge tall matrices as `iso_cts` does."""
    common_rank, own_rank = directions(matrices[0].columns, len(matrices), common_fraction)
    whole = total(matrices)
    common = decompose(whole).leading(common_rank)
    own: list[Own] = []
    if own_rank and outputs_are_columns:
        complement = torch.linalg.qr(common.right, mode="complete").Q[:, len(common.values) :]
        own = [within(matrix, complement, own_rank) for matrix in matrices]
    elif own_rank:
        own = [without_left(matrix, common, own_rank) for matrix in matrices]
    of_whole = torch.cat([common.right / common.values, *(-each.of_whole for each in own)], dim=1)
    ends = list(accumulate((len(each.values) for each in own), initial=len(common.values)))

    def left(part: slice) -> Tensor:
        vectors = whole.read(part) @ of_whole
        for matrix, each, (start, end) in zip(matrices, own, pairwise(ends), strict=False):
            vectors[:, start:end] += matrix.read(part) @ each.of_own
        return vectors

    values = torch.cat([common.values, *(each.values for each in own)])
    right = torch.cat([common.right, *(each.right for each in own)], dim=1)
    level = values.sum() / matrices[0].columns
    return orthogonalised(Tall(left, whole.rows, len(values)), right, level.expand_as(values), like)


def directions(rank: int, tasks: int, common_fraction: float) -> tuple[int, int]:
    """Answer how many directions are common, and how many each task has of its own."""
    own = min(rank // tasks, round((rank - int(rank * common_fraction)) / tasks))
    return rank - own * tasks, own


@dataclass(frozen=True)
class Own:
    """Leading triplets of a task's matrix X without the common directions; U = X·of_own − S·of_whole, S the sum.

    Attributes:
        values: (r,) σ.
        right: (n, r) V.
        of_own, of_whole: (n, r).
    """

    values: Tensor
    right: Tensor
    of_own: Tensor
    of_whole: Tensor


def within(matrix: Tall, space: Tensor, rank: int) -> Own:
    """Decompose X C Cᵀ for a C of few orthonormal columns; that is X − X V Vᵀ where C spans what V does not."""
    inside = Tall(lambda part: matrix.read(part) @ space, matrix.rows, space.shape[1])
    found = decompose_leading(inside, rank, size=_size(matrix))
    right = space @ found.right
    return Own(found.values, right, right / found.values, torch.zeros_like(right))


def without_left(matrix: Tall, common: Triplets, rank: int) -> Own:
    """Decompose X − U Uᵀ X for the common U = S V/σ, S the matrix that the common triplets are of."""
    whole, scaled = common.matrix, common.right / common.values
    own = common.right.new_zeros(matrix.columns, matrix.columns)
    shared = torch.zeros_like(own)
    for part in matrix.parts():
        rows = matrix.read(part)
        own += self_product(rows)
        shared += whole.read(part).T @ rows
    seen = scaled.T @ shared  # Uᵀ X
    share = scaled @ seen

    def read(part: slice) -> Tensor:
        return matrix.read(part) - whole.read(part) @ share

    size = float(own.trace().sqrt())
    rest = Tall(read, matrix.rows, matrix.columns)
    found = decompose_leading(rest, rank, size=size, gram=own - self_product(seen))
    of_own = found.right / found.values
    return Own(found.values, found.right, of_own, share @ of_own)


def _size(matrix: Tall) -> float:
    return math.hypot(*(norm(matrix.read(part)) for part in matrix.parts()))
