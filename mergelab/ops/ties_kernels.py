"""TIES in one pass: block by block in given room, or as one function for a compiler. Both count votes while they merge.

Both compute what `mergelab.methods.ties.ties` computes, with the same roundings in the same order. The compiled
function is written on its own, as it must keep to what becomes few vector instructions, where plain operations must be
few and write into room that a core's cache holds already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from mergelab.ops.sign_consensus import WeightsStage, election_factors
from mergelab.ops.task_vectors import (
    MajoritySign,
    Reduce,
    agree_,
    difference_into,
    elect_in,
    resolve_zeros_,
    trim_,
)
from mergelab.ops.workspace import Workspace

TINY = torch.finfo(torch.float32).tiny
# Called with base, experts, thresholds (T,), sign of cancelled votes, weights (T,), λ, and where θ0 + λ·τ_m and, unless
# None, τ_m are written; answers how many more entries are elected + than −.
Compiled = Callable[..., Tensor]


@dataclass(frozen=True)
class Vote:
    """How signs are elected and what is made of the entries that agree: TIES' parameters of these names."""

    weights: tuple[float, ...]
    majority_sign: MajoritySign
    reduce: Reduce
    weights_stage: WeightsStage

    @property
    def weighted(self) -> bool:
        """Whether the experts differ in weight, or have another one than 1."""
        return any(weight != 1 for weight in self.weights)


def merge_block(
    vote: Vote, base: Tensor, ends: Sequence[Tensor], thresholds: Sequence[float], sign: float, workspace: Workspace
) -> tuple[Tensor, int]:
    """Merge a block in plain operations that allocate nothing.

    Args:
        vote: how.
        base: the base's block, flat, of any floating-point dtype but float64, as all are.
        ends: the experts' blocks.
        thresholds: per expert, the magnitude below which an entry is dropped.
        sign: of entries whose votes cancel.
        rows: of this length; they are written over, ``signs`` with the elected ones.

    Returns:
        The magnitudes of τ_m, in ``workspace``; how many more entries are elected positive than negative.
    """
    start = base if base.dtype == torch.float32 else workspace.start.copy_(base)
    for row, end, threshold in zip(workspace.vectors, ends, thresholds, strict=True):
        trim_(difference_into(row, end, start), threshold)
    signs = elect_in(workspace, election_factors(vote.weights, vote.weights_stage), vote.majority_sign)
    surplus = int(signs.sum())  # exact: a block has fewer than 2^24 entries
    return agree_(workspace, resolve_zeros_(signs, sign), vote.weights, vote.reduce), surplus


@cache
def compiled(majority_sign: MajoritySign, reduce: Reduce, before: bool, weighted: bool) -> Compiled:
    """Compile the whole of it, for tensors of any length; the result's first call takes seconds, and may fail.

    Thresholds, signs, weights and λ are tensors, so that one function serves a whole sweep.
    """
    whole = partial(_whole, majority_sign=majority_sign, reduce=reduce, before=before, weighted=weighted)
    return torch.compile(whole, dynamic=True, fullgraph=True)


def _whole(
    base: Tensor,
    ends: list[Tensor],
    thresholds: Tensor,
    sign: Tensor,
    weights: Tensor,
    scale: Tensor,
    target: Tensor,
    vector: Tensor | None,
    *,
    majority_sign: MajoritySign,
    reduce: Reduce,
    before: bool,
    weighted: bool,
) -> Tensor:
    start = base.float()
    differences = [end.float() - start for end in ends]
    trimmed = [torch.where(row.abs() >= at, row, 0.0) for row, at in zip(differences, thresholds.unbind(), strict=True)]
    shares = weights.unbind()
    votes = [row * weight for row, weight in zip(trimmed, shares, strict=True)] if before and weighted else trimmed
    votes = votes if majority_sign == "total" else [_sign(row, 0.0) for row in votes]
    total = votes[0]
    for row in votes[1:]:
        total = total + row
    signs = _sign(total, sign)
    agreeing = [torch.relu(row * signs) for row in trimmed]
    parts = [row * weight for row, weight in zip(agreeing, shares, strict=True)] if weighted else agreeing
    result = parts[0]
    for row in parts[1:]:
        result = torch.maximum(result, row) if reduce == "max" else result + row
    if reduce == "mean":
        counted = [torch.where(row > 0, w if weighted else 1.0, 0.0) for row, w in zip(agreeing, shares, strict=True)]
        count = counted[0]
        for more in counted[1:]:
            count = count + more
        result = result / count.clamp_min(TINY)
    merged = result * signs
    if vector is not None:
        vector.copy_(merged)
    target.copy_(merged * scale + start)
    return torch.where(total == 0, 0.0, signs).to(torch.int32).sum(dtype=torch.int32)


def _sign(tensor: Tensor, zero: Tensor | float) -> Tensor:
    """Return the sign, and ``zero`` for 0; comparisons and choices are single instructions, where sign() is nine."""
    return torch.where(tensor > 0, 1.0, torch.where(tensor < 0, -1.0, zero))
