"""Model Breadcrumbs before TIES' election of signs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mergelab.engine.method import merge_method
from mergelab.engine.parameters import Densities
from mergelab.methods.breadcrumbs import Gammas, RowScope, keep_middle
from mergelab.ops.sign_consensus import SignConsensus, find_tie_sign
from mergelab.ops.site import SiteOf
from mergelab.weights.align import AlignedModels


def prepare_breadcrumbs_ties(
    models: AlignedModels,
    *,
    site_of: SiteOf,
    density: float | Sequence[float],
    gamma: float | Sequence[float],
    scope: RowScope,
    consensus: SignConsensus,
) -> float:
    """Find the sign of entries whose votes cancel."""
    return find_tie_sign(models, lambda vectors, _: keep_middle(vectors, density, gamma, scope), consensus, site_of)


@merge_method(
    lambda_=1.0,
    prepare=prepare_breadcrumbs_ties,
    identical_at={"density": 1.0},
    family="task vectors",
    paper="Davari & Belilovsky 2023, arXiv:2312.06795, with Yadav et al. 2023, arXiv:2306.01708",
    use="as breadcrumbs, for experts that pull in opposite directions",
)
def breadcrumbs_ties(
    vectors: Sequence[Tensor],
    *,
    prepared: float,
    density: Densities = 0.1,
    gamma: Gammas = 0.01,
    scope: RowScope = "row",
    consensus: SignConsensus,
) -> Tensor:
    """Drop outliers and small entries as Breadcrumbs does, then elect signs and merge what agrees as TIES does.

    θ0 + λ·τ_m with τ̂_t = m_t⊙τ_t, m_t as in `breadcrumbs`, and τ_m the disjoint mean of the τ̂_t under the elected
    signs (Davari & Belilovsky 2023, arXiv:2312.06795, with Yadav et al. 2023, arXiv:2306.01708). Departures: those of
    `breadcrumbs`; votes that cancel, and weights, as in `ties`. ``scope="tensor"`` with ``weights_stage="elect"`` and
    ``tie_break="positive"`` is mergekit's.

    Args:
        vectors: T task vectors, float32 or float64; whole tensors, not parts.
        prepared: the sign of entries whose votes cancel.
        density: fraction of a row's entries that stay; may be given for each expert.
        gamma: fraction of a row's entries dropped as outliers; may be given for each expert.
        lambda_: scale of the merged task vector; the engine applies it.
        scope: what the fractions are of: each row, or the whole tensor.
        consensus: weights, majority_sign, reduce, tie_break, weights_stage: as in `ties`; the majority is over the
            whole model.

    Returns:
        τ_m, of the vectors' shape and dtype.

    Raises:
        ConfigError: a weight is negative, or none is above 0.
    """
    return consensus.merge(keep_middle(vectors, density, gamma, scope), prepared)
