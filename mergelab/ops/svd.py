"""Compute singular value decompositions of tall matrices that are read in blocks of rows, in float64.

A matrix (m, n) is a function that returns a slice of its rows. Memory is of the order of n², as U is never stored: its
rows are those of the matrix times V/σ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergelab.ops.blocks import blocks

# Returns a slice of a matrix's rows, float64.
ReadRows = Callable[[slice], Tensor]

ROWS = 2048  # rows in memory at once
COLUMNS = 192  # columns of a symmetric product computed at once
SQUARABLE = 1e-4  # σ_r/σ_1 above which float64 resolves σ_r² relative to σ_1²
SQUARED = 1e-7  # σ/σ_1 above which σ² is known to a few percent, enough to tell whether σ is rounding
SHARED = 1e-10  # eigenvalues of a Gram matrix of unit vectors count as 0 below this fraction of the largest


@dataclass(frozen=True)
class TallMatrix:
    """A matrix of at least as many rows as columns.

    Attributes:
        read: returns a slice of its rows, in float64.
        rows, columns: its shape.
    """

    read: ReadRows
    rows: int
    columns: int

    def parts(self) -> Iterator[slice]:
        """Divide the rows into slices."""
        return blocks(self.rows, ROWS)


@dataclass(frozen=True)
class Triplets:
    """Singular triplets of a matrix, the largest first.

    Attributes:
        matrix: the decomposed matrix.
        values: (r,) σ, all above 0.
        right: (columns, r) V.
    """

    matrix: TallMatrix
    values: Tensor
    right: Tensor

    def left(self, part: slice) -> Tensor:
        """Return a slice of the rows of U = X·V/σ."""
        return self.matrix.read(part) @ (self.right / self.values)

    def leading(self, rank: int) -> Triplets:
        """Return the ``rank`` largest triplets; all when there are fewer."""
        return Triplets(self.matrix, self.values[:rank], self.right[:, :rank])


def is_wide(shape: Sequence[int]) -> bool:
    """Return whether a matrix of this shape has fewer rows than columns."""
    return shape[0] < shape[1]


def tall_matrix(tensor: Tensor) -> TallMatrix:
    """View a matrix, or its transpose when it is wide, as a tall matrix."""
    tall = tensor.T if is_wide(tensor.shape) else tensor
    return TallMatrix(lambda part: tall[part].double(), *tall.shape)


def matrix_sum(matrices: Sequence[TallMatrix]) -> TallMatrix:
    """Return the sum of matrices of one shape, computed when it is read."""
    first, *others = matrices

    def read(part: slice) -> Tensor:
        rows = first.read(part).clone()
        for matrix in others:
            rows += matrix.read(part)
        return rows

    return TallMatrix(read, first.rows, first.columns)


def decompose(matrix: TallMatrix, *, size: float = 0.0, noise: float = 0.0) -> Triplets:
    """Return the singular triplets with σ > m·ε·σ_1; vectors of smaller σ are arbitrary within rounding.

    QR decompositions reduce the matrix block by block to a triangular one, which is then decomposed. Nothing is
    squared, so that small singular values are as accurate as float64 allows.

    Args:
        matrix: the matrix to decompose.
        size: norm of the matrices whose difference ``matrix`` is, if it is one; replaces σ_1 above when it is larger.
        noise: singular values up to it are dropped, too (`mergelab.ops.rounding.rounding_norm`).
    """
    triangle: Tensor | None = None
    for part in matrix.parts():
        rows = matrix.read(part)
        stacked = rows if triangle is None else torch.cat([triangle, rows])
        triangle = torch.linalg.qr(stacked, mode="r").R
    assert triangle is not None
    _, values, right = torch.linalg.svd(triangle, full_matrices=False)
    return _without_zeros(matrix, values, right.T, size, noise)


def decompose_leading(
    matrix: TallMatrix, rank: int, *, size: float = 0.0, noise: float = 0.0, gram: Tensor | None = None
) -> Triplets:
    """Return the ``rank`` largest singular triplets, without those whose σ is 0 within rounding.

    They come from the eigenvectors of XᵀX when squaring does not lose accuracy, else from `decompose`.

    Args:
        matrix: X.
        rank: number of triplets.
        size, noise: as for `decompose`.
        gram: XᵀX, with a rounding error of at most ε·size², when it is known.
    """
    squares, vectors = torch.linalg.eigh(_gram(matrix) if gram is None else gram)
    values = squares.clamp_min(0).sqrt().flip(0)[:rank]
    largest = max(float(values[0]), size)
    if noise >= SQUARED * largest:
        values = values[values > noise]
    if not len(values) or float(values[0]) <= _zero(matrix, values, size, noise):
        return Triplets(matrix, values[:0], vectors[:, :0])
    if values[-1] < SQUARABLE * largest:
        return decompose(matrix, size=size, noise=noise).leading(rank)
    return Triplets(matrix, values, vectors.flip(1)[:, : len(values)])


def concatenated_left(parts: Sequence[Triplets]) -> TallMatrix:
    """View the left singular vectors of several matrices as one matrix, [U_1 … U_T]."""

    def left(rows: slice) -> Tensor:
        return torch.cat([part.left(rows) for part in parts], dim=1)

    return TallMatrix(left, parts[0].matrix.rows, sum(len(part.values) for part in parts))


def orthogonalised(left: TallMatrix, right: Tensor, spectrum: Tensor, like: Tensor) -> Tensor:
    """Merge the triplets of several matrices after making their left and their right vectors orthonormal.

    Ũ·diag(s)·Ṽᵀ with Ũ = U(UᵀU)^−½ for U = [U_1 … U_T], the nearest matrix of orthonormal columns (Procrustes), and Ṽ
    likewise for the V_t. Directions that columns of U share to within float64's resolution count once, by the
    pseudo-inverse; an SVD of U would add arbitrary directions for them.

    Args:
        left: U (m, Σ r_t).
        right: V (n, Σ r_t).
        spectrum: s (Σ r_t,), in place of the singular values.
        like: has the shape and dtype of the result; when it is wide, the result is transposed.
    """
    if not right.shape[1]:
        return torch.zeros_like(like)
    inner = _inverse_root(_gram(left)) @ (spectrum[:, None] * (_inverse_root(self_product(right)) @ right.T))
    return assembled(left, inner, like)


def assembled(left: TallMatrix, right: Tensor, like: Tensor) -> Tensor:
    """Return a tall matrix times a small one, in the dtype of ``like``, transposed when ``like`` is wide."""
    result = torch.empty_like(like, memory_format=torch.contiguous_format)
    tall = result.T if is_wide(like.shape) else result
    for part in left.parts():
        tall[part] = left.read(part) @ right
    return result


def self_product(matrix: Tensor) -> Tensor:
    """Return XᵀX, with each pair of columns multiplied once."""
    columns = matrix.shape[1]
    product = matrix.new_empty(columns, columns)
    for part in blocks(columns, COLUMNS):
        above = matrix[:, : part.stop].T @ matrix[:, part]
        product[: part.stop, part] = above
        product[part, : part.start] = above[: part.start].T
    return product


def _without_zeros(matrix: TallMatrix, values: Tensor, right: Tensor, size: float, noise: float) -> Triplets:
    rank = int((values > _zero(matrix, values, size, noise)).sum())
    return Triplets(matrix, values[:rank], right[:, :rank])


def _zero(matrix: TallMatrix, values: Tensor, size: float, noise: float) -> float:
    """Return the bound up to which a singular value counts as 0."""
    return max(noise, matrix.rows * torch.finfo(values.dtype).eps * max(float(values[0]), size))


def _gram(matrix: TallMatrix) -> Tensor:
    products = [self_product(rows) for rows in map(matrix.read, matrix.parts())]
    return torch.stack(products).sum(0) if len(products) > 1 else products[0]


def _inverse_root(gram: Tensor) -> Tensor:
    """Return the pseudo-inverse of G^½."""
    squares, vectors = torch.linalg.eigh(gram)
    nonzero = squares > SHARED * squares[-1]
    root: Tensor = (vectors[:, nonzero] / squares[nonzero].sqrt()) @ vectors[:, nonzero].T
    return root
