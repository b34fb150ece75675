"""Singular value decompositions of tall matrices that are read row block by row block, in float64.

A matrix is a function that answers its rows in a slice. Only what has a column's length squared is held: U is never
stored, as its rows are those of the matrix times V/σ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergelab.ops.blocks import blocks

# Answers the rows in a slice, float64.
ReadRows = Callable[[slice], Tensor]

ROWS = 2048  # rows that are in memory at once
COLUMNS = 192  # columns of a symmetric product that are multiplied at once
SQUARABLE = 1e-4  # σ_r/σ_1 above which float64 resolves σ_r² beside σ_1²
SHARED = 1e-10  # eigenvalues of a Gram matrix of unit vectors that are this small beside the largest count as 0


@dataclass(frozen=True)
class TallMatrix:
    """A matrix of at least as many rows as columns.

    Attributes:
        read: its rows, in float64.
        rows, columns: its shape.
    """

    read: ReadRows
    rows: int
    columns: int

    def parts(self) -> Iterator[slice]:
        """Cut the rows into slices."""
        return blocks(self.rows, ROWS)


@dataclass(frozen=True)
class Triplets:
    """Singular triplets of a matrix, the largest first.

    Attributes:
        matrix: the matrix they are of.
        values: (r,) σ, all above 0.
        right: (columns, r) V.
    """

    matrix: TallMatrix
    values: Tensor
    right: Tensor

    def left(self, part: slice) -> Tensor:
        """Return rows of U: X·V/σ."""
        return self.matrix.read(part) @ (self.right / self.values)

    def leading(self, rank: int) -> Triplets:
        """Return the first ``rank`` of them, or all where there are fewer."""
        return Triplets(self.matrix, self.values[:rank], self.right[:, :rank])


def is_wide(shape: Sequence[int]) -> bool:
    """Return whether a matrix has to be transposed to be tall."""
    return shape[0] < shape[1]


def tall_matrix(tensor: Tensor) -> TallMatrix:
    """View a matrix, or its transpose where it is wide, as a tall one."""
    upright = tensor.T if is_wide(tensor.shape) else tensor
    return TallMatrix(lambda part: upright[part].double(), *upright.shape)


def total(matrices: Sequence[TallMatrix]) -> TallMatrix:
    """Return the sum of matrices of one shape."""
    first, *others = matrices

    def read(part: slice) -> Tensor:
        rows = first.read(part).clone()
        for matrix in others:
            rows += matrix.read(part)
        return rows

    return TallMatrix(read, first.rows, first.columns)


def decompose(matrix: TallMatrix, *, size: float = 0.0) -> Triplets:
    """Return all singular triplets but those whose σ is 0 within rounding, m·ε·σ_1, so that the vectors are arbitrary.

    The matrix is reduced to a triangle by QR decompositions, block by block, and the triangle decomposed: nothing is
    squared, so small singular values are as accurate as float64 allows.

    Args:
        matrix: what to decompose.
        size: of what the matrix is a difference of; where it is above σ_1, it takes its place in what counts as 0.
    """
    triangle: Tensor | None = None
    for part in matrix.parts():
        rows = matrix.read(part)
        stacked = rows if triangle is None else torch.cat([triangle, rows])
        triangle = torch.linalg.qr(stacked, mode="r").R
    assert triangle is not None
    _, values, right = torch.linalg.svd(triangle, full_matrices=False)
    return _without_zeros(matrix, values, right.T, size)


def decompose_leading(matrix: TallMatrix, rank: int, *, size: float = 0.0, gram: Tensor | None = None) -> Triplets:
    """Return the ``rank`` largest singular triplets, fewer where others are 0 within rounding.

    They are the eigenvectors of XᵀX as long as squaring loses nothing that counts; else as `decompose` finds them.

    Args:
        matrix: X.
        rank: how many.
        size: as for `decompose`.
        gram: XᵀX, up to the rounding of numbers of that size's square, where it is known.
    """
    squares, vectors = torch.linalg.eigh(_gram(matrix) if gram is None else gram)
    values = squares.clamp_min(0).sqrt().flip(0)[:rank]
    if float(values[0]) <= _zero(matrix, values, size):
        return Triplets(matrix, values[:0], vectors[:, :0])
    if values[-1] < SQUARABLE * max(float(values[0]), size):
        return decompose(matrix, size=size).leading(rank)
    return Triplets(matrix, values, vectors.flip(1)[:, :rank])


def beside(parts: Sequence[Triplets]) -> TallMatrix:
    """View the left vectors of several matrices' triplets as one matrix, [U_1 … U_T]."""

    def left(rows: slice) -> Tensor:
        return torch.cat([part.left(rows) for part in parts], dim=1)

    return TallMatrix(left, parts[0].matrix.rows, sum(len(part.values) for part in parts))


def orthogonalised(left: TallMatrix, right: Tensor, spectrum: Tensor, like: Tensor) -> Tensor:
    """Put triplets of several matrices together after making their vectors orthonormal on either side.

    Ũ·diag(s)·Ṽᵀ with Ũ = U(UᵀU)^−½ for U = [U_1 … U_T], the nearest matrix of orthonormal columns (Procrustes), and Ṽ
    from the V_t likewise. Directions that the columns of U share to within float64's resolution count once (their
    share of Ũ is that of least norm), where an SVD of U would fill up with arbitrary ones.

    Args:
        left: U (m, Σ r_t).
        right: V (n, Σ r_t).
        spectrum: (Σ r_t,) what stands in the place of the singular values.
        like: has the shape and dtype of the answer; where it is wide, the answer is transposed.
    """
    if not right.shape[1]:
        return torch.zeros_like(like)
    inner = _inverse_root(_gram(left)) @ (spectrum[:, None] * (_inverse_root(self_product(right)) @ right.T))
    return assembled(left, inner, like)


def assembled(left: TallMatrix, right: Tensor, like: Tensor) -> Tensor:
    """Return the product of a matrix read in blocks and a small one, transposed where ``like`` is wide."""
    result = torch.empty_like(like, memory_format=torch.contiguous_format)
    upright = result.T if is_wide(like.shape) else result
    for part in left.parts():
        upright[part] = left.read(part) @ right
    return result


def self_product(matrix: Tensor) -> Tensor:
    """Return XᵀX, each pair of columns multiplied once."""
    columns = matrix.shape[1]
    product = matrix.new_empty(columns, columns)
    for part in blocks(columns, COLUMNS):
        above = matrix[:, : part.stop].T @ matrix[:, part]
        product[: part.stop, part] = above
        product[part, : part.start] = above[: part.start].T
    return product


def _without_zeros(matrix: TallMatrix, values: Tensor, right: Tensor, size: float) -> Triplets:
    kept = int((values > _zero(matrix, values, size)).sum())
    return Triplets(matrix, values[:kept], right[:, :kept])


def _zero(matrix: TallMatrix, values: Tensor, size: float) -> float:
    return matrix.rows * torch.finfo(values.dtype).eps * max(float(values[0]), size)


def _gram(matrix: TallMatrix) -> Tensor:
    products = [self_product(rows) for rows in map(matrix.read, matrix.parts())]
    return torch.stack(products).sum(0) if len(products) > 1 else products[0]


def _inverse_root(gram: Tensor) -> Tensor:
    """Return G^−½ on the directions that G has."""
    squares, vectors = torch.linalg.eigh(gram)
    kept = squares > SHARED * squares[-1]
    root: Tensor = (vectors[:, kept] / squares[kept].sqrt()) @ vectors[:, kept].T
    return root
