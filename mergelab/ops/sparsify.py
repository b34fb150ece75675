"""What methods that sparsify whole tensors of the task vectors share: their rows, and the election that follows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from mergelab.ops.blocks import BLOCK, blocks, blockwise
from mergelab.ops.sign_consensus import TieBreak, WeightsStage, election_factors
from mergelab.ops.site import Site
from mergelab.ops.task_vectors import (
    MajoritySign,
    Reduce,
    disjoint_reduce,
    elect,
    resolve_zeros_,
    task_vectors,
    weighted_sum,
)
from mergelab.ops.threads import in_order
from mergelab.weights.align import AlignedModels

# Answers what a method leaves of the T task vectors of a whole tensor; it may write into them.
Sparsify = Callable[[Sequence[Tensor], Site], list[Tensor]]


def rows(tensor: Tensor) -> Tensor:
    """View a contiguous tensor as a matrix: along its last dimension; one without rows is a row itself."""
    count = math.prod(tensor.shape[:-1])
    return tensor.view(count, tensor.numel() // max(1, count))


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


def agreed(
    vectors: Sequence[Tensor],
    weights: Sequence[float],
    tie_sign: float,
    *,
    majority_sign: MajoritySign,
    reduce: Reduce,
    weights_stage: WeightsStage,
) -> Tensor:
    """Elect signs and combine what agrees, as TIES does, of whole tensors."""
    votes = election_factors(weights, weights_stage)

    def combine(*parts: Tensor) -> Tensor:
        return disjoint_reduce(parts, resolve_zeros_(elect(parts, votes, majority_sign), tie_sign), weights, reduce)

    return blockwise(combine, *vectors)


def sign_of_ties(
    models: AlignedModels,
    sparsify: Sparsify,
    *,
    seed: int,
    weights: Sequence[float],
    majority_sign: MajoritySign,
    tie_break: TieBreak,
    weights_stage: WeightsStage,
) -> float:
    """Return the sign of entries whose votes cancel: that which more entries of the sparsified models elect.

    Returns:
        −1, 0 or 1; found without reading the models where ``tie_break`` says it.
    """
    if tie_break != "majority":
        return 1.0 if tie_break == "positive" else 0.0
    votes = election_factors(weights, weights_stage)
    experts = tuple(expert.name for expert in models.experts)

    def surplus(name: str) -> int:
        assert models.base is not None
        vectors = task_vectors(models.base.get(name).cpu(), [expert.get(name).cpu() for expert in models.experts])
        site = Site(name, experts, tuple(models.base.shape(name)), seed=seed)
        flat = [vector.reshape(-1) for vector in sparsify(vectors, site)]
        parts = blocks(flat[0].numel())  # a block has fewer than 2^24 entries, so its sum is exact
        return sum(int(elect([vector[part] for vector in flat], votes, majority_sign).sum()) for part in parts)

    total = sum(in_order(surplus, models.names, ahead=1))
    return float((total > 0) - (total < 0))
