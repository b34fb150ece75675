"""DELLA: drop entries of the task vectors at random, the smaller the likelier; alone, or before TIES' election."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from mergelab.engine.method import merge_method
from mergelab.engine.parameters import Densities, Fractions
from mergelab.engine.sweep_range import SweepRange
from mergelab.errors import ConfigError
from mergelab.ops.philox import words
from mergelab.ops.sign_consensus import SignConsensus, find_tie_sign
from mergelab.ops.site import Site, SiteOf
from mergelab.ops.sparsify import Rescale, restoring, row_blocks, rows
from mergelab.ops.task_vectors import of_each
from mergelab.weights.align import AlignedModels

# Wherever both are searched, density ± epsilon are probabilities.
MeanDensities = Annotated[Densities, SweepRange(0.2, 0.8)]
Epsilons = Annotated[Fractions, SweepRange(0.01, 0.19)]


def check_probabilities(
    models: AlignedModels, density: float | Sequence[float], epsilon: float | Sequence[float]
) -> None:
    """Raise `ConfigError` where density ± epsilon are no probabilities above 0."""
    count = len(models.experts)
    for share, spread in zip(of_each(density, count), of_each(epsilon, count), strict=True):
        if share < 1 and not (spread < share and share + spread <= 1):
            raise ConfigError(
                f"method.epsilon={spread:g}: must be less than density and at most 1 − density (density={share:g}), "
                "so that density ± epsilon are above 0 and at most 1"
            )


def keep_probabilities(length: int, density: float, epsilon: float) -> Tensor:
    """Return the probabilities by rank, the smallest entry of a row of ``length`` first, in float64."""
    if length == 1:
        return torch.tensor([density], dtype=torch.float64)
    ranks = torch.arange(length, dtype=torch.float64)
    return (density - epsilon + ranks * (2 * epsilon / (length - 1))).clamp_max_(1.0)


def drop_by_rank(
    vectors: Sequence[Tensor],
    keys: Sequence[int],
    density: float | Sequence[float],
    epsilon: float | Sequence[float],
    rescale: Rescale = True,
) -> list[Tensor]:
    """Keep each entry with a probability by the rank of its magnitude in its row, and divide it by that; else 0.

    Whether an entry is kept depends on the expert's key, the entry's place and its rank, and on nothing else. Of equal
    magnitudes the earlier ranks lower.

    Args:
        vectors: the experts' whole task vectors; written into.
        keys: of the experts' random numbers in the tensor (`Site.keys`).
        density: mean probability in a row, of all experts or of each.
        epsilon: how much lower and higher it is for the smallest and the largest entry; likewise.
        rescale: whether to divide; "magnitudes": the tensor's sum of magnitudes is restored instead.
    """
    count, sparse = len(vectors), []
    settings = zip(of_each(density, count), of_each(epsilon, count), strict=True)
    for vector, key, (share, spread) in zip(vectors, keys, settings, strict=True):
        if share >= 1:
            sparse.append(vector)
            continue
        whole = vector.contiguous()
        lines = rows(whole)
        by_rank = keep_probabilities(lines.shape[1], share, spread).to(whole.device)
        before = float(whole.abs().sum(dtype=torch.float64)) if rescale == "magnitudes" else 0.0
        for part in row_blocks(lines):
            entries = lines[part]
            order = entries.abs().argsort(dim=1, stable=True)
            probability = torch.empty(entries.shape, dtype=torch.float64, device=whole.device)
            probability.scatter_(1, order, by_rank.expand(entries.shape))
            drawn = words(key, part.start * lines.shape[1], entries.numel()).astype(np.int64)
            numbers = torch.from_numpy(drawn).to(whole.device).view(entries.shape)
            dropped = numbers >= (probability * 2.0**32).round_()
            kept = entries.div_(probability.to(whole.dtype)) if rescale is True else entries
            kept.masked_fill_(dropped, 0)
        if rescale == "magnitudes":
            whole.mul_(restoring(before, float(whole.abs().sum(dtype=torch.float64))))
        sparse.append(whole)
    return sparse


def prepare_della(
    models: AlignedModels,
    *,
    site_of: SiteOf,
    density: float | Sequence[float],
    epsilon: float | Sequence[float],
    rescale: Rescale,
    consensus: SignConsensus,
) -> float:
    """Find the sign of entries whose votes cancel."""
    return find_tie_sign(
        models, lambda vectors, site: drop_by_rank(vectors, site.keys, density, epsilon, rescale), consensus, site_of
    )


@merge_method(
    lambda_=1.0,
    prepare=prepare_della,
    check=check_probabilities,
    identical_at={"density": 1.0},
    family="task vectors",
    paper="Deep et al. 2024, arXiv:2406.11617",
    authors={"density": 0.7, "epsilon": 0.07, "lambda_": 1.1},
    work="ranks the entries of every row",
    use="as dare_ties, where large changes should rather be kept than small ones",
)
def della(
    vectors: Sequence[Tensor],
    *,
    site: Site,
    prepared: float,
    density: MeanDensities = 0.5,
    epsilon: Epsilons = 0.15,
    rescale: Rescale = True,
    consensus: SignConsensus,
) -> Tensor:
    """Drop and rescale task vectors by rank as `della_linear` does, then elect signs and merge what agrees.

    θ0 + λ·τ_m with the τ̂_t of `della_linear` and τ_m their disjoint mean under the elected signs, as in TIES (Deep et
    al. 2024, arXiv:2406.11617: drop, elect, fuse). Dropped entries neither vote nor count in the mean. Departures:
    those of `della_linear`; votes that cancel, and weights, as in `ties`. The defaults are in the middle of the range;
    the authors' example for three 13B models drops 0.3 in a window of 0.14, with λ = 1.1.

    Args:
        vectors: T task vectors, float32 or float64; whole tensors, not parts.
        site: keys the masks.
        prepared: the sign of entries whose votes cancel.
        density: mean probability of keeping an entry; may be given for each expert.
        epsilon: how much the probability departs from it at either end of a row; may be given for each expert.
        lambda_: scale of the merged task vector; the engine applies it.
        rescale: as in `della_linear`.
        consensus: weights, majority_sign, reduce, tie_break, weights_stage: as in `ties`; the majority is over the
            whole model.

    Returns:
        τ_m, of the vectors' shape and dtype.

    Raises:
        ConfigError: a weight is negative, or none is above 0; density ± epsilon are not above 0 and at most 1.
    """
    return consensus.merge(drop_by_rank(vectors, site.keys, density, epsilon, rescale), prepared)
