"""Permutations that are being searched for: convex combinations of orders, applied to tensors without n² entries.

A soft permutation of n units is a list of orders with factors that add up to 1. It maps a tensor's axis to
Σ c_k·W[o_k], where o_k[j] is the unit at position j.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mergelab.ops.permutations import Permutation, Slot

Order = NDArray[np.intp]  # the unit at each position


@dataclass(frozen=True)
class SoftOrder:
    """A convex combination of orders.

    Attributes:
        terms: pairs of a factor and an order; the factors add up to 1.
    """

    terms: tuple[tuple[float, Order], ...]

    @classmethod
    def of(cls, order: Order) -> SoftOrder:
        """Return an order as a combination of one."""
        return cls(((1.0, order),))

    def towards(self, order: Order, step: float) -> SoftOrder:
        """Return (1 − step) of this and ``step`` of an order."""
        kept = [((1 - step) * factor, own) for factor, own in self.terms if step < 1]
        equal = next((at for at, (_, own) in enumerate(kept) if np.array_equal(own, order)), None)
        if equal is None:
            return SoftOrder((*kept, (step, order)))
        kept[equal] = (kept[equal][0] + step, order)
        return SoftOrder(tuple(kept))

    def nearest(self) -> Order:
        """Return the order that has most of the combination, by a linear sum assignment."""
        if len(self.terms) == 1:
            return self.terms[0][1]
        count = len(self.terms[0][1])
        matrix = np.zeros((count, count))
        for factor, order in self.terms:
            matrix[np.arange(count), order] += factor
        return best_order(matrix)


def best_order(similarity: NDArray[np.float64]) -> Order:
    """Return the order of the largest sum of similarities (position, unit)."""
    found: Order = linear_sum_assignment(similarity, maximize=True)[1]
    return found


@dataclass(frozen=True)
class Axis:
    """The axis of a tensor that a permutation acts on."""

    permutation: str
    size: int
    axis: int
    slots: tuple[Slot, ...]

    def mapped(self, tensor: Tensor, soft: SoftOrder) -> Tensor:
        """Return a tensor with this axis mapped."""
        total: Tensor | None = None
        for factor, order in soft.terms:
            index = torch.arange(tensor.shape[self.axis], device=tensor.device)
            for slot in self.slots:
                entries = torch.from_numpy(order).to(index)[:, None] * slot.block + torch.arange(slot.block).to(index)
                index[slot.offset : slot.offset + entries.numel()] = slot.offset + entries.reshape(-1)
            moved = tensor.index_select(self.axis, index)
            total = moved * factor if total is None else total.add_(moved, alpha=factor)
        assert total is not None
        return total

    def similarity(self, positions: Tensor, units: Tensor) -> Tensor:
        """Return ⟨position j of one tensor, unit i of another⟩ over this axis's slots, (n, n) float64."""
        total = torch.zeros(self.size, self.size, dtype=torch.float64)
        for slot in self.slots:
            rows, others = (
                each.narrow(self.axis, slot.offset, self.size * slot.block)
                .movedim(self.axis, 0)
                .reshape(self.size, -1)
                .double()
                for each in (positions, units)
            )
            total += (rows @ others.T).cpu()
        return total


def axes_of(permutations: Sequence[Permutation]) -> dict[str, tuple[Axis, ...]]:
    """Return, by tensor, the axes that permutations act on."""
    slots: dict[tuple[str, int, str, int], list[Slot]] = {}
    for each in permutations:
        for slot in each.slots:
            slots.setdefault((slot.tensor, slot.axis, each.name, each.size), []).append(slot)
    found: dict[str, list[Axis]] = {}
    for (tensor, axis, name, size), own in slots.items():
        found.setdefault(tensor, []).append(Axis(name, size, axis, tuple(own)))
    return {tensor: tuple(axes) for tensor, axes in found.items()}


def mapped(tensor: Tensor, axes: Sequence[Axis], soft: Mapping[str, SoftOrder]) -> Tensor:
    """Return a tensor with all of these axes mapped."""
    for axis in axes:
        tensor = axis.mapped(tensor, soft[axis.permutation])
    return tensor
