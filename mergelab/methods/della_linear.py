"""DELLA without an election of signs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mergelab.engine.method import merge_method
from mergelab.engine.parameters import SumWeights
from mergelab.methods.della import Epsilons, MeanDensities, check_probabilities, drop_by_rank
from mergelab.ops.site import Site
from mergelab.ops.sparsify import Rescale, summed
from mergelab.ops.task_vectors import factors


@merge_method(
    lambda_=1.0,
    check=check_probabilities,
    identical_at=None,
    family="task vectors",
    paper="Deep et al. 2024, arXiv:2406.11617",
    work="ranks the entries of every row",
    use="as dare, where large changes should rather be kept than small ones",
)
def della_linear(
    vectors: Sequence[Tensor],
    *,
    site: Site,
    density: MeanDensities = 0.5,
    epsilon: Epsilons = 0.15,
    weights: SumWeights = None,
    rescale: Rescale = True,
    normalize: bool = False,
) -> Tensor:
    """Add up task vectors of which a random part was dropped, small entries the likelier, and the rest rescaled.

    θ0 + λ·Σ w_t τ̂_t with τ̂ = m·τ/p, m ~ Bernoulli(p) independent for each entry and expert, and p linear in the rank
    of |τ| within its row, from density − ε for the smallest to density + ε for the largest (MagPrune of Deep et al.
    2024, arXiv:2406.11617, without the election). Each entry is divided by its own probability, so that the expected
    value stays. A row runs along the last dimension; a bias is one row.

    Departures: ε is half the paper's, which writes p ± ε/2; an entry alone in its row has probability density;
    ``density=1`` keeps all, whatever ε is; the weights are an addition. mergekit restores a tensor's L1 norm, if asked,
    where the paper divides each entry.

    Args:
        vectors: T task vectors, float32 or float64; whole tensors, not parts.
        site: keys the masks.
        density: mean probability of keeping an entry; may be given for each expert.
        epsilon: how much the probability departs from it at either end of a row; may be given for each expert.
        lambda_: scale of the sum; the engine applies it.
        weights: per expert, any sign; default 1.
        rescale: divide each entry by its probability; "magnitudes", as mergekit: restore each tensor's Σ|τ_t|.
        normalize: whether to divide by the sum of the weights, as mergekit can.

    Returns:
        Σ w_t τ̂_t, of the vectors' shape and dtype.

    Raises:
        ConfigError: density ± epsilon are not above 0 and at most 1.
    """
    dropped = drop_by_rank(vectors, site.keys, density, epsilon, rescale)
    return summed(dropped, factors(weights, len(vectors), normalize))
