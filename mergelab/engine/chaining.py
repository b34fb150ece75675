"""A method that works on whole models first, and the one that then merges them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from mergelab.engine.method import MergeMethod
from mergelab.engine.parameters import Parameters, Weights
from mergelab.engine.registry import check_parameters, get_method, resolve_weights
from mergelab.errors import ConfigError
from mergelab.weights.align import AlignedModels


@dataclass(frozen=True)
class ForChained:
    """Marks weights that the method named by the parameter ``then`` takes."""

    def check(self, key: str, weights: Sequence[float], settings: Mapping[str, Any], experts: Sequence[str]) -> None:
        """Raise `ConfigError` for weights that it cannot take."""
        method, parameters = chained(settings["then"])
        resolve_weights(method, parameters, experts, weights, key)


ChainedWeights = Annotated[Weights, ForChained()]


def chained(then: str | Mapping[str, Any]) -> tuple[MergeMethod, Parameters]:
    """Return the method that merges the aligned experts, and its parameters.

    Raises:
        ConfigError: there is none of that name, it cannot follow, or its parameters are wrong.
    """
    given = {"name": then} if isinstance(then, str) else dict(then)
    try:
        method = get_method(str(given.pop("name", "")))
    except ConfigError as error:
        allowed = "must be the name of a merge method, or its name and parameters"
        raise ConfigError(f"method.then={then!r}: {allowed}: {error}") from None
    if method.kind in ("model", "models") or method.needs or method.one_model_per_expert:
        raise ConfigError(f"method.then={then!r}: must be a method that makes one model of weights alone")
    return method, check_parameters(method, given)


def check_then(models: AlignedModels, weights: Sequence[float], then: str | Mapping[str, Any]) -> None:
    """Raise `ConfigError` where the method that follows cannot merge these models."""
    from mergelab.engine.run import merge

    merge(*chained(then), models, weights=weights)  # checks the request, and reads nothing before it is iterated
