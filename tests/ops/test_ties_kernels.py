"""The faster forms of TIES give the bits of its formula."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mergelab.ops.sign_consensus import SignConsensus, TensorConsensus
from mergelab.ops.task_vectors import disjoint_reduce, elect, just_below, resolve_zeros, task_vectors, trim
from mergelab.ops.ties_kernels import merge_block, merge_in, merge_whole
from mergelab.ops.workspace import WorkspaceMemory
from tests.methods.test_ties import OPTIONS

LENGTH = 3001


def coarse(count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[Tensor]]:
    """A base, and experts at few distances from it: votes cancel at many entries, and magnitudes are equal."""
    generator = torch.Generator().manual_seed(count)
    base = torch.randn(LENGTH, generator=generator).mul(8).round() / 8
    steps = [torch.randn(LENGTH, generator=generator).mul(2).round() / 8 for _ in range(count)]
    return base.to(dtype), [(base + step).to(dtype) for step in steps]


def formula(
    base: Tensor, experts: Sequence[Tensor], consensus: SignConsensus, thresholds: Sequence[float], tie_sign: float
) -> tuple[Tensor, int]:
    """τ_m, and how many more entries are elected positive than negative."""
    vectors = task_vectors(base, experts)
    trimmed = [trim(v, just_below(at, v.dtype)) for v, at in zip(vectors, thresholds, strict=True)]
    weights = consensus.weights
    assert not isinstance(weights, dict)
    signs = elect(trimmed, weights if consensus.weights_stage == "elect" else None, consensus.majority_sign)
    return disjoint_reduce(trimmed, resolve_zeros(signs, tie_sign), weights, consensus.reduce), int(signs.sum())


def consensus_of(options: dict[str, Any], count: int) -> SignConsensus:
    weights = options.get("weights", [1.0] * 4)[:count]
    return SignConsensus(**{**options, "weights": tuple(weights)})


def workspace_of(vectors: Sequence[Tensor]) -> Any:
    memory = WorkspaceMemory(len(vectors), LENGTH + 5, vectors[0].dtype, torch.device("cpu"))
    workspace = memory.workspace(LENGTH)
    for mine, vector in zip(workspace.vectors, vectors, strict=True):
        mine.copy_(vector)
    return workspace


def same_bits(a: Tensor, b: Tensor) -> bool:
    kind = torch.int32 if a.dtype == torch.float32 else torch.int64
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))  # 0 is not −0


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("tie_sign", [1.0, 0.0, -1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_in_place_it_is_the_formula(options: dict[str, Any], tie_sign: float, dtype: torch.dtype, count: int) -> None:
    base, experts = coarse(count, dtype)
    consensus, thresholds = consensus_of(options, count), (0.25, 0.125, 0.0, 0.3)[:count]
    expected, _ = formula(base, experts, consensus, thresholds, tie_sign)
    workspace = workspace_of(task_vectors(base, experts))
    assert same_bits(merge_in(workspace, consensus, TensorConsensus(thresholds, tie_sign)), expected)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("tie_sign", [1.0, 0.0, -1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_models_it_is_the_formula_and_the_count_of_votes(
    options: dict[str, Any], tie_sign: float, dtype: torch.dtype
) -> None:
    base, experts = coarse(4, dtype)
    consensus, thresholds = consensus_of(options, 4), (0.25, 0.125, 0.0, 0.3)
    expected, votes = formula(base, experts, consensus, thresholds, tie_sign)
    workspace = workspace_of([torch.full((LENGTH,), 9.0)] * 4)
    magnitudes, surplus = merge_block(consensus, base, experts, thresholds, tie_sign, workspace)
    assert same_bits(magnitudes * workspace.signs, expected)
    assert surplus == votes


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("tie_sign", [1.0, 0.0, -1.0])
def test_what_is_compiled_is_the_formula(options: dict[str, Any], tie_sign: float) -> None:
    base, experts = coarse(4)
    consensus, thresholds = consensus_of(options, 4), (0.25, 0.125, 0.0, 0.3)
    expected, votes = formula(base, experts, consensus, thresholds, tie_sign)
    bounds = [just_below(at, torch.float32) for at in thresholds]
    target, vector = torch.empty(LENGTH), torch.empty(LENGTH)
    surplus = merge_whole(
        base,
        experts,
        *map(torch.tensor, (bounds, tie_sign, consensus.shares(4), 0.7)),
        target,
        vector,
        majority_sign=consensus.majority_sign,
        reduce=consensus.reduce,
        weights_stage=consensus.weights_stage,
        weighted="weights" in options,
    )
    assert same_bits(vector, expected)
    assert same_bits(target, base + expected * 0.7)
    assert int(surplus) == votes
