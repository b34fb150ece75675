"""SCE: select the entries on which the experts differ most, weigh the experts by what is left, erase minority signs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mergelab.engine.method import merge_method
from mergelab.engine.parameters import Density
from mergelab.ops.blocks import blocks, blockwise
from mergelab.ops.kth_largest import rank_of
from mergelab.ops.sign_consensus import SignConsensus
from mergelab.ops.sparsify import ranked_magnitudes
from mergelab.ops.task_vectors import weighted_sum
from mergelab.weights.numerics import dot


def variance(*vectors: Tensor) -> Tensor:
    """Return the population variance over the vectors at each entry; exactly 0 where they are equal."""
    each = (1 / len(vectors),) * len(vectors)
    apart = [vector - vectors[0] for vector in vectors]
    mean = weighted_sum(apart, each)
    return weighted_sum([vector.sub_(mean).square_() for vector in apart], each)


def select(vectors: Sequence[Tensor], density: float) -> list[Tensor]:
    """Set all but the entries of largest variance to zero.

    Args:
        vectors: whole tensors; written into.
        density: fraction of the entries of non-zero variance to keep, at least one; those equal to the smallest of
            these stay too.
    """
    flat = [vector.reshape(-1) for vector in vectors]
    if density >= 1 or not flat[0].numel():
        return flat
    spread = blockwise(variance, *flat)
    threshold = math.inf
    if varying := int(torch.count_nonzero(spread)):
        threshold = ranked_magnitudes(spread.view(1, -1), (rank_of(density, varying),))[0].item()
    for part in blocks(spread.numel()):
        dropped = spread[part] < threshold
        for vector in flat:
            vector[part].masked_fill_(dropped, 0)
    return flat


@merge_method(family="task vectors", paper="Wan et al. 2024, arXiv:2408.07990")
def sce(vectors: Sequence[Tensor], *, select_topk: Density = 1.0) -> Tensor:
    """Select entries by variance, calculate the experts' coefficients, erase minority signs, per tensor.

    θ0 + τ_m. Select: of the entries on which the experts differ, keep the ``select_topk`` of largest variance over the
    τ_t. Calculate: η_t = Σ τ̂_t² / Σ_s Σ τ̂_s², sums over the tensor. Erase: γ = sgn(Σ τ̂_t). τ_m = Σ η_t τ̂_t / Σ η_t
    over the experts whose τ̂_t has the sign γ (Wan et al. 2024, arXiv:2408.07990). With ``select_topk`` below 1, where
    all experts agree exactly nothing is selected, and the tensor is the base's.

    Departures: as the authors' code (mergekit's) does, and the paper's formula does not, the sum is divided by the
    coefficients of the experts that are left, and votes that cancel count as positive. Unlike there, at least one
    entry is selected, those of equal variance stay, and the experts count alike only where every τ̂ is 0 (there from a
    mean square of 1e-6 down, which many fine-tuned models are under). Sums in float64.

    Args:
        vectors: T task vectors, float32 or float64; whole tensors, not parts.
        select_topk: fraction of the entries selected.

    Returns:
        τ_m, of the vectors' shape and dtype.
    """
    selected = select(vectors, select_topk)
    energy = [dot(vector, vector) for vector in selected]
    whole = math.fsum(energy)
    if not whole:
        return torch.zeros_like(vectors[0])
    shares = [of_one / whole for of_one in energy]
    return SignConsensus(shares).merge(selected, tie_sign=1.0).view(vectors[0].shape)
