"""LiNeS: scale the merged task vector by depth, after any method on task vectors."""

from __future__ import annotations

import glob
import math
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from mergelab.engine.chaining import ChainedWeights, chained, check_then
from mergelab.engine.method import MergeMethod, Substitute, merge_method
from mergelab.engine.parameters import Parameters
from mergelab.engine.registry import check_parameters
from mergelab.errors import ConfigError
from mergelab.ops.blocks import blocks
from mergelab.ops.task_vectors import factors, open_task_vectors, weighted_sum
from mergelab.weights.align import AlignedModels
from mergelab.weights.naming import layer_of


def check_scaled(
    models: AlignedModels, weights: Any, then: str | Mapping[str, Any], alpha: float | None, beta: float
) -> None:
    """Raise `ConfigError` when the method ``then`` has no λ to scale, or cannot merge these models."""
    method = chained(then)[0]
    if "lambda_" not in method.parameters.model_fields:
        raise ConfigError(f"method.then={then!r}: must be a method with a parameter lambda, which is what is scaled")
    if isinstance(then, Mapping) and "lambda" in then:
        raise ConfigError("method.then: its lambda is what lines sets, by alpha and beta")
    check_then(models, weights, then)


@merge_method(
    needs_base=True,
    check=check_scaled,
    identical_at=None,
    keeps_models=True,
    family="task vectors",
    paper="Wang et al. 2024, arXiv:2410.17146",
    tuned=("beta",),
    use="after any method on task vectors, when shallow layers should stay near the base",
)
def lines(
    models: AlignedModels,
    *,
    seed: int = 0,
    then: str | Mapping[str, Any] = "task_arithmetic",
    alpha: Annotated[float, Field()] | None = None,
    beta: Annotated[float, Field()] = 0.5,
    weights: ChainedWeights = None,
) -> Substitute:
    """Merge by another method on task vectors, with a λ that grows linearly with the depth of the layer.

    λ(ℓ) = α + β·ℓ/(L−1) in layer ℓ of L, counted from 0: shallow layers, whose features all tasks share, change less
    (Wang et al. 2024, arXiv:2410.17146). Tensors outside the layers (embeddings, last norm, pooler, heads) have α.
    Layers are counted separately in the stacks of an encoder-decoder model. By default, α = ‖Σ_t w_t τ_t‖₁ / (T·‖τ_m‖₁)
    with τ_m the task vector that ``then`` makes at λ = 1, and norms over the whole model; that is 1/T for task
    arithmetic, and costs a merge by another method more.

    Departures: the authors choose β on validation data. Where ``then`` merges to the base, α is 1/T.

    Args:
        models: base and experts.
        seed: of a method ``then`` that draws random numbers.
        then: the method that merges: its name, or a mapping of ``name`` and its parameters; it must have a λ.
        alpha: λ of the first layer and of tensors outside the layers; see above.
        beta: difference of λ between the last and the first layer.
        weights: per expert, passed on to ``then``; default 1.

    Returns:
        The merge to run instead: the same models, by ``then`` with a λ for each layer.

    Raises:
        ConfigError: ``then`` cannot merge these models, or has no λ.
    """
    method, parameters = chained(then)
    first = alpha if alpha is not None else norm_ratio(method, parameters, models, weights, seed) / len(models.experts)
    given = parameters.by_key()
    outside = [{"match": glob.escape(name), "lambda": first} for name in models.names if layer_of(name) is None]
    rules = [*outside, *given.pop("rules", [])]
    scaled = {**given, "lambda": [first, first + beta]} | ({"rules": rules} if rules else {})
    return Substitute(method, check_parameters(method, scaled), models)


def norm_ratio(method: MergeMethod, parameters: Parameters, models: AlignedModels, weights: Any, seed: int) -> float:
    """Return ‖Σ w_t τ_t‖₁ / ‖τ_m‖₁ over the whole model, τ_m by ``method`` at λ = 1; 1 where τ_m is 0.

    Norms are added up in float64, of entries in the dtype that the method computes in.
    """
    from mergelab.engine.run import merge

    if method.name == "task_arithmetic":
        return 1.0
    base = models.base
    assert base is not None
    own = check_parameters(method, {**parameters.by_key(), "lambda": 1.0})
    shares = factors(weights if method.takes_weights else None, len(models.experts))
    summed, merged = [], []
    names = frozenset(models.names)
    for name, tensor in merge(method, own, models, weights=weights, seed=seed, dtype=torch.float64, only=names):
        if name not in names:
            continue
        read, start, end = open_task_vectors(models, name), base.get(name).reshape(-1), tensor.reshape(-1)
        for part in blocks(end.numel()):
            summed.append(_length(weighted_sum(read(part), shares)))
            merged.append(_length(end[part] - start[part].cpu()))
    return math.fsum(summed) / math.fsum(merged) if any(merged) else 1.0


def _length(entries: Tensor) -> float:
    return float(entries.abs().sum(dtype=torch.float64))
