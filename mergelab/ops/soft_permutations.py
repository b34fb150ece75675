"""Permutations that are being searched for: convex combinations of orders, applied to tensors without n² entries.

A soft permutation of n units is a list of orders with factors that add up to 1. It maps a tensor's axis to
Σ c_k·W[o_k], where o_k[j] is the unit at position j.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mergelab.ops.blocks import blocks
from mergelab.ops.permutations import Order, Permutation, Slot

ENTRIES = 1 << 19  # entries of a matrix that are mapped at once: 4 MB in float64
TERMS = 4  # orders of a combination that are taken at once


@dataclass(frozen=True)
class SoftOrder:
    """A convex combination of orders.

    Attributes:
        factors: (k,) float64, adding up to 1.
        orders: (k, n) int64, the unit at each position.
    """

    factors: Tensor
    orders: Tensor

    @classmethod
    def of(cls, order: Order) -> SoftOrder:
        """Return an order as a combination of one."""
        return cls(torch.ones(1, dtype=torch.float64), torch.from_numpy(order)[None])

    def towards(self, order: Order, step: float) -> SoftOrder:
        """Return (1 − step) of this and ``step`` of an order."""
        if step >= 1:
            return SoftOrder.of(order)
        target, factors = torch.from_numpy(order), self.factors * (1 - step)
        equal = (self.orders == target).all(1)
        if equal.any():
            return SoftOrder(factors + step * equal, self.orders)
        return SoftOrder(torch.cat([factors, factors.new_tensor([step])]), torch.cat([self.orders, target[None]]))

    def nearest(self) -> Order:
        """Return the order that has most of the combination, by a linear sum assignment."""
        if len(self.factors) == 1:
            order: Order = self.orders[0].numpy()
            return order
        count = self.orders.shape[1]
        matrix = torch.zeros(count, count, dtype=torch.float64)
        for factor, own in zip(self.factors, self.orders, strict=True):
            matrix[torch.arange(count), own] += factor
        return best_order(matrix.numpy())


SoftOrders = Mapping[str, SoftOrder]  # by the permutation's name


def best_order(similarity: NDArray[np.float64]) -> Order:
    """Return the order of the largest sum of similarities (position, unit)."""
    found: Order = linear_sum_assignment(similarity, maximize=True)[1]
    return found


@dataclass(frozen=True)
class OrderedAxis:
    """What a permutation does along the axis of a tensor.

    Attributes:
        permutation: its name.
        size: number of units.
        slots: the parts of the axis that it acts on.
    """

    permutation: str
    size: int
    slots: tuple[Slot, ...]

    def mapped(self, matrix: Tensor, dim: int, soft: SoftOrders, part: slice = slice(None)) -> Tensor:
        """Return a part of the positions along an axis of a matrix, mapped: float64."""
        own = soft[self.permutation]
        index = torch.arange(matrix.shape[dim]).repeat(len(own.factors), 1)
        for slot in self.slots:
            entries = own.orders[:, :, None] * slot.block + torch.arange(slot.block)
            index[:, slot.offset : slot.offset + self.size * slot.block] = slot.offset + entries.flatten(1)
        total: Tensor | None = None
        for group in blocks(len(index), TERMS):
            places = index[group, part].to(matrix.device)
            moved = matrix.index_select(dim, places.flatten()).double()
            moved = moved.view(*matrix.shape[:dim], *places.shape, *matrix.shape[dim + 1 :])
            summand = torch.tensordot(own.factors[group].to(matrix.device), moved, ([0], [dim]))
            total = summand if total is None else total.add_(summand)
        assert total is not None
        return total

    def similarity(self, positions: Tensor, units: Tensor) -> Tensor:
        """Return ⟨position i of one matrix, unit j of another⟩ over the rows of all slots: (n, n) on the CPU."""
        total = torch.zeros(self.size, self.size, dtype=torch.float64)
        for slot in self.slots:
            rows, others = (
                each.narrow(0, slot.offset, self.size * slot.block).reshape(self.size, -1)
                for each in (positions, units)
            )
            total += (rows @ others.T).cpu()
        return total


@dataclass(frozen=True)
class AxisView:
    """A tensor as a matrix with a permutation's units along the rows.

    Attributes:
        tensor: its name.
        transposed: the units lie along the tensor's columns.
        rows: the permutation.
        columns: the permutation along the other axis, if there is one.
    """

    tensor: str
    transposed: bool
    rows: OrderedAxis
    columns: OrderedAxis | None

    def matrix(self, tensor: Tensor) -> Tensor:
        """Return the tensor as such a matrix."""
        if tensor.ndim == 1:
            return tensor[:, None]
        return tensor.T if self.transposed else tensor

    def parts(self, matrix: Tensor) -> Iterator[slice]:
        """Divide the columns into slices."""
        return blocks(matrix.shape[1], max(1, ENTRIES // matrix.shape[0]))

    def columns_mapped(self, matrix: Tensor, soft: SoftOrders, part: slice) -> Tensor:
        """Return some columns, with the columns' permutation alone: float64."""
        return matrix[:, part].double() if self.columns is None else self.columns.mapped(matrix, 1, soft, part)

    def rows_mapped(self, matrix: Tensor, soft: SoftOrders) -> Tensor:
        """Return what `columns_mapped` returned, with the rows' permutation, too."""
        return self.rows.mapped(matrix, 0, soft)


def views_of(permutations: Sequence[Permutation]) -> dict[str, tuple[AxisView, ...]]:
    """Return by permutation the tensors that have its units along an axis.

    On an axis there is one permutation at most.
    """
    axes: dict[tuple[str, int], OrderedAxis] = {}
    for each in permutations:
        for slot in each.slots:
            known = axes.get((slot.tensor, slot.axis), OrderedAxis(each.name, each.size, ()))
            axes[slot.tensor, slot.axis] = OrderedAxis(known.permutation, known.size, (*known.slots, slot))
    found: dict[str, list[AxisView]] = {each.name: [] for each in permutations}
    for (tensor, axis), own in axes.items():
        found[own.permutation].append(AxisView(tensor, axis == 1, own, axes.get((tensor, 1 - axis))))
    return {name: tuple(views) for name, views in found.items()}
