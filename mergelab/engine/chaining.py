"""Resolve ``then``: the method that merges after another one has transformed the models."""

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
    """Return the method that ``then`` names, and its checked parameters.

    Raises:
        ConfigError: there is no such method, it cannot be chained, or its parameters are wrong.
    """
    given = {"name": then} if isinstance(then, str) else dict(then)
    try:
        method = get_method(str(given.pop("name", "")))
    except ConfigError as error:
        allowed = "must be the name of a merge method, or its name and parameters"
        raise ConfigError(f"method.then={then!r}: {allowed}: {error}") from None
    whole = method.kind == "model" or (method.kind == "models" and not method.keeps_models)
    if whole or method.needs or method.one_model_per_expert:
        raise ConfigError(f"method.then={then!r}: must be a method that makes one model of weights alone")
    return method, check_parameters(method, given)


def check_then(models: AlignedModels, weights: Sequence[float], then: str | Mapping[str, Any]) -> None:
    """Raise `ConfigError` when the method ``then`` cannot merge these models."""
    from mergelab.engine.run import merge

    merge(*chained(then), models, weights=weights)  # checks the request; reads nothing until it is iterated
