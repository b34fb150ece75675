"""Model Stock: interpolate from the base to the experts' mean by the angle between their task vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from mergelab.engine.method import merge_method
from mergelab.ops.blocks import blockwise
from mergelab.ops.gram import PairProducts, pair_products
from mergelab.ops.task_vectors import weighted_sum
from mergelab.weights.align import AlignedModels


def interpolation_ratio(sums: PairProducts) -> float:
    """Return r = T·c / (1 + (T−1)·c), where c is the mean cosine over pairs of task vectors, clamped to [0, 1].

    A pair with a zero task vector counts as orthogonal, so that experts equal to the base give the base.
    """
    gram = {pair: math.fsum(summands) for pair, summands in sums.items()}
    count = max(i for i, _ in gram) + 1
    cosines = []
    for (i, j), product in gram.items():
        if i != j:
            lengths = math.sqrt(gram[i, i]) * math.sqrt(gram[j, j])
            cosines.append(product / lengths if lengths else 0.0)
    cosine = min(1.0, max(0.0, math.fsum(cosines) / len(cosines)))
    return count * cosine / (1 + (count - 1) * cosine)


def model_ratio(models: AlignedModels, *, scope: Literal["tensor", "model"]) -> float | None:
    """Compute the ratio over all tensors together; None when each tensor has its own."""
    if scope == "tensor" or models.base is None:
        return None
    whole: PairProducts = {}
    for name in models.names:
        for pair, summands in pair_products(models.base.get(name), [e.get(name) for e in models.experts]).items():
            whole.setdefault(pair, []).extend(summands)
    return interpolation_ratio(whole)


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
    scope: Literal["tensor", "model"] = "tensor",
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
        scope: whether cosines are those of each tensor or of the whole models.

    Returns:
        Tensor of the base's shape, float32 (float64 for float64 inputs).
    """
    ratio = interpolation_ratio(pair_products(base, experts)) if prepared is None else prepared
    each = (1 / len(experts),) * len(experts)

    def interpolate(start: Tensor, *ends: Tensor) -> Tensor:
        return ratio * weighted_sum(ends, each) + (1 - ratio) * start

    return blockwise(interpolate, base, *experts)
