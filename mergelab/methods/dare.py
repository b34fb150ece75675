"""DARE: drop entries of the task vectors at random and rescale the rest; alone, or before TIES' election."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from mergelab.engine.method import merge_method
from mergelab.engine.parameters import Densities, SumWeights
from mergelab.ops.blocks import blocks
from mergelab.ops.philox import bernoulli
from mergelab.ops.site import Site, SiteOf
from mergelab.ops.sparsify import Rescale, restoring
from mergelab.ops.task_vectors import factors, of_each, open_task_vectors, weighted_sum
from mergelab.ops.threads import in_order
from mergelab.weights.align import AlignedModels

Scales = Mapping[str, Sequence[float]]


def drop_(
    vectors: Sequence[Tensor],
    keys: Sequence[int],
    offset: int,
    density: float | Sequence[float],
    rescale: Rescale,
    scales: Sequence[float] | None = None,
) -> list[Tensor]:
    """Keep each entry with probability ``density``, else set it to zero; with ``rescale``, divide by it: in place.

    Whether an entry is kept depends on the expert's key and the entry's place in the whole tensor, and on nothing else.

    Args:
        vectors: flat parts of the experts' task vectors, from entry ``offset`` on.
        keys: of the experts' random numbers in the tensor (`Site.keys`).
        offset: index of the parts' first entry in the flattened tensor.
        density: probability of keeping an entry, of all experts or of each.
        rescale: divide by ``density``, so that the expected value stays; "magnitudes": multiply by ``scales``.
        scales: a factor for each expert, of `restoring_scales`.
    """
    sparse = []
    factors_of = scales or (1.0,) * len(vectors)
    for vector, key, share, scale in zip(vectors, keys, of_each(density, len(vectors)), factors_of, strict=True):
        if share >= 1:
            sparse.append(vector)
            continue
        mask = bernoulli(key, offset, vector.numel(), share)
        factor = torch.from_numpy(mask.astype(np.float32)).to(vector.device, vector.dtype).view(vector.shape)
        vector.mul_(factor)
        sparse.append(vector.mul_(scale) if rescale == "magnitudes" else vector.div_(share) if rescale else vector)
    return sparse


def restoring_scales(
    models: AlignedModels, *, site_of: SiteOf, density: float | Sequence[float], rescale: Rescale
) -> Scales:
    """Return, by tensor, the factors that restore each expert's sum of magnitudes; empty where none are wanted."""
    if rescale != "magnitudes":
        return {}

    def found(name: str) -> tuple[str, list[float]]:
        assert models.base is not None
        read, keys = open_task_vectors(models, name), site_of(name).keys
        sums = [[0.0, 0.0] for _ in keys]
        for part in blocks(models.base.get(name).numel()):
            vectors = read(part)
            for of_expert, vector in zip(sums, vectors, strict=True):
                of_expert[0] += float(vector.abs().sum(dtype=torch.float64))
            for of_expert, vector in zip(sums, drop_(vectors, keys, part.start, density, False), strict=True):
                of_expert[1] += float(vector.abs().sum(dtype=torch.float64))
        return name, [restoring(before, after) for before, after in sums]

    return dict(in_order(found, models.names))


@merge_method(
    lambda_=1.0,
    elementwise=True,
    prepare=restoring_scales,
    identical_at=None,
    family="task vectors",
    paper="Yu et al. 2024, arXiv:2311.03099",
    authors={"density": 0.9},
    use="language models with small, redundant changes, which may be dropped at random",
)
def dare(
    vectors: Sequence[Tensor],
    *,
    site: Site,
    prepared: Scales,
    density: Densities = 0.5,
    weights: SumWeights = None,
    rescale: Rescale = True,
    normalize: bool = False,
) -> Tensor:
    """Add up task vectors of which a random part was dropped and the rest rescaled.

    θ0 + λ·Σ w_t τ̂_t with τ̂_t = m_t·τ_t / density and m_t ~ Bernoulli(density), independent for each entry and expert
    (Yu et al. 2024, arXiv:2311.03099; their drop rate p is 1 − density). Divided by the density, not by the number of
    experts or of survivors. Departures: none; masks come from a counter-based generator (`mergelab.ops.philox`), keyed
    by the seed, the values of the expert's tensor and the tensor's name. Where experts have equal values in a tensor,
    as in one that both left frozen, they have the same mask. The default density is 0.5; the authors' code keeps 0.9
    where nothing else is asked for, and searches.

    Args:
        vectors: T task vectors, float32 or float64; they are written over.
        site: keys the masks.
        prepared: by tensor, the factors that restore the sums of magnitudes.
        density: probability of keeping an entry; may be given for each expert.
        lambda_: scale of the sum; the engine applies it.
        weights: per expert, any sign; default 1.
        rescale: divide the kept entries by the density; "magnitudes", as mergekit: restore each tensor's Σ|τ_t|.
        normalize: whether to divide by the sum of the weights, as mergekit can.

    Returns:
        Σ w_t τ̂_t, of the vectors' shape and dtype.
    """
    dropped = drop_(vectors, site.keys, site.offset, density, rescale, prepared.get(site.name))
    return weighted_sum(dropped, factors(weights, len(vectors), normalize))
