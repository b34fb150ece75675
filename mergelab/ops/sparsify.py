"""Ranks within the rows of whole tensors, for methods that sparsify task vectors by them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mergelab.ops.blocks import BLOCK, blocks, blockwise
from mergelab.ops.task_vectors import weighted_sum


def rows(tensor: Tensor) -> Tensor:
    """View a contiguous tensor as a matrix: along its last dimension; one without rows is a row itself."""
    count = math.prod(tensor.shape[:-1])
    return tensor.view(count, tensor.numel() // max(1, count))


Rescale = bool | Literal["magnitudes"]  # by the probability of staying, or to the same sum of magnitudes
_NOTHING = 1e-7  # a sum of magnitudes under which mergekit rescales nothing


def restoring(before: float, after: float) -> float:
    """Return the factor that brings a sum of magnitudes from ``after`` to ``before``; 1 where one is nothing."""
    return 1.0 if min(before, after) < _NOTHING else before / after


def row_blocks(lines: Tensor) -> Iterator[slice]:
    """Cut the rows of a matrix into slices of about as many entries as a block, at least one row each."""
    count, length = lines.shape
    return blocks(count if length else 0, max(1, BLOCK // max(1, length)))


def ranked_magnitudes(lines: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    """Select from every row the magnitudes of these ranks; the largest has rank 1.

    Returns:
        For each rank a column, one entry per row.
    """
    magnitudes = lines.abs()
    places = [lines.shape[1] - rank for rank in ranks]
    if lines.device.type == "cpu":
        array = magnitudes.numpy()
        array.partition(tuple(sorted(set(places))), axis=1)
        return [torch.from_numpy(np.ascontiguousarray(array[:, place : place + 1])) for place in places]
    ordered = magnitudes.sort(dim=1).values
    return [ordered[:, place : place + 1] for place in places]


def summed(vectors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return Σ w_t x_t of whole tensors."""
    return blockwise(lambda *parts: weighted_sum(parts, weights), *vectors)
