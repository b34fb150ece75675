"""TALL masks: one multi-task vector for all tasks, and for each task the mask of the entries that it uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from mergelab.engine.method import merge_method
from mergelab.engine.parameters import Density
from mergelab.methods.consensus import MaskLambdas
from mergelab.ops.multi_task import MultiTask, multi_task_vector, prepare_multi_task, uses
from mergelab.ops.sign_consensus import TensorConsensus
from mergelab.ops.site import Site
from mergelab.ops.task_vectors import of_each


@merge_method(
    lambda_=1.0,
    elementwise=True,
    prepare=prepare_multi_task,
    identical_at=None,
    family="task vectors",
    use="a model for each task that stores one merged vector and a mask per task, from task arithmetic or TIES",
    paper="Wang et al. 2024, arXiv:2405.07813",
)
def tall_masks(
    vectors: Sequence[Tensor],
    *,
    output: int,
    site: Site,
    prepared: Mapping[str, TensorConsensus] | None = None,
    mask_lambda: MaskLambdas = 0.4,
    merge: MultiTask = "sum",
    density: Density = 0.2,
) -> Tensor:
    """Give each task the entries of one multi-task vector that it uses.

    θ0 + λ·m_t⊙τ_MTL for task t: τ_MTL = Σ τ_s or that of TIES, m_t = [|τ_t| > κ·|τ_MTL − τ_t|] and κ = ``mask_lambda``
    (Wang et al. 2024, arXiv:2405.07813). A merged model for each expert: τ_MTL is common, masks take one bit an entry.

    Departures: one κ for all tasks is the default, where the authors choose one of 0.2, 0.3, …, 0.6 for each on
    validation data (it may be given for each); |τ_t| must be larger than the other side, as in the authors' code (the
    paper says at least as large). λ is an addition, the paper's is 1. With ``merge=ties``, see `ties` for equal
    magnitudes.

    Args:
        vectors: T task vectors, float32 or float64.
        output: index of the expert whose model is wanted.
        site: names the tensor.
        prepared: TIES' thresholds and tie sign by tensor name, with ``merge=ties``.
        mask_lambda: κ; the larger, the fewer entries a task is said to use; may be given for each expert.
        merge: τ_MTL: "sum", the sum of the task vectors; "ties", that of what agrees after TIES' trimming and election.
        density: fraction of entries that TIES keeps of each task vector; without effect on the sum.
        lambda_: scale of the masked vector; the engine applies it.

    Returns:
        m_t⊙τ_MTL, of the vectors' shape and dtype.
    """
    whole = multi_task_vector(vectors, None, None if prepared is None else prepared[site.name])
    used = uses(vectors[output], whole, of_each(mask_lambda, len(vectors))[output])
    return whole.masked_fill_(~used, 0)
