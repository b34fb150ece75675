"""Merge common and task-specific singular directions of one matrix: the linear algebra of Iso-CTS."""

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
    matrix_sum,
    orthogonalised,
    self_product,
)
from mergelab.weights.numerics import norm


def merge_directions(
    matrices: Sequence[TallMatrix],
    outputs_are_columns: bool,
    common_fraction: float,
    like: Tensor,
    *,
    noise: Sequence[float],
) -> Tensor:
    """Merge the tasks' matrices by their common and task-specific directions, as `iso_cts` defines it.

    Args:
        matrices: one matrix per task, of one shape.
        outputs_are_columns: whether a layer's outputs lie along the columns; common directions are removed there.
        common_fraction: fraction of the directions that are the sum's.
        like: has the shape and dtype of the result; when it is wide, the result is transposed.
        noise: per matrix, the singular value that rounding alone makes; errors of several matrices are independent.
    """
    common_rank, specific_rank = split_rank(matrices[0].columns, len(matrices), common_fraction)
    whole = matrix_sum(matrices)
    common = decompose(whole, noise=math.hypot(*noise)).leading(common_rank)
    specific: list[TaskDirections] = []
    if specific_rank and outputs_are_columns:
        complement = torch.linalg.qr(common.right, mode="complete").Q[:, len(common.values) :]
        specific = [project_right(*each, complement, specific_rank) for each in zip(matrices, noise, strict=True)]
    elif specific_rank:
        specific = [remove_left(*each, common, specific_rank) for each in zip(matrices, noise, strict=True)]
    from_sum = torch.cat([common.right / common.values, *(-each.from_sum for each in specific)], dim=1)
    ends = list(accumulate((len(each.values) for each in specific), initial=len(common.values)))

    def left(part: slice) -> Tensor:
        vectors = whole.read(part) @ from_sum
        for matrix, each, (start, end) in zip(matrices, specific, pairwise(ends), strict=False):
            vectors[:, start:end] += matrix.read(part) @ each.from_task
        return vectors

    values = torch.cat([common.values, *(each.values for each in specific)])
    right = torch.cat([common.right, *(each.right for each in specific)], dim=1)
    level = values.sum() / matrices[0].columns
    return orthogonalised(TallMatrix(left, whole.rows, len(values)), right, level.expand_as(values), like)


def split_rank(rank: int, tasks: int, common_fraction: float) -> tuple[int, int]:
    """Return the number of common directions, and the number of specific directions of each task."""
    specific = min(rank // tasks, round((rank - int(rank * common_fraction)) / tasks))
    return rank - specific * tasks, specific


@dataclass(frozen=True)
class TaskDirections:
    """Leading singular triplets of a task's matrix X after common directions are removed.

    The left vectors are U = X·from_task − S·from_sum, with S the sum of the tasks' matrices.

    Attributes:
        values: (r,) σ.
        right: (n, r) V.
        from_task, from_sum: (n, r).
    """

    values: Tensor
    right: Tensor
    from_task: Tensor
    from_sum: Tensor


def project_right(matrix: TallMatrix, noise: float, complement: Tensor, rank: int) -> TaskDirections:
    """Decompose X C Cᵀ for C (n, c) of orthonormal columns; X − X V Vᵀ when C spans the complement of V."""
    projected = TallMatrix(lambda part: matrix.read(part) @ complement, matrix.rows, complement.shape[1])
    found = decompose_leading(projected, rank, size=_size(matrix), noise=noise)
    right = complement @ found.right
    return TaskDirections(found.values, right, right / found.values, torch.zeros_like(right))


def remove_left(matrix: TallMatrix, noise: float, common: Triplets, rank: int) -> TaskDirections:
    """Decompose X − U Uᵀ X for the common left vectors U = S V/σ, with S the matrix of the common triplets."""
    whole, scaled = common.matrix, common.right / common.values
    gram = common.right.new_zeros(matrix.columns, matrix.columns)
    cross = torch.zeros_like(gram)
    for part in matrix.parts():
        rows = matrix.read(part)
        gram += self_product(rows)
        cross += whole.read(part).T @ rows
    projection = scaled.T @ cross  # Uᵀ X
    from_whole = scaled @ projection

    def read(part: slice) -> Tensor:
        return matrix.read(part) - whole.read(part) @ from_whole

    size = float(gram.trace().sqrt())
    rest = TallMatrix(read, matrix.rows, matrix.columns)
    found = decompose_leading(rest, rank, size=size, noise=noise, gram=gram - self_product(projection))
    from_task = found.right / found.values
    return TaskDirections(found.values, found.right, from_task, from_whole @ from_task)


def _size(matrix: TallMatrix) -> float:
    """Return the Frobenius norm."""
    return math.hypot(*(norm(matrix.read(part)) for part in matrix.parts()))
