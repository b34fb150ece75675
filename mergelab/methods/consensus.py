"""Consensus task arithmetic: keep the entries that enough tasks use, by their TALL masks, and add up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import Field
from torch import Tensor

from mergelab.engine.method import merge_method
from mergelab.engine.parameters import Density, OfExperts, Weights
from mergelab.engine.sweep_range import SweepRange
from mergelab.errors import ConfigError
from mergelab.ops.multi_task import MultiTask, multi_task_vector, prepare_multi_task, uses
from mergelab.ops.sign_consensus import TensorConsensus
from mergelab.ops.site import Site
from mergelab.ops.task_vectors import of_each

MaskLambdas = Annotated[float | Sequence[float], OfExperts(Annotated[float, Field(ge=0)]), SweepRange(0.2, 0.6)]


def check_tasks(weights: Sequence[float], min_tasks: int, merge: MultiTask) -> None:
    """Raise `ConfigError` for fewer experts than an entry needs to stay, and for weights that TIES cannot take."""
    if merge == "ties" and min(weights) < 0:
        raise ConfigError(
            f"method.merge=ties: weights must be at least 0, and are {list(weights)} (merge=sum takes any)"
        )
    if min_tasks > len(weights):
        raise ConfigError(
            f"method.min_tasks={min_tasks}: must be at most the number of experts, {len(weights)}; "
            "more would leave the base as it is"
        )


@merge_method(
    lambda_=0.3,
    elementwise=True,
    prepare=prepare_multi_task,
    check=check_tasks,
    identical_at=None,
    family="task vectors",
    paper="Wang et al. 2024, arXiv:2405.07813",
    tuned=("lambda_", "mask_lambda"),
    use="many tasks, where entries that one task alone uses hurt the others",
)
def consensus(
    vectors: Sequence[Tensor],
    *,
    site: Site,
    prepared: Mapping[str, TensorConsensus] | None = None,
    mask_lambda: MaskLambdas = 0.4,
    min_tasks: Annotated[int, Field(ge=0)] = 2,
    merge: MultiTask = "sum",
    density: Density = 0.2,
    weights: Weights = None,
) -> Tensor:
    """Add up task vectors where at least so many tasks use the entry.

    θ0 + λ·m⊙τ_MTL with τ_MTL = Σ w_t τ_t, the TALL mask of a task m_t = [|τ_t| > κ·|τ_MTL − τ_t|], κ = ``mask_lambda``,
    and m = [Σ m_t ≥ ``min_tasks``] (Wang et al. 2024, arXiv:2405.07813: with 2, entries that one task alone uses and
    those that none uses are dropped). ``min_tasks=0`` is task arithmetic. ``merge=ties`` is the paper's Consensus TIES:
    τ_MTL is the sum of what agrees after TIES' trimming and election, and the masks compare untrimmed task vectors with
    it. The authors choose λ on validation data for either.

    Departures: one κ for all tasks is the default, where the authors choose one for each on validation data; |τ_t| must
    be larger than the other side, as in the authors' code (the paper says at least as large), so that an entry that
    nobody changed is nobody's; the weights are an addition, the paper's are 1.

    Args:
        vectors: T task vectors, float32 or float64.
        site: names the tensor.
        prepared: TIES' thresholds and tie sign by tensor name, with ``merge=ties``.
        mask_lambda: κ; the larger, the fewer entries a task is said to use; may be given for each expert.
        min_tasks: how many tasks must use an entry, at most T.
        merge: τ_MTL: "sum", the sum of the task vectors; "ties", that of what agrees after TIES' trimming and election.
        density: fraction of entries that TIES keeps of each task vector; without effect on the sum.
        weights: per expert, any sign (at least 0 with ``merge=ties``); default 1.
        lambda_: scale of the sum; the engine applies it.

    Returns:
        m⊙τ_MTL, of the vectors' shape and dtype.

    Raises:
        ConfigError: ``min_tasks`` is larger than the number of experts; a weight is negative with ``merge=ties``.
    """
    total = multi_task_vector(vectors, weights, None if prepared is None else prepared[site.name])
    each = zip(vectors, of_each(mask_lambda, len(vectors)), strict=True)
    users = sum(uses(vector, total, kappa).to(total.dtype) for vector, kappa in each)
    assert isinstance(users, Tensor)
    return total.masked_fill_(users < min_tasks, 0)
