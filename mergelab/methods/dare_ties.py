"""DARE before TIES' election of signs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from mergelab.engine.method import merge_method
from mergelab.engine.parameters import Densities, OptionalTrimDensities
from mergelab.methods.dare import Scales, drop_, restoring_scales
from mergelab.ops.sign_consensus import SignConsensus, TensorConsensus, prepare_consensus
from mergelab.ops.site import Site, SiteOf
from mergelab.ops.sparsify import Rescale
from mergelab.ops.task_vectors import Vectors, of_each, open_task_vectors
from mergelab.ops.thresholds import Scope
from mergelab.ops.ties_kernels import merge_in
from mergelab.ops.workspace import Workspace
from mergelab.weights.align import AlignedModels


def prepare_dare_ties(
    models: AlignedModels,
    *,
    site_of: SiteOf,
    density: float | Sequence[float],
    trim_density: float | Sequence[float] | None,
    rescale: Rescale,
    scope: Scope,
    consensus: SignConsensus,
) -> tuple[Mapping[str, TensorConsensus], Scales]:
    """Find thresholds (where a second trim is asked for) and majority signs of the dropped and rescaled vectors.

    Returns:
        These, and the factors that the vectors are rescaled by.
    """
    count = len(models.experts)
    scales = restoring_scales(models, site_of=site_of, density=density, rescale=rescale)

    def open_vectors(name: str, /, *, only: slice = slice(None)) -> Vectors:
        whole = open_task_vectors(models, name, only=only)
        keys, shares = site_of(name).keys[only], of_each(density, count)[only]

        def read(part: slice) -> list[Tensor]:
            # The masks of a strided sample are drawn for all that the stride passes over.
            dense = whole(slice(part.start, part.stop))
            own = scales[name][only] if name in scales else None
            return [vector[:: part.step] for vector in drop_(dense, keys, part.start, shares, rescale, own)]

        return read

    return prepare_consensus(models, open_vectors, consensus, density=trim_density, scope=scope), scales


@merge_method(
    lambda_=1.0,
    elementwise=True,
    prepare=prepare_dare_ties,
    identical_at={"density": 1.0},
    family="task vectors",
    paper="Yu et al. 2024, arXiv:2311.03099, with Yadav et al. 2023, arXiv:2306.01708",
    use="as dare, for experts whose signs conflict",
)
def dare_ties(
    vectors: Sequence[Tensor],
    *,
    site: Site,
    prepared: tuple[Mapping[str, TensorConsensus], Scales],
    workspace: Workspace,
    density: Densities = 0.5,
    trim_density: OptionalTrimDensities = None,
    rescale: Rescale = True,
    scope: Scope = "model",
    consensus: SignConsensus,
) -> Tensor:
    """Drop and rescale task vectors as DARE does, then elect signs and merge what agrees as TIES does.

    θ0 + λ·τ_m with τ̂_t = m_t·τ_t / density, m_t ~ Bernoulli(density), and τ_m the disjoint mean of the τ̂_t under the
    elected signs (Yu et al. 2024, arXiv:2311.03099, with Yadav et al. 2023, arXiv:2306.01708). Dropped entries neither
    vote nor count in the mean. Departure: TIES' own trim is left out unless ``trim_density`` asks for it; it then keeps
    that fraction of all entries, by magnitude, of what DARE left. Ties and weights as in `ties`.

    Args:
        vectors: T task vectors, float32 or float64; they are written over.
        site: keys the masks, and names the tensor in ``prepared``.
        prepared: by tensor name, thresholds and tie sign; and the factors that restore the sums of magnitudes.
        workspace: the memory of the vectors and of intermediates.
        density: probability of keeping an entry; may be given for each expert.
        trim_density: fraction of entries kept by the second trim; None for no such trim; may be given for each expert,
            except with ``scope="pooled"``.
        lambda_: scale of the merged task vector; the engine applies it.
        rescale: divide the remaining entries by the density; "magnitudes": restore each tensor's Σ|τ_t|.
        scope: of the second trim and of the majority, as in `ties`.
        consensus: weights, majority_sign, reduce, tie_break, weights_stage: as in `ties`.

    Returns:
        τ_m, of the vectors' shape and dtype.

    Raises:
        ConfigError: a weight is negative, or none is above 0; a ``trim_density`` for each expert where they are pooled.
    """
    thresholds, scales = prepared
    drop_(vectors, site.keys, site.offset, density, rescale, scales.get(site.name))
    return merge_in(workspace, consensus, thresholds[site.name])
