"""What an adapter changes in a tensor of its base: the canonical form that every format is read into.

A change maps a stored tensor to the adapted one, in the tensor's own layout. `apply_all` computes in float32 (float64
for float64 tensors) and rounds once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Shape = tuple[int, ...]


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
    """

    left: Tensor
    right: Tensor
    scale: float
    transposed: bool = False

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


def apply_all(changes: Sequence[Change], tensor: Tensor) -> Tensor:
    """Apply changes in their order, in float32 (float64 for a float64 tensor), rounded once to the tensor's dtype.

    Returns:
        A new tensor.
    """
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    changed = tensor.to(wide, copy=True)
    for change in changes:
        changed = change.apply(changed)
    return changed.to(tensor.dtype)


def same_changes(a: Sequence[Change], b: Sequence[Change]) -> bool:
    """Return whether two tensors that were equal are equal after these changes."""
    return len(a) == len(b) and all(one.same_as(other) for one, other in zip(a, b, strict=True))


def _as_matrix(shape: Shape) -> Shape:
    return shape[0], int(torch.Size(shape[1:]).numel())
