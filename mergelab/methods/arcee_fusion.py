"""One model drawn towards another, entry by entry: NearSwap and Arcee Fusion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from mergelab.engine.registry import merge_method
from mergelab.errors import ConfigError
from mergelab.ops.blocks import BLOCK, blocks, blockwise
from mergelab.weights.align import AlignedModels

MERGEKIT = "mergekit: Goddard et al. 2024, arXiv:2403.13257"
SMOOTHING = 1e-8  # added to probabilities before their logarithms are taken


def check_pair(models: AlignedModels) -> None:
    """Raise `ConfigError` for one expert without a base."""
    if len(models.experts) == 1 and models.base is None:
        raise ConfigError("models.experts: one alone is given; two models are merged: two experts, or a base and one")


def _pair(base: Tensor | None, experts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Answer the model that is drawn and the one it is drawn towards."""
    if len(experts) == 2:
        return experts[0], experts[1]
    assert base is not None
    return base, experts[0]


@merge_method(experts=(1, 2), elementwise=True, check=check_pair, order_matters=True, family="pairwise", paper=MERGEKIT)
def nearswap(
    experts: Sequence[Tensor], *, base: Tensor | None = None, t: Annotated[float, Field(ge=0)] = 0.0001
) -> Tensor:
    """Move one model towards another, at each entry by at most ``t``: entries that are near are swapped.

    s·b + (1−s)·a with s = min(t / |a − b|, 1), which is b where |a − b| ≤ t, else a ± t. a and b are the two experts in
    their order, or the base and the one expert. As in mergekit (Goddard et al. 2024, arXiv:2403.13257), where a is the
    base model. Departures: mergekit takes |a − b| for at least 1e-6, so that with t < 1e-6 nearer entries are not
    swapped; its ``t`` has no default, and ours is that of QuartetAnemoi-70B-t0.0001, the model that it refers to.

    Args:
        experts: blocks of two experts, or of one.
        base: of the pretrained model; what is moved if there is one expert, without a part in it if there are two.
        t: the largest change of an entry.

    Returns:
        Block, float32 (float64 for float64 inputs).

    Raises:
        ConfigError: one expert and no base.
    """
    a, b = _pair(base, experts)
    return torch.minimum(torch.maximum(b, a - t), a + t)


@merge_method(experts=(1, 2), check=check_pair, order_matters=True, family="pairwise", paper=MERGEKIT)
def arcee_fusion(experts: Sequence[Tensor], *, base: Tensor | None = None) -> Tensor:
    """Take over from another model the entries whose change matters most.

    b where s ≥ θ, else a, with the importance s = |b − a| · KL(p ‖ q) of each entry, p = softmax(b) + 1e-8 and
    q = softmax(a) + 1e-8 over the entry's row (last axis; a bias is one row), and θ = median + 1.5·(Q3 − Q1) of s over
    the tensor. a and b are the two experts in their order, or the base and the one expert. As in mergekit (Goddard et
    al. 2024, arXiv:2403.13257), where a is the base model. Quartiles are entries of s, the ones at the ranks ⌊q(n−1)⌋
    from below. Where at least three quarters of s are 0, θ is 0 and every entry is taken over.

    Departures from mergekit: its quartiles are of a random sample in tensors of more than a million entries, here
    always exact; softmax and divergence are in float64, as in float32 most of a small divergence is rounding.

    Args:
        experts: two tensors of one shape, or one; any float dtype; whole tensors, not parts.
        base: of the pretrained model; a if there is one expert, without a part in it if there are two.

    Returns:
        Tensor of that shape, float32 (float64 for float64 inputs).

    Raises:
        ConfigError: one expert and no base.
    """
    a, b = _pair(base, experts)
    scores = _importance(a, b)
    threshold = _threshold(scores)
    return blockwise(lambda kept, taken, score: torch.where(score >= threshold, taken, kept), a, b, scores)


def _importance(a: Tensor, b: Tensor) -> Tensor:
    """Answer |b − a| · KL(softmax b ‖ softmax a), the divergence taken row by row, in float32 or float64."""
    change = blockwise(lambda x, y: (y - x).abs_(), a, b)
    of_change, of_a, of_b = (x.reshape(-1, x.shape[-1] if x.dim() else 1) for x in (change, a, b))
    for part in blocks(len(of_change), max(1, BLOCK // of_change.shape[1])):
        q, p = (torch.softmax(x[part].double(), dim=1).add_(SMOOTHING) for x in (of_a, of_b))
        divergence = ((p / q).log_() * p).sum(dim=1, keepdim=True)
        of_change[part] *= divergence.to(change.dtype)
    return change


def _threshold(scores: Tensor) -> float:
    """Answer median + 1.5 · (Q3 − Q1), the quartiles being entries, those next below."""
    entries = scores.reshape(-1).cpu().numpy()
    ranks = [quarter * (len(entries) - 1) // 4 for quarter in (1, 2, 3)]
    first, median, third = (float(entry) for entry in np.partition(entries, ranks)[ranks])
    return median + 1.5 * (third - first)
