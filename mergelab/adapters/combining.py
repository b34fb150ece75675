"""Factors of LoRA adapters as PEFT and Adapters combine them: A with A and B with B."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mergelab.adapters.changes import LowRank
from mergelab.ops.philox import bernoulli
from mergelab.ops.task_vectors import MajoritySign, weighted_sum

Combine = Callable[[Sequence[Tensor], Sequence[float]], Tensor]


def with_roots(adapters: Sequence[LowRank | None], weights: Sequence[float], combine: Combine) -> tuple[Tensor, Tensor]:
    """Combine all A and all B as PEFT does: each gets √|w·s|, and A the sign of w·s besides.

    Args:
        adapters: what each expert changes in one layer, of one rank r; None where it does not adapt the layer.
        weights: one for each expert.
        combine: takes the factors, float64, and their weights.

    Returns:
        A (r, inputs) and B (outputs, r), float64; their product is the combined change.
    """
    found = [(each, weight * each.scale) for each, weight in zip(adapters, weights, strict=True) if each is not None]
    roots = [math.sqrt(abs(scale)) for _, scale in found]
    signed = [-root if scale < 0 else root for root, (_, scale) in zip(roots, found, strict=True)]
    a, b = [each.a.double() for each, _ in found], [each.b.double() for each, _ in found]
    return combine(a, signed), combine(b, roots)


def divided(weights: Sequence[float], *, normalize: bool) -> tuple[float, ...]:
    """Return the weights, divided by their sum with ``normalize``."""
    whole = sum(weights) if normalize else 1.0
    return tuple(weight / whole for weight in weights)


def as_stored(
    adapters: Sequence[LowRank | None], weights_a: Sequence[float], weights_b: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Add up all A and all B as Adapters does: Σ w A and Σ w B, with the scale that all adapters share.

    Args, returns: as for `with_roots`; the scale is in B. All experts adapt the layer.
    """
    found = [each for each in adapters if each is not None]
    a = weighted_sum([each.a.double() for each in found], weights_a)
    b = weighted_sum([each.b.double() for each in found], weights_b)
    return a, b * found[0].scale


def pruned(adapters: Sequence[LowRank | None], density: float) -> list[LowRank | None]:
    """Set all but the int(density · n) entries of largest magnitude of each factor to zero, as PEFT does.

    One adapter alone stays as it is, as in PEFT.
    """

    def prune(factor: Tensor) -> Tensor:
        flat = factor.reshape(-1)
        kept = flat.abs().topk(int(density * flat.numel())).indices
        return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).view(factor.shape)

    if len(adapters) == 1 or density >= 1:
        return list(adapters)
    return [each and _with_factors(each, prune(each.a), prune(each.b)) for each in adapters]


def dropped(adapters: Sequence[LowRank | None], keys: Sequence[int], density: float) -> list[LowRank | None]:
    """Keep each entry of each factor with probability ``density``, and divide it by that; set others to zero.

    One adapter alone stays as it is, as in PEFT.

    Args:
        adapters: of one layer.
        keys: of each expert's random numbers in the layer; B's follow A's.
        density: the probability.
    """

    def drop(factor: Tensor, key: int, start: int) -> Tensor:
        mask = torch.from_numpy(bernoulli(key, start, factor.numel(), density))
        return factor.double() * mask.view(factor.shape) / density

    if len(adapters) == 1 or density >= 1:
        return list(adapters)
    return [
        each and _with_factors(each, drop(each.a, key, 0), drop(each.b, key, each.a.numel()))
        for each, key in zip(adapters, keys, strict=True)
    ]


def _with_factors(adapter: LowRank, a: Tensor, b: Tensor) -> LowRank:
    return LowRank.of(a, b, adapter.scale, transposed=adapter.transposed)


def mean_of_agreeing(parts: Sequence[Tensor], weights: Sequence[float], majority_sign: MajoritySign) -> Tensor:
    """Elect a sign at each entry, add up the weighted entries that have it, and divide by their number.

    Weights have no vote. Where votes cancel the sign is +; a zero never agrees.
    """
    stacked = torch.stack(list(parts))  # (T, …)
    signs = stacked.sign()
    votes = (stacked if majority_sign == "total" else signs).sum(dim=0)
    agree = signs == torch.where(votes >= 0, 1.0, -1.0)
    total = weighted_sum(list(stacked * agree), weights)
    return total / agree.sum(dim=0).clamp(min=1)
