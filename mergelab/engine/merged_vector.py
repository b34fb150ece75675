"""The task vector that another method makes of the models, tensor by tensor: what a wrapper goes on with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mergelab.engine.chaining import chained
from mergelab.engine.low_rank import coefficients
from mergelab.engine.method import MergeMethod
from mergelab.engine.request import MergeRequest, checked_job, merge_into, prepared_job
from mergelab.ops.blocks import working
from mergelab.ops.rounding import rounding_norm
from mergelab.weights.align import AlignedModels


@dataclass(frozen=True)
class MergedVector:
    """The merged model of another method, as its difference from the base.

    Attributes:
        job: the other method's prepared request, in float32 or float64 throughout.
        method: the other method.
    """

    job: MergeRequest
    method: MergeMethod

    def of(self, name: str) -> Tensor:
        """Return λ·τ_m of a tensor: float32, or float64 where a model is; 0 everywhere where no expert changes it."""
        job = self.job
        assert job.models.base is not None
        assert job.dtype is not None
        shape = torch.Size(job.reference.shape(name))
        into = torch.empty(shape.numel(), dtype=job.dtype)
        exact = job.method.returns_task_vector and job.factored(name) is None
        vector = torch.zeros_like(into) if exact else None
        merge_into(job, name, into, slice(0, shape.numel()), vector)
        if vector is None:
            return into.sub_(working(job.models.base.get(name).cpu()).reshape(-1)).view(shape)
        return vector.mul_(job.arguments[name].get("lambda_", 1.0)).view(shape)

    def noise(self, name: str) -> float:
        """Return about the largest singular value that rounding to the experts' stored dtypes makes in a matrix.

        Where the other method adds up task vectors, each expert's rounding counts with the expert's coefficient. Else
        the task vectors count once, times λ: what methods drop or average makes that an upper bound.
        """
        arguments, experts = self.job.arguments[name], self.job.models.experts
        scale = arguments.get("lambda_", 1.0) if self.method.returns_task_vector else 1.0
        factors = coefficients(self.method, arguments, len(experts)) or [scale] * len(experts)
        pairs = zip(factors, experts, strict=True)
        return math.hypot(*(factor * rounding_norm([expert.get(name)]) for factor, expert in pairs))


def prepare_merged(
    models: AlignedModels, *, seed: int, then: str | Mapping[str, Any], weights: Sequence[float] | None
) -> MergedVector:
    """Prepare the merge by the method ``then``.

    Args:
        models: base and experts, in the order given.
        seed: of random methods.
        then: the method's name, or a mapping of ``name`` and its parameters.
        weights: the models' weights, one per expert.
    """
    method, parameters = chained(then)
    sources = [source for source in (models.base, *models.experts) if source is not None]
    double = any(source.dtype(name) == torch.float64 for source in sources for name in models.names)
    dtype = torch.float64 if double else torch.float32
    job = prepared_job(checked_job(method, parameters, models, weights=weights, seed=seed, dtype=dtype))
    # Low-rank changes are added up with the base where there are coefficients, and rounded.
    return MergedVector(replace(job, method=replace(job.method, coefficients=None)), job.method)
