"""RAM+: what one task alone changed is scaled up."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mergelab.engine.method import merge_method
from mergelab.methods.ram import NotNegative, changed
from mergelab.ops.blocks import blocks
from mergelab.ops.task_vectors import open_task_vectors, weighted_sum
from mergelab.ops.threads import in_order
from mergelab.weights.align import AlignedModels


def unique_scales(models: AlignedModels, *, epsilon: float, r: float, alpha: float) -> tuple[float, ...]:
    """Return λ_t = 1 + r·min(ρ_t, α) for each expert, ρ_t the number of its shared entries for each unique one."""

    def counts(name: str) -> list[tuple[int, int]]:
        assert models.base is not None
        read = open_task_vectors(models, name)
        found = [(0, 0)] * len(models.experts)
        for part in blocks(math.prod(models.base.shape(name))):
            kept, count = changed(read(part), epsilon)
            for i, vector in enumerate(kept):
                mine = vector != 0
                alone = int((mine & (count == 1)).sum())
                found[i] = (found[i][0] + int(mine.sum()) - alone, found[i][1] + alone)
        return found

    shared, unique = [0] * len(models.experts), [0] * len(models.experts)
    for found in in_order(counts, models.names):
        for i, (more_shared, more_unique) in enumerate(found):
            shared[i] += more_shared
            unique[i] += more_unique
    ratios = [of / alone if alone else alpha for of, alone in zip(shared, unique, strict=True)]
    return tuple(1 + r * min(ratio, alpha) for ratio in ratios)


@merge_method(
    elementwise=True,
    prepare=unique_scales,
    identical_at={"epsilon": 0.0},
    family="task vectors",
    paper="Yuan et al. 2026, arXiv:2601.13572",
)
def ram_plus(
    vectors: Sequence[Tensor],
    *,
    prepared: Sequence[float],
    epsilon: NotNegative = 1e-5,
    r: NotNegative = 0.1,
    alpha: NotNegative = 0.2,
) -> Tensor:
    """Keep what one expert alone changed, scaled up, and average what several changed.

    As `ram`, with the entries that expert t alone changed times λ_t = 1 + r·min(ρ_t, α), where ρ_t is the number of
    entries it shares with others divided by the number of those it alone changed, over its whole task vector (Yuan et
    al. 2026, arXiv:2601.13572). So the more of an expert is averaged away, the more its own part is raised.

    Departures: none known. mergekit's ``ramplus_tl`` is tensor-local: it counts in each tensor.

    Args:
        vectors: T task vectors, float32 or float64.
        prepared: λ_t of each expert.
        epsilon: magnitude up to which an entry counts as unchanged.
        r: how much ρ_t counts.
        alpha: the largest ρ_t that counts.

    Returns:
        τ_m, of the vectors' shape and dtype.
    """
    kept, count = changed(vectors, epsilon)
    scaled = weighted_sum(kept, prepared)
    plain = weighted_sum(kept, (1.0,) * len(kept)).div_(count.clamp_min(1))
    return torch.where(count == 1, scaled, plain)
