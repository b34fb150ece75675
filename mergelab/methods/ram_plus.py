"""RAM+: as RAM, with the entries that only one task changed scaled up."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from mergelab.engine.method import merge_method
from mergelab.methods.ram import NotNegative, changed
from mergelab.ops.blocks import blocks
from mergelab.ops.site import Site
from mergelab.ops.task_vectors import open_task_vectors, weighted_sum
from mergelab.ops.threads import in_order
from mergelab.weights.align import AlignedModels

Scope = Literal["model", "tensor"]


def unique_scales(
    models: AlignedModels, *, epsilon: float, r: float, alpha: float, scope: Scope
) -> Mapping[str, tuple[float, ...]]:
    """Compute λ_t = 1 + r·min(ρ_t, α) for each expert, with ρ_t its number of shared entries per unique entry.

    Returns:
        By tensor, one number for each expert.
    """

    def counts(name: str) -> list[tuple[int, int]]:
        assert models.base is not None
        read = open_task_vectors(models, name)
        found = [(0, 0)] * len(models.experts)
        for part in blocks(math.prod(models.base.shape(name))):
            entries, count = changed(read(part), epsilon)
            for i, vector in enumerate(entries):
                nonzero = vector != 0
                unique = int((nonzero & (count == 1)).sum())
                found[i] = (found[i][0] + int(nonzero.sum()) - unique, found[i][1] + unique)
        return found

    def scales(found: Sequence[tuple[int, int]]) -> tuple[float, ...]:
        return tuple(1 + r * min(shared / unique if unique else alpha, alpha) for shared, unique in found)

    by_tensor = dict(zip(models.names, in_order(counts, models.names), strict=True))
    if scope == "tensor":
        return {name: scales(found) for name, found in by_tensor.items()}
    whole = [(sum(s for s, _ in own), sum(u for _, u in own)) for own in zip(*by_tensor.values(), strict=True)]
    return dict.fromkeys(models.names, scales(whole))


@merge_method(
    elementwise=True,
    prepare=unique_scales,
    identical_at={"epsilon": 0.0},
    family="task vectors",
    paper="Yuan et al. 2026, arXiv:2601.13572",
    authors={"r": 0.2, "alpha": 1.0},
    use="as ram, where what experts share outweighs what is their own",
)
def ram_plus(
    vectors: Sequence[Tensor],
    *,
    site: Site,
    prepared: Mapping[str, Sequence[float]],
    epsilon: NotNegative = 1e-5,
    r: NotNegative = 0.1,
    alpha: NotNegative = 0.2,
    scope: Scope = "model",
) -> Tensor:
    """Scale up entries that only one expert changed, and average entries that several changed.

    As `ram`, with the entries that only expert t changed times λ_t = 1 + r·min(ρ_t, α). ρ_t is the number of entries
    that it shares with others over the number of entries that only it changed, in its whole task vector (Yuan et al.
    2026, arXiv:2601.13572). So the more of an expert's entries are averaged, the more its unique entries are scaled up.

    Departures: the defaults of r and α are mergekit's; the authors' are 0.2 and 1. mergekit's ``ramplus_tl`` is
    tensor-local: it counts in each tensor (``scope="tensor"``).

    Args:
        vectors: T task vectors, float32 or float64.
        site: names the tensor.
        prepared: by tensor, λ_t of each expert.
        epsilon: magnitude up to which an entry counts as unchanged.
        r: factor of ρ_t.
        alpha: upper bound of ρ_t.
        scope: what ρ_t is counted over: the whole task vector, or each tensor of it.

    Returns:
        τ_m, of the vectors' shape and dtype.
    """
    entries, count = changed(vectors, epsilon)
    scaled = weighted_sum(entries, prepared[site.name])
    plain = weighted_sum(entries, (1.0,) * len(entries)).div_(count.clamp_min(1))
    return torch.where(count == 1, scaled, plain)
