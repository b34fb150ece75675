"""LiNeS: task vectors scaled by depth, after any method that merges task vectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from mergelab.engine.chaining import ChainedWeights, chained, check_then
from mergelab.engine.method import Substitute, merge_method
from mergelab.engine.registry import check_parameters
from mergelab.errors import ConfigError
from mergelab.weights.align import AlignedModels


def check_scaled(
    models: AlignedModels, weights: Any, then: str | Mapping[str, Any], alpha: float | None, beta: float
) -> None:
    """Raise `ConfigError` where the method that follows has no λ to scale, or cannot merge these models."""
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
    family="task vectors",
    paper="Wang et al. 2024, arXiv:2410.17146",
)
def lines(
    models: AlignedModels,
    *,
    then: str | Mapping[str, Any] = "task_arithmetic",
    alpha: Annotated[float, Field()] | None = None,
    beta: Annotated[float, Field()] = 0.5,
    weights: ChainedWeights = None,
) -> Substitute:
    """Merge by another method on task vectors, with a λ that grows linearly with the depth of the layer.

    λ(ℓ) = α + β·ℓ/(L−1) in layer ℓ of L, counted from 0: shallow layers, which hold what all tasks share, change less
    (Wang et al. 2024, arXiv:2410.17146). Embeddings count as the first layer, what comes after the layers as the last.
    The stacks of an encoder-decoder model are counted each on its own.

    Departures: α is 1/T by default; the authors multiply that by the ratio of the norms of the summed and the merged
    task vectors, which is 1 for task arithmetic.

    Args:
        models: base and experts.
        then: the method that merges, by its name, or a mapping of ``name`` and its parameters; it must have a λ.
        alpha: λ of the first layer; default 1/T.
        beta: what is added up to the last layer.
        weights: per expert, handed on; default 1.

    Returns:
        What to merge instead: the same models, by ``then`` with a λ for each layer.

    Raises:
        ConfigError: ``then`` cannot follow, or has no λ.
    """
    method, parameters = chained(then)
    first = 1 / len(models.experts) if alpha is None else alpha
    return Substitute(
        method, check_parameters(method, {**parameters.by_key(), "lambda": [first, first + beta]}), models
    )
