"""SCE: select entries by variance, calculate the experts' coefficients, erase minority signs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

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
    shares = (1 / len(vectors),) * len(vectors)
    differences = [vector - vectors[0] for vector in vectors]
    mean = weighted_sum(differences, shares)
    return weighted_sum([vector.sub_(mean).square_() for vector in differences], shares)


def select(vectors: Sequence[Tensor], density: float) -> list[Tensor]:
    """Set all entries to zero but those of largest variance; return the flattened vectors.

    Args:
        vectors: whole tensors; written into.
        density: fraction of the entries of non-zero variance to keep, at least one; entries whose variance equals the
            smallest kept one stay, too.
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


@merge_method(
    family="task vectors",
    paper="Wan et al. 2024, arXiv:2408.07990",
    authors={"select_topk": 0.1, "entries": "all"},
    use="chat models of unlike strength, without data",
)
def sce(
    vectors: Sequence[Tensor], *, select_topk: Density = 1.0, entries: Literal["selected", "all"] = "selected"
) -> Tensor:
    """Select entries by variance, calculate the experts' coefficients, erase minority signs, per tensor.

    θ0 + τ_m. Select: of the entries on which the experts differ, keep the ``select_topk`` of largest variance over the
    τ_t. Calculate: η_t = Σ τ̂_t² / Σ_s Σ τ̂_s², with sums over the tensor, in float64. Erase: γ = sgn(Σ τ̂_t).
    τ_m = Σ η_t τ̂_t / Σ η_t over the experts whose τ̂_t has the sign γ (Wan et al. 2024, arXiv:2408.07990). With
    ``select_topk`` below 1, nothing is selected in a tensor that is equal in all experts, and it becomes the base's.

    The paper's text merges the selected entries, τ̂, as mergekit's code does. The authors' code (FuseAI's FuseChat)
    selects for the coefficients alone: η_t is of τ̂_t, and the entries that vote and are merged are τ_t. That is
    ``entries="all"``; their FuseChat selects 0.1.

    Departures: as in both codes, and unlike the paper's formula, the sum is divided by the coefficients of the experts
    that agree, and votes that cancel count as positive. Unlike them, at least one entry is selected, and entries of
    equal variance are all kept. The experts get equal coefficients only when every τ̂ is 0; mergekit does so below a
    mean square of 1e-6, which many fine-tuned models are under.

    Args:
        vectors: T task vectors, float32 or float64; whole tensors, not parts.
        select_topk: fraction of the varying entries to select.
        entries: what is merged: the "selected" entries, or "all", with the selection's coefficients.

    Returns:
        τ_m, of the vectors' shape and dtype.
    """
    whole_vectors = entries == "all" and select_topk < 1
    merged = [vector.reshape(-1).clone() for vector in vectors] if whole_vectors else None
    selected = select(vectors, select_topk)
    energy = [dot(vector, vector) for vector in selected]
    whole = math.fsum(energy)
    if not whole and merged is None:
        return torch.zeros_like(vectors[0])
    shares = [of_one / whole if whole else 1 / len(energy) for of_one in energy]
    return SignConsensus(shares).merge(merged or selected, tie_sign=1.0).view(vectors[0].shape)
