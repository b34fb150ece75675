"""What an adapter changes in a tensor of its base: the canonical form that every format is read into.

A change maps a stored tensor to the adapted one, in the tensor's own layout. `apply_all` computes in float32 (float64
for float64 tensors) and rounds once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mergelab.ops.blocks import blocks

Shape = tuple[int, ...]
ROWS = 1 << 19  # entries of the rows of a product that are computed at once, which stay in a core's cache


class Change(Protocol):
    """A change of one tensor."""

    def shape(self, stored: Shape) -> Shape | None:
        """Return the shape that a tensor of shape ``stored`` has after the change; None where it does not fit."""
        ...

    def apply(self, tensor: Tensor) -> Tensor:
        """Return the changed tensor; ``tensor`` is float32 or float64, and may be overwritten."""
        ...

    def same_as(self, other: Change) -> bool:
        """Return whether two changes are equal in their values."""
        ...


@dataclass(frozen=True, eq=False)
class LowRank:
    """Add ``scale · left · right``, in the layout in which the tensor is stored.

    For a linear layer's (out, in) weight ``left`` is B (out, r) and ``right`` is A (r, in). For the (in, out) weight of
    a Conv1D layer, and for an embedding (tokens, width), both are transposed: ``left`` is Aᵀ, ``right`` is Bᵀ. For a
    convolution (out, in, height, width), ``right`` is (r, in · height · width).

    Attributes:
        left: (rows, r).
        right: (r, columns).
        scale: α/r, or α/√r for rsLoRA.
        transposed: whether ``left`` is Aᵀ and ``right`` is Bᵀ.
        kind: ``LORA``, or the type of adapter that it is computed of, whose own A and B these are not.
    """

    left: Tensor
    right: Tensor
    scale: float
    transposed: bool = False
    kind: str = "LORA"

    @classmethod
    def of(cls, a: Tensor, b: Tensor, scale: float, *, transposed: bool) -> LowRank:
        """Make it of A (r, inputs) and B (outputs, r)."""
        return cls(a.T, b.T, scale, transposed) if transposed else cls(b, a, scale)

    @property
    def a(self) -> Tensor:
        """A, (r, inputs)."""
        return self.left.T if self.transposed else self.right

    @property
    def b(self) -> Tensor:
        """B, (outputs, r)."""
        return self.right.T if self.transposed else self.left

    @property
    def rank(self) -> int:
        """The number of columns of ``left``."""
        return int(self.right.shape[0])

    def shape(self, stored: Shape) -> Shape | None:
        """Return ``stored`` where it is that of the product."""
        return stored if len(stored) >= 2 and _as_matrix(stored) == self.product_shape else None

    @property
    def product_shape(self) -> Shape:
        """The shape of the product, (rows, columns)."""
        return self.left.shape[0], self.right.shape[1]

    def apply(self, tensor: Tensor) -> Tensor:
        """Return ``tensor + scale · left · right``."""
        flat = tensor.reshape(self.product_shape)
        left, right = self.left.to(flat), self.right.to(flat)
        return torch.addmm(flat, left, right, alpha=self.scale).view(tensor.shape)

    def same_as(self, other: Change) -> bool:
        """Return whether factors and scale are equal."""
        return (
            isinstance(other, LowRank)
            and self.scale == other.scale
            and torch.equal(self.left, other.left)
            and torch.equal(self.right, other.right)
        )


@dataclass(frozen=True, eq=False)
class Stacked:
    """Add ``scale · left · right`` to each matrix of a stack: the experts of mixture models.

    Attributes:
        left: (experts, rows, r).
        right: (experts, r, columns).
        scale: as of `LowRank`.
    """

    left: Tensor
    right: Tensor
    scale: float

    @property
    def product_shape(self) -> Shape:
        """The shape of the product, (experts, rows, columns)."""
        return (*self.left.shape[:2], self.right.shape[2])

    def shape(self, stored: Shape) -> Shape | None:
        """Return ``stored`` where it is that of the product."""
        return stored if stored == self.product_shape else None

    def apply(self, tensor: Tensor) -> Tensor:
        """Return the sums."""
        return torch.baddbmm(tensor, self.left.to(tensor), self.right.to(tensor), alpha=self.scale)

    def same_as(self, other: Change) -> bool:
        """Return whether factors and scale are equal."""
        return (
            isinstance(other, Stacked)
            and self.scale == other.scale
            and torch.equal(self.left, other.left)
            and torch.equal(self.right, other.right)
        )


@dataclass(frozen=True, eq=False)
class Product:
    """Add ``scale`` times the product of two matrices: of their entries (LoHa), or Kronecker's (LoKr).

    Each matrix is given as (X,), which is X; as (X, Y), X · Y; or, for a convolution, as (T, X, Y), which is
    Σ T[i, j] · X[i]ᵀ Y[j] with T (r, r, height, width), X (r, outputs) and Y (r, inputs).

    Attributes:
        first, second: the two; for LoKr the second may be (outputs, inputs, …), with the sizes of a kernel.
        scale: α/r.
        kronecker: which product.
    """

    first: tuple[Tensor, ...]
    second: tuple[Tensor, ...]
    scale: float
    kronecker: bool

    @property
    def factor_shapes(self) -> tuple[Shape, Shape]:
        """The shapes of the two matrices."""
        return _shape_of(self.first), _shape_of(self.second)

    @property
    def product_shape(self) -> Shape:
        """The shape of the product, (outputs, inputs, …)."""
        first, second = self.factor_shapes
        return (first[0] * second[0], first[1] * second[1], *second[2:]) if self.kronecker else first

    def shape(self, stored: Shape) -> Shape | None:
        """Return ``stored`` where it is that of the product."""
        own = self.product_shape
        return stored if len(stored) >= 2 and own in (stored, _as_matrix(stored), (*stored, 1)) else None

    def apply(self, tensor: Tensor) -> Tensor:
        """Return the sum."""
        first, second = _multiplied(self.first, tensor), _multiplied(self.second, tensor)
        if self.kronecker and second.dim() == 4:
            first = first[:, :, None, None]
        product = torch.kron(first, second) if self.kronecker else first * second
        return tensor.add_(product.reshape(tensor.shape), alpha=self.scale)

    def same_as(self, other: Change) -> bool:
        """Return whether the matrices and the scale are equal."""
        if not isinstance(other, Product) or (self.scale, self.kronecker) != (other.scale, other.kronecker):
            return False
        own, others = (*self.first, *self.second), (*other.first, *other.second)
        return self.factor_shapes == other.factor_shapes and all(map(torch.equal, own, others))


@dataclass(frozen=True, eq=False)
class Magnitude:
    """Give each output of a layer the length that DoRA has learnt: ``m · V / ‖V‖``, after the low-rank change.

    Attributes:
        magnitude: (outputs,).
        by_column: whether an output is a column of the stored tensor (Conv1D, embeddings); else a row.
    """

    magnitude: Tensor
    by_column: bool

    def shape(self, stored: Shape) -> Shape | None:
        """Return ``stored`` where it has as many outputs as there are magnitudes."""
        if len(stored) < 2:
            return None
        return stored if stored[1 if self.by_column else 0] == self.magnitude.numel() else None

    def apply(self, tensor: Tensor) -> Tensor:
        """Return the rescaled tensor."""
        outputs = tensor.mT if self.by_column else tensor.flatten(1)
        lengths: Tensor = torch.linalg.norm(outputs, dim=1, keepdim=True)
        scaled = outputs * (self.magnitude.to(tensor).view(-1, 1) / lengths)
        return (scaled.mT if self.by_column else scaled).reshape(tensor.shape)

    def same_as(self, other: Change) -> bool:
        """Return whether the magnitudes are equal."""
        return (
            isinstance(other, Magnitude)
            and self.by_column == other.by_column
            and torch.equal(self.magnitude, other.magnitude)
        )


@dataclass(frozen=True, eq=False)
class Factor:
    """Multiply by a vector along one axis: IA³.

    Attributes:
        vector: (n,).
        axis: the axis of the stored tensor that has n entries.
    """

    vector: Tensor
    axis: int

    def shape(self, stored: Shape) -> Shape | None:
        """Return ``stored`` where the axis is as long as the vector."""
        return stored if len(stored) > self.axis and stored[self.axis] == self.vector.numel() else None

    def apply(self, tensor: Tensor) -> Tensor:
        """Return the product."""
        sizes = [1] * tensor.dim()
        sizes[self.axis] = -1
        return tensor * self.vector.to(tensor).view(sizes)

    def same_as(self, other: Change) -> bool:
        """Return whether the vectors are equal."""
        return isinstance(other, Factor) and self.axis == other.axis and torch.equal(self.vector, other.vector)


@dataclass(frozen=True, eq=False)
class Shift:
    """Add ``scale · vector``: the bias of LoRA's B.

    Attributes:
        vector: of the tensor's shape.
        scale: as of `LowRank`.
    """

    vector: Tensor
    scale: float

    def shape(self, stored: Shape) -> Shape | None:
        """Return ``stored`` where it is the vector's."""
        return stored if stored == tuple(self.vector.shape) else None

    def apply(self, tensor: Tensor) -> Tensor:
        """Return the sum."""
        return tensor + self.scale * self.vector.to(tensor)

    def same_as(self, other: Change) -> bool:
        """Return whether vector and scale are equal."""
        return isinstance(other, Shift) and self.scale == other.scale and torch.equal(self.vector, other.vector)


@dataclass(frozen=True, eq=False)
class Rows:
    """Replace rows: tokens that were trained.

    Attributes:
        indices: (n,) the rows.
        values: (n, width) what they are replaced with.
    """

    indices: Tensor
    values: Tensor

    def shape(self, stored: Shape) -> Shape | None:
        """Return ``stored`` where it has these rows, and rows of this width."""
        fits = len(stored) == 2 and stored[1] == self.values.shape[1] and int(self.indices.max()) < stored[0]
        return stored if fits else None

    def apply(self, tensor: Tensor) -> Tensor:
        """Return the tensor with these rows."""
        return tensor.index_copy(0, self.indices, self.values.to(tensor))

    def same_as(self, other: Change) -> bool:
        """Return whether rows and values are equal."""
        return (
            isinstance(other, Rows)
            and torch.equal(self.indices, other.indices)
            and torch.equal(self.values, other.values)
        )


@dataclass(frozen=True, eq=False)
class Replacement:
    """Take the adapter's own tensor: trained biases, heads, embeddings with more tokens.

    Attributes:
        values: the tensor.
        may_grow: whether it may have other rows than the base's, as an embedding with added tokens, or a head.
    """

    values: Tensor
    may_grow: bool = False

    def shape(self, stored: Shape) -> Shape | None:
        """Return the new shape where the base's tensor is like it."""
        own = tuple(self.values.shape)
        return own if own == stored or (self.may_grow and own[1:] == stored[1:]) else None

    def apply(self, tensor: Tensor) -> Tensor:
        """Return the adapter's tensor."""
        return self.values.to(tensor.dtype, copy=True)

    def same_as(self, other: Change) -> bool:
        """Return whether the values are equal."""
        return isinstance(other, Replacement) and torch.equal(self.values, other.values)


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor as float32, or as it is where it is float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def apply_all(changes: Sequence[Change], tensor: Tensor) -> Tensor:
    """Apply changes in their order, in float32 (float64 for a float64 tensor), rounded once to the tensor's dtype.

    Returns:
        A new tensor.
    """
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    if changes and all(isinstance(change, LowRank) for change in changes):
        left, right = joined([(1.0, change) for change in changes if isinstance(change, LowRank)], wide)
        found = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        for rows, sums in added(tensor, left.to(tensor.device), right.to(tensor.device)):
            found.view(left.shape[0], -1)[rows] = sums
        return found
    changed = tensor.to(wide, copy=True)
    for change in changes:
        changed = change.apply(changed)
    return changed.to(tensor.dtype)


def joined(changes: Sequence[tuple[float, LowRank]], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Join a weighted sum of changes to one of rank Σr, which it equals but for the rounding of the factors.

    Args:
        changes: each with its weight; all of one shape.
        dtype: of the result, float32 or float64.

    Returns:
        (rows, Σr) and (Σr, columns): Σ w_t s_t L_t R_t is their product.
    """
    (rows, columns), rank = changes[0][1].product_shape, sum(change.rank for _, change in changes)
    left, right = torch.empty(rows, rank, dtype=dtype), torch.empty(rank, columns, dtype=dtype)
    start = 0
    for weight, change in changes:
        own = slice(start, start := start + change.rank)
        torch.mul(change.left.to(dtype), weight * change.scale, out=left[:, own])
        right[own] = change.right
    return left, right


def rows_at_once(columns: int) -> int:
    """Return how many rows of a matrix `added` computes at once."""
    return max(1, ROWS // max(1, columns))


def added(tensor: Tensor, left: Tensor, right: Tensor, part: slice = slice(None)) -> Iterator[tuple[slice, Tensor]]:
    """Add a product to a tensor, some rows at a time, in the factors' dtype.

    Args:
        tensor: contiguous, with as many entries as the product.
        left, right: (rows, r) and (r, columns), float32 or float64.
        part: the rows that are computed; a value does not depend on it where it begins at a multiple of `rows_at_once`.

    Returns:
        Rows, and the sum in them, which is overwritten by the next one.
    """
    flat = tensor.reshape(left.shape[0], -1)
    start, stop, _ = part.indices(left.shape[0])
    buffer = left.new_empty(min(rows_at_once(right.shape[1]), stop - start), right.shape[1])
    for rows in blocks(stop, rows_at_once(right.shape[1]), start):
        sums = buffer[: rows.stop - rows.start].copy_(flat[rows])
        yield rows, sums.addmm_(left[rows], right) if left.shape[1] else sums


def same_changes(a: Sequence[Change], b: Sequence[Change]) -> bool:
    """Return whether two tensors that were equal are equal after these changes."""
    return a is b or (len(a) == len(b) and all(one.same_as(other) for one, other in zip(a, b, strict=True)))


def _as_matrix(shape: Shape) -> Shape:
    return shape[0], int(torch.Size(shape[1:]).numel())


def _multiplied(factors: tuple[Tensor, ...], like: Tensor) -> Tensor:
    """Return the matrix that a `Product` has as factors."""
    own = [factor.to(like) for factor in factors]
    if len(own) < 3:
        return own[0] @ own[1] if len(own) == 2 else own[0]
    return torch.einsum("ijkl,ip,jr->prkl", *own)


def _shape_of(factors: tuple[Tensor, ...]) -> Shape:
    if len(factors) < 3:
        return (factors[0].shape[0], *factors[-1].shape[1:])
    core, x, y = factors
    return x.shape[1], y.shape[1], *core.shape[2:]
