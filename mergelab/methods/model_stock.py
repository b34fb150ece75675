"""Model Stock: interpolate from the base to the experts' mean by the angle between their task vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

from mergelab.engine.method import merge_method
from mergelab.ops.blocks import blockwise, working
from mergelab.ops.gram import PairProducts, pair_products
from mergelab.ops.sparsify import row_blocks, rows
from mergelab.ops.task_vectors import weighted_sum
from mergelab.weights.align import AlignedModels

Scope = Literal["tensor", "model", "row"]
SINGULAR = 1e-6  # 1 + (T−1)·c below which there is no interpolation, and the base stays


def ratio_of(cosine: Tensor, count: int, clamp: bool) -> Tensor:
    """Return r = T·c / (1 + (T−1)·c), with c clamped to [0, 1] where asked for; 0 where the denominator vanishes."""
    c = cosine.clamp(0.0, 1.0) if clamp else cosine
    below = 1 + (count - 1) * c
    return torch.where(below.abs() < SINGULAR, 0.0, count * c / torch.where(below.abs() < SINGULAR, 1.0, below))


def interpolation_ratio(sums: PairProducts, clamp: bool = True) -> float:
    """Return the ratio r, where c is the mean cosine over pairs of task vectors.

    A pair with a zero task vector counts as orthogonal, so that experts equal to the base give the base.
    """
    gram = {pair: math.fsum(summands) for pair, summands in sums.items()}
    count = max(i for i, _ in gram) + 1
    cosines = []
    for (i, j), product in gram.items():
        if i != j:
            lengths = math.sqrt(gram[i, i]) * math.sqrt(gram[j, j])
            cosines.append(product / lengths if lengths else 0.0)
    cosine = torch.tensor(math.fsum(cosines) / len(cosines), dtype=torch.float64)
    return ratio_of(cosine, count, clamp).item()


def model_ratio(models: AlignedModels, *, scope: Scope, clamp: bool) -> float | None:
    """Compute the ratio over all tensors together; None when each tensor has its own."""
    if scope != "model" or models.base is None:
        return None
    whole: PairProducts = {}
    for name in models.names:
        for pair, summands in pair_products(models.base.get(name), [e.get(name) for e in models.experts]).items():
            whole.setdefault(pair, []).extend(summands)
    return interpolation_ratio(whole, clamp)


def _by_row(base: Tensor, experts: Sequence[Tensor], clamp: bool) -> Tensor:
    """Interpolate each row by its own ratio; a row runs along the last dimension, and a vector is one row."""
    dtype = torch.float64 if torch.float64 in (base.dtype, *(expert.dtype for expert in experts)) else torch.float32
    result = torch.empty(base.shape, dtype=dtype, device=base.device)
    into, start, *ends = (rows(tensor.contiguous()) for tensor in (result, base, *experts))
    for part in row_blocks(into):
        origin, here = working(start[part]), [working(end[part]) for end in ends]
        vectors = [(end - origin).double() for end in here]
        lengths = [vector.norm(dim=1, keepdim=True) for vector in vectors]
        cosines = []
        for i, j in combinations(range(len(vectors)), 2):
            product, length = (vectors[i] * vectors[j]).sum(dim=1, keepdim=True), lengths[i] * lengths[j]
            cosines.append(torch.where(length > 0, product / length, 0.0))
        ratio = ratio_of(torch.stack(cosines).mean(dim=0), len(vectors), clamp).to(dtype)
        into[part] = ratio * (weighted_sum(here, (1 / len(here),) * len(here))) + (1 - ratio) * origin
    return result


@merge_method(
    needs_base=True,
    experts=(2, None),
    prepare=model_ratio,
    family="averages",
    paper="Jang et al. 2024, arXiv:2403.19522",
    use="two or three fine-tunes on one task, instead of a soup of many",
)
def model_stock(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    prepared: float | None = None,
    scope: Scope = "tensor",
    clamp: bool = True,
) -> Tensor:
    """Interpolate between the base and the experts' mean, closer to the mean the more the task vectors agree.

    r·mean(θ_t) + (1−r)·θ0 with r = T·c / (1 + (T−1)·c). c is the mean cosine between the task vectors τ_t = θ_t − θ0 of
    the tensor, clamped to [0, 1] (Jang et al. 2024, arXiv:2403.19522, equation 3 and its extension to T models).
    Departures: the clamp; a zero task vector counts as orthogonal to the others; ``scope="model"`` takes one c over all
    tensors. Cosines are accumulated in float64.

    Args:
        base: parameter of the pretrained model, any float dtype; a whole tensor, not a part.
        experts: T ≥ 2 tensors of the base's shape.
        prepared: the ratio r when it is the same for all tensors.
        scope: whether cosines are those of each tensor, of each of its rows, or of the whole models.
        clamp: whether c is clamped; else a negative c leads away from the mean, as in mergekit.

    Returns:
        Tensor of the base's shape, float32 (float64 for float64 inputs).
    """
    if scope == "row":
        return _by_row(base, experts, clamp)
    ratio = interpolation_ratio(pair_products(base, experts), clamp) if prepared is None else prepared
    each = (1 / len(experts),) * len(experts)

    def interpolate(start: Tensor, *ends: Tensor) -> Tensor:
        return ratio * weighted_sum(ends, each) + (1 - ratio) * start

    return blockwise(interpolate, base, *experts)
