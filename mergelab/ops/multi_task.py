"""The multi-task vector, and the TALL masks of what each task uses of it (Wang et al. 2024, arXiv:2405.07813)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

from torch import Tensor

from mergelab.ops.sign_consensus import SignConsensus, TensorConsensus, prepare_consensus
from mergelab.ops.task_vectors import (
    factors,
    just_below,
    open_task_vectors,
    resolve_zeros,
    trim,
    weighted_sum,
)
from mergelab.weights.align import AlignedModels

MultiTask = Literal["sum", "ties"]


def prepare_multi_task(
    models: AlignedModels, *, merge: MultiTask, density: float
) -> Mapping[str, TensorConsensus] | None:
    """Find what TIES needs to know of the whole models; None where the task vectors are added up."""
    if merge == "sum":
        return None
    open_vectors = partial(open_task_vectors, models)
    return prepare_consensus(models, open_vectors, SignConsensus(), density=density, scope="model", memo=models.memo)


def multi_task_vector(
    vectors: Sequence[Tensor], weights: Sequence[float] | Mapping[str, float] | None, consensus: TensorConsensus | None
) -> Tensor:
    """Return Σ w_t τ_t, or with ``consensus`` the weighted sum of what agrees after TIES' trimming and election."""
    chosen = vectors if consensus is None else agreeing(vectors, consensus)
    return weighted_sum(chosen, factors(weights, len(vectors)))


def agreeing(vectors: Sequence[Tensor], consensus: TensorConsensus) -> list[Tensor]:
    """Return the task vectors without what TIES trims, and without the entries that have not the elected sign."""
    bounds = (just_below(threshold, vectors[0].dtype) if threshold > 0 else -1.0 for threshold in consensus.thresholds)
    trimmed = [trim(vector, bound) for vector, bound in zip(vectors, bounds, strict=True)]
    signs = resolve_zeros(SignConsensus().elect(trimmed), consensus.tie_sign)
    return [vector.masked_fill_(vector * signs <= 0, 0) for vector in trimmed]


def uses(vector: Tensor, whole: Tensor, kappa: float) -> Tensor:
    """Return the TALL mask of a task: |τ_t| > κ·|τ_MTL − τ_t|."""
    return vector.abs() > (whole - vector).abs_().mul_(kappa)
