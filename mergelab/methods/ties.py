"""TIES: trim, elect signs, merge what agrees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor

from mergelab.engine.method import merge_method
from mergelab.engine.parameters import TrimDensities
from mergelab.engine.ties_session import TiesSession
from mergelab.ops.sign_consensus import SignConsensus, TensorConsensus, prepare_consensus
from mergelab.ops.site import Site
from mergelab.ops.task_vectors import open_task_vectors
from mergelab.ops.thresholds import Scope
from mergelab.ops.ties_kernels import merge_in
from mergelab.ops.workspace import Workspace
from mergelab.weights.align import AlignedModels


def prepare_ties(
    models: AlignedModels, *, density: float | Sequence[float], scope: Scope, consensus: SignConsensus
) -> Mapping[str, TensorConsensus]:
    """Find thresholds and majority signs of the plain task vectors."""
    open_vectors = partial(open_task_vectors, models)
    return prepare_consensus(models, open_vectors, consensus, density=density, scope=scope, memo=models.memo)


@merge_method(
    lambda_=1.0,
    elementwise=True,
    prepare=prepare_ties,
    session=TiesSession,
    identical_at={"density": 1.0},
    family="task vectors",
    paper="Yadav et al. 2023, arXiv:2306.01708",
    use="several tasks from one base, without data: the second thing to try",
)
def ties(
    vectors: Sequence[Tensor],
    *,
    site: Site,
    prepared: Mapping[str, TensorConsensus],
    workspace: Workspace,
    density: TrimDensities = 0.2,
    scope: Scope = "model",
    consensus: SignConsensus,
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
        density: fraction of entries kept; may be given for each expert, except with ``scope="pooled"``.
        lambda_: scale of the merged task vector; the engine applies it.
        scope: what the fraction is of, and over what the majority for ``tie_break`` is counted: an expert's whole task
            vector, each tensor of it, or all experts' together.
        consensus: weights, majority_sign, reduce, tie_break, weights_stage: see
            `mergelab.ops.sign_consensus.SignConsensus`.

    Returns:
        τ_m, of the vectors' shape and dtype.

    Raises:
        ConfigError: a weight is negative, or none is above 0; a density for each expert where they are pooled.
    """
    return merge_in(workspace, consensus, prepared[site.name])
