"""Methods on the singular vectors of the task vectors, matrix by matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from mergelab.ops.svd import (
    TallMatrix,
    Triplets,
    decompose,
    decompose_leading,
    orthogonalised,
    self_product,
    total,
)
from mergelab.weights.numerics import norm


def with_own(matrices: Sequence[TallMatrix], outputs_are_columns: bool, common_fraction: float, like: Tensor) -> Tensor:
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
    return orthogonalised(TallMatrix(left, whole.rows, len(values)), right, level.expand_as(values), like)


def directions(rank: int, tasks: int, common_fraction: float) -> tuple[int, int]:
    """Return how many directions are common, and how many each task has of its own."""
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


def within(matrix: TallMatrix, space: Tensor, rank: int) -> Own:
    """Decompose X C Cᵀ for a C of few orthonormal columns; that is X − X V Vᵀ where C spans what V does not."""
    inside = TallMatrix(lambda part: matrix.read(part) @ space, matrix.rows, space.shape[1])
    found = decompose_leading(inside, rank, size=_size(matrix))
    right = space @ found.right
    return Own(found.values, right, right / found.values, torch.zeros_like(right))


def without_left(matrix: TallMatrix, common: Triplets, rank: int) -> Own:
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
    rest = TallMatrix(read, matrix.rows, matrix.columns)
    found = decompose_leading(rest, rank, size=size, gram=own - self_product(seen))
    of_own = found.right / found.values
    return Own(found.values, found.right, of_own, share @ of_own)


def _size(matrix: TallMatrix) -> float:
    return math.hypot(*(norm(matrix.read(part)) for part in matrix.parts()))
