"""Arcee Fusion: take over the entries of another model whose change matters most."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mergelab.engine.method import merge_method
from mergelab.methods import MERGEKIT
from mergelab.ops.blocks import BLOCK, blocks, blockwise
from mergelab.ops.pair import check_pair, pair_of

SMOOTHING = 1e-8  # added to probabilities before their logarithms are taken


@merge_method(
    experts=(1, 2),
    check=check_pair,
    order_matters=True,
    family="pairwise",
    paper=MERGEKIT,
    use="two models of which one is to change the other only where it matters",
)
def arcee_fusion(experts: Sequence[Tensor], *, base: Tensor | None = None) -> Tensor:
    """Take over from another model the entries whose change matters most.

    b where s ≥ θ, else a. s = |b − a| · KL(p ‖ q) is the importance of an entry, with p = softmax(b) + 1e-8 and
    q = softmax(a) + 1e-8 over the entry's row (last axis; a bias is one row). θ = median + 1.5·(Q3 − Q1) of s over the
    tensor. a and b are the two experts in their order, or the base and the only expert. As in mergekit (Goddard et al.
    2024, arXiv:2403.13257), where a is the base model. Quartiles are the entries of s at the ascending ranks ⌊q(n−1)⌋.
    Where at least three quarters of s are 0, θ is 0 and every entry is taken from b.

    Departures from mergekit: quartiles are exact; mergekit estimates them from a random sample in tensors of more than
    a million entries. Softmax and divergence are in float64, as in float32 a small divergence is mostly rounding.

    Args:
        experts: two tensors of one shape, or one; any float dtype; whole tensors, not parts.
        base: parameter of the pretrained model; a when there is one expert, unused when there are two.

    Returns:
        Tensor of that shape, float32 (float64 for float64 inputs).

    Raises:
        ConfigError: one expert and no base.
    """
    a, b = pair_of(base, experts)
    scores = _importance(a, b)
    threshold = _threshold(scores)
    return blockwise(lambda x, y, score: torch.where(score >= threshold, y, x), a, b, scores)


def _importance(a: Tensor, b: Tensor) -> Tensor:
    """Return |b − a| · KL(softmax b ‖ softmax a), with the divergence of each row, in float32 or float64."""
    change = blockwise(lambda x, y: (y - x).abs_(), a, b)
    of_change, of_a, of_b = (x.reshape(-1, x.shape[-1] if x.dim() else 1) for x in (change, a, b))
    for part in blocks(len(of_change), max(1, BLOCK // of_change.shape[1])):
        q, p = (torch.softmax(x[part].double(), dim=1).add_(SMOOTHING) for x in (of_a, of_b))
        divergence = ((p / q).log_() * p).sum(dim=1, keepdim=True)
        of_change[part] *= divergence.to(change.dtype)
    return change


def _threshold(scores: Tensor) -> float:
    """Return median + 1.5 · (Q3 − Q1); quartiles are entries, at ranks that are rounded down."""
    entries = scores.reshape(-1).cpu().numpy()
    ranks = [quarter * (len(entries) - 1) // 4 for quarter in (1, 2, 3)]
    first, median, third = (float(entry) for entry in np.partition(entries, ranks)[ranks])
    return median + 1.5 * (third - first)
