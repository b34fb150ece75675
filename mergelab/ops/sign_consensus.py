"""The parameters of a sign election, and the signs of entries whose votes cancel, counted over whole models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mergelab.ops.blocks import blocks, blockwise
from mergelab.ops.expert_values import MeanWeights
from mergelab.ops.site import Site, SiteOf
from mergelab.ops.task_vectors import (
    MajoritySign,
    Reduce,
    Vectors,
    disjoint_reduce,
    elect,
    factors,
    resolve_zeros,
    task_vectors,
    trim_,
)
from mergelab.ops.threads import chunks, in_order
from mergelab.ops.thresholds import OpenVectors, Scope, Thresholds, find_thresholds
from mergelab.weights.align import AlignedModels

TieBreak = Literal["majority", "positive", "zero"]
WeightsStage = Literal["reduce", "elect"]
# Returns what a method leaves of the T task vectors of a whole tensor; it may write into them.
Sparsify = Callable[[Sequence[Tensor], Site], list[Tensor]]


@dataclass(frozen=True)
class SignConsensus:
    """How the experts agree on a sign at each entry, and how those that have it are combined (TIES, arXiv:2306.01708).

    A method whose function takes it has these parameters.

    Attributes:
        weights: per expert, at least 0; default 1.
        majority_sign: whether the sign of larger total magnitude is elected, or the one that more experts have.
        reduce: how the entries that have the elected sign are combined: weighted mean, weighted sum, or the largest.
        tie_break: the sign of entries whose votes cancel: the one that is elected at more entries (0 where these are
            equally many), the positive one, or 0.
        weights_stage: whether weights count in the reduction alone, or also multiply the task vectors before they vote.
    """

    weights: MeanWeights = None
    majority_sign: MajoritySign = "total"
    reduce: Reduce = "mean"
    tie_break: TieBreak = "majority"
    weights_stage: WeightsStage = "reduce"

    def shares(self, count: int) -> tuple[float, ...]:
        """Return the weights of ``count`` experts."""
        return factors(self.weights, count)

    def votes(self, count: int) -> tuple[float, ...]:
        """Return the factors that the task vectors of ``count`` experts are multiplied by before they vote."""
        return self.shares(count) if self.weights_stage == "elect" else (1.0,) * count

    def elect(self, vectors: Sequence[Tensor]) -> Tensor:
        """Return the elected sign at each entry; 0 where the votes cancel."""
        return elect(vectors, self.votes(len(vectors)), self.majority_sign)

    def merge(self, vectors: Sequence[Tensor], tie_sign: float) -> Tensor:
        """Elect signs and combine the entries that have them, block by block.

        Args:
            vectors: T whole tensors, sparsified.
            tie_sign: the sign of entries whose votes cancel.

        Returns:
            τ_m, of the vectors' shape.
        """
        shares = self.shares(len(vectors))

        def merge_block(*parts: Tensor) -> Tensor:
            return disjoint_reduce(parts, resolve_zeros(self.elect(parts), tie_sign), shares, self.reduce)

        return blockwise(merge_block, *vectors)


@dataclass(frozen=True)
class TensorConsensus:
    """What merging one tensor needs to know of the whole models.

    Attributes:
        thresholds: per expert, the magnitude below which an entry is dropped.
        tie_sign: −1, 0 or 1: the sign of entries whose votes cancel.
    """

    thresholds: Thresholds
    tie_sign: float = 0.0


def prepare_consensus(
    models: AlignedModels,
    open_vectors: OpenVectors,
    consensus: SignConsensus,
    *,
    density: float | Sequence[float] | None,
    scope: Scope,
    memo: dict[str, Any] | None = None,
) -> Mapping[str, TensorConsensus]:
    """Find each tensor's trimming thresholds and the sign of its ties.

    Args:
        models: base and experts.
        open_vectors: access to the task vectors of a tensor, as they are trimmed and vote.
        consensus: how they vote.
        density: fraction of entries to keep, of all experts or of each; None: no trimming.
        scope: what the fraction is of, and over what the majority is counted.
        memo: keeps an index of the vectors' magnitudes for the next time, where the vectors will be the same.

    Returns:
        One `TensorConsensus` for every name in ``models.names``.
    """
    assert models.base is not None
    sizes = {name: torch.Size(models.base.shape(name)).numel() for name in models.names}
    thresholds = find_thresholds(open_vectors, sizes, density, scope, models, memo)
    signs = dict.fromkeys(sizes, 1.0 if consensus.tie_break == "positive" else 0.0)
    if consensus.tie_break == "majority":

        def count(place: tuple[str, slice]) -> tuple[str, int]:
            name, chunk = place
            return name, _surplus(open_vectors(name), chunk, thresholds[name], consensus)

        signs = tie_signs(in_order(count, chunks(sizes)), sizes, scope)
    return {name: TensorConsensus(thresholds[name], signs[name]) for name in sizes}


def _surplus(read: Vectors, chunk: slice, thresholds: Thresholds, consensus: SignConsensus) -> int:
    """Return how many more entries of a part of a tensor are elected positive than negative."""
    surplus = 0
    for part in blocks(chunk.stop, start=chunk.start):
        trimmed = [trim_(vector, threshold) for vector, threshold in zip(read(part), thresholds, strict=True)]
        surplus += int(consensus.elect(trimmed).sum())  # exact: a block has fewer than 2^24 entries
    return surplus


def tie_signs(surpluses: Iterable[tuple[str, int]], names: Iterable[str], scope: Scope = "model") -> dict[str, float]:
    """Return for each tensor the sign that more entries elect, of that tensor alone or of all.

    Args:
        surpluses: how many more entries of (a part of) a tensor are elected positive than negative.
        names: of all tensors.
        scope: "tensor": that of each tensor; otherwise that of all tensors together.
    """
    of_tensor = dict.fromkeys(names, 0)
    for name, more in surpluses:
        of_tensor[name] += more
    whole = sum(of_tensor.values())
    return {name: sign_of(more if scope == "tensor" else whole) for name, more in of_tensor.items()}


def sign_of(count: int) -> float:
    """Return −1, 0 or 1."""
    return float((count > 0) - (count < 0))


def find_tie_sign(models: AlignedModels, sparsify: Sparsify, consensus: SignConsensus, site_of: SiteOf) -> float:
    """Return the sign of entries whose votes cancel, of methods that sparsify whole tensors.

    Returns:
        −1, 0 or 1; the models are read only where ``tie_break`` asks for the majority.
    """
    if consensus.tie_break != "majority":
        return 1.0 if consensus.tie_break == "positive" else 0.0

    def surplus(name: str) -> int:
        assert models.base is not None
        vectors = task_vectors(models.base.get(name).cpu(), [expert.get(name).cpu() for expert in models.experts])
        flat = [vector.reshape(-1) for vector in sparsify(vectors, site_of(name))]
        parts = blocks(flat[0].numel())  # a block has fewer than 2^24 entries, so its sum is exact
        return sum(int(consensus.elect([vector[part] for vector in flat]).sum()) for part in parts)

    return sign_of(sum(in_order(surplus, models.names, ahead=1)))
