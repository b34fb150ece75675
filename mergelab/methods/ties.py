"""TIES: trim, elect signs, merge what agrees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor

from mergelab.engine.method import merge_method
from mergelab.engine.parameters import Densities, Weights
from mergelab.engine.ties_session import TiesSession
from mergelab.ops.sign_consensus import (
    Consensus,
    Scope,
    TieBreak,
    WeightsStage,
    check_pooled,
    check_weights,
    election_factors,
    open_task_vectors,
    prepare_consensus,
)
from mergelab.ops.site import Site
from mergelab.ops.task_vectors import MajoritySign, Reduce, agree_, elect_in, factors, resolve_zeros_, trim_
from mergelab.ops.workspace import Workspace
from mergelab.weights.align import AlignedModels


def ties_consensus(
    models: AlignedModels,
    *,
    weights: Sequence[float],
    density: float | Sequence[float],
    scope: Scope,
    majority_sign: MajoritySign,
    tie_break: TieBreak,
    weights_stage: WeightsStage,
) -> Mapping[str, Consensus]:
    """Find thresholds and majority signs of the plain task vectors."""
    return prepare_consensus(
        models,
        partial(open_task_vectors, models),
        weights=weights,
        density=density,
        scope=scope,
        majority_sign=majority_sign,
        tie_break=tie_break,
        weights_stage=weights_stage,
        memo=models.memo,
    )


def check_ties(weights: Sequence[float], density: float | Sequence[float], scope: Scope) -> None:
    """Raise `ConfigError` for weights that no mean can take, and for each expert's own share of what is pooled."""
    check_weights(weights)
    check_pooled("density", density, scope)


@merge_method(
    lambda_=1.0,
    elementwise=True,
    prepare=ties_consensus,
    check=check_ties,
    session=TiesSession,
    identical_at={"density": 1.0},
    family="task vectors",
    paper="Yadav et al. 2023, arXiv:2306.01708",
)
def ties(
    vectors: Sequence[Tensor],
    *,
    site: Site,
    prepared: Mapping[str, Consensus],
    workspace: Workspace,
    density: Densities = 0.2,
    weights: Weights = None,
    scope: Scope = "model",
    majority_sign: MajoritySign = "total",
    reduce: Reduce = "mean",
    tie_break: TieBreak = "majority",
    weights_stage: WeightsStage = "reduce",
) -> Tensor:
    """Merge task vectors after trimming small entries and resolving sign conflicts.

    θ0 + λ·τ_m with τ̂_t = τ_t where |τ_t| ≥ the k-th largest magnitude, else 0; γ = sgn(Σ τ̂_t);
    τ_m = Σ w_t τ̂_t / Σ w_t over the experts whose τ̂_t has the sign γ, entry by entry (Yadav et al. 2023,
    arXiv:2306.01708).

    Departures from the paper, which leaves them open: entries that equal the k-th magnitude all stay, and k is at least
    1. An entry whose votes cancel exactly takes the sign that was elected at more entries (``tie_break="majority"``),
    as the authors' code does; where these are equally many, it is 0, as the paper's formula says (their code takes the
    negative entries then). ``tie_break="positive"`` is what PEFT and mergekit do. Weights are an addition: the paper's
    are 1. ``scope="tensor"`` with ``weights_stage="elect"`` and ``tie_break="positive"`` is mergekit's TIES.

    Args:
        vectors: T task vectors, float32 or float64; they are written over.
        site: whose ``name`` is looked up in ``prepared``.
        prepared: thresholds and tie sign by tensor name.
        workspace: the memory of the vectors and of intermediates.
        density: fraction of entries kept; may be given for each expert, but where they are pooled.
        lambda_: scale of the merged task vector; the engine applies it.
        weights: per expert, at least 0; default 1.
        scope: what the fraction is of: an expert's whole task vector, each tensor of it, or all experts' together.
        majority_sign: by total magnitude or by number of entries.
        reduce: what is made of the entries that agree: weighted mean, weighted sum, or the largest w·τ̂.
        tie_break: the sign of entries whose votes cancel.
        weights_stage: whether weights count from the mean on, or multiply the task vectors before they vote.

    Returns:
        τ_m, of the vectors' shape and dtype.

    Raises:
        ConfigError: a weight is negative, or none is above 0; a density for each expert where they are pooled.
    """
    shares = factors(weights, len(vectors))
    here = prepared[site.name]
    for vector, threshold in zip(vectors, here.thresholds, strict=True):
        trim_(vector, threshold)
    signs = resolve_zeros_(elect_in(workspace, election_factors(shares, weights_stage), majority_sign), here.tie_sign)
    return agree_(workspace, signs, shares, reduce).mul_(signs)
