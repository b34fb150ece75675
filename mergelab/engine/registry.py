"""Find merge methods by name, check their parameters, and resolve the experts' weights.

@merge_method(needs_base=True, paper="...", elementwise=True)
def halfway(base: Tensor, experts: Sequence[Tensor], *, lambda_: Lambda = 0.5) -> Tensor: ...

A built-in method is such a function with a file ``conf/method/<name>.yaml`` that names it and its defaults. A method's
module is imported only when the method is requested.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf

from mergelab.config import CONF_DIR
from mergelab.engine.method import MISSING, MergeMethod
from mergelab.engine.parameters import Parameters, key_of, parameters_from
from mergelab.errors import ConfigError, did_you_mean, listed
from mergelab.ops.expert_values import is_number

PRESET = "preset"  # ``method.preset=authors`` sets the authors' values where the defaults are others
AUTHORS = "authors"


def method_names() -> tuple[str, ...]:
    """List the built-in methods, sorted; ``custom``, a user's function, is not one of them."""
    return tuple(sorted(path.stem for path in (CONF_DIR / "method").glob("*.yaml") if path.stem != "custom"))


def method_config(name: str) -> dict[str, Any]:
    """Read ``conf/method/<name>.yaml``: ``name``, ``function`` and the parameters' defaults.

    Raises:
        ConfigError: there is no such method; with the nearest name.
    """
    path = CONF_DIR / "method" / f"{name}.yaml"
    if not path.is_file():
        names = (*method_names(), "custom")
        raise ConfigError(
            f"method={name}: no such method{did_you_mean(name, names) or f'; there are {listed(names, 99)}'}"
        )
    content = OmegaConf.to_container(OmegaConf.load(path))
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must say name, function and the parameters' defaults")
    return {str(key): value for key, value in content.items()}


def get_method(name: str) -> MergeMethod:
    """Return the method of a name, or of the dotted path of a function.

    Raises:
        ConfigError: there is none; with the nearest name.
    """
    from mergelab.engine.custom import custom_method

    return custom_method(name if "." in name else str(method_config(name).get("function", MISSING)))


def method_from_config(node: Mapping[str, Any]) -> tuple[MergeMethod, Parameters]:
    """Return the method of a composed config group, and its checked parameters.

    Args:
        node: plain containers: ``function`` is a dotted path, ``name`` is ignored, the other keys are parameters. A
            preset on the command line is resolved when the config is composed (`mergelab.cli.schema`).

    Raises:
        ConfigError: the function cannot be used, or a parameter is unknown or out of range; a preset from a file, which
            could not be told from the defaults that surround it.
    """
    from mergelab.engine.custom import custom_method

    method = custom_method(str(node.get("function") or MISSING))
    values = {key: value for key, value in node.items() if key not in ("name", "function")}
    if any(is_preset(method, key) for key in values):
        raise ConfigError(
            f"method.{PRESET}: must be an override of its own, method.{PRESET}={values[PRESET]}; within a file or a "
            "mapping, write the values"
        )
    return method, check_parameters(method, values)


def check_parameters(method: MergeMethod, values: Mapping[str, Any]) -> Parameters:
    """Check parameter values, by config key (``lambda``) or Python name (``lambda_``), and fill in the defaults.

    A value ``preset`` stands for the values that it sets where no other is given (`preset_values`).

    Raises:
        ConfigError: one line with the key, the value and what is allowed.
    """
    return parameters_from(method.parameters, with_preset_values(method, values), method.name)


def preset_values(method: MergeMethod, preset: object) -> dict[str, Any]:
    """Return the values that a preset sets, by config key; none for None.

    Raises:
        ConfigError: there is no such preset, or the method has none.
    """
    if preset is None:
        return {}
    if preset != AUTHORS:
        raise ConfigError(f"method.{PRESET}={preset!r}: must be {AUTHORS!r} or null")
    if not method.authors:
        raise ConfigError(
            f"method.{PRESET}={preset}: {method.name} has no preset; methods with one are {listed(with_preset(), 99)}"
        )
    return {key_of(name): value for name, value in method.authors.items()}


def with_preset() -> list[str]:
    """List the built-in methods that have a preset."""
    return [name for name in method_names() if get_method(name).authors]


def is_preset(method: MergeMethod, key: str) -> bool:
    """Return whether ``key`` asks for a preset, and is not a parameter of the user's own function."""
    return key == PRESET and not method.custom and PRESET not in method.parameters.model_fields


def with_preset_values(method: MergeMethod, values: Mapping[str, Any]) -> dict[str, Any]:
    """Replace a preset among explicit values by the values it sets; explicit ones take precedence.

    Raises:
        ConfigError: there is no such preset.
    """
    explicit = {key: value for key, value in values.items() if not is_preset(method, key)}
    if len(explicit) == len(values):
        return explicit
    known = {key_of(key) for key in explicit}
    return {key: value for key, value in preset_values(method, values[PRESET]).items() if key not in known} | explicit


def check_capabilities(method: MergeMethod, *, has_base: bool, experts: int) -> None:
    """Check that the models include a base and as many experts as ``method`` needs.

    Raises:
        ConfigError: names the method and the numbers.
    """
    if method.needs_base and not has_base:
        raise ConfigError(f"method={method.name}: needs a base model, and none is given (models.base)")
    fewest, most = method.min_experts, method.max_experts
    if experts < fewest or (most is not None and experts > most):
        wanted = (
            f"exactly {fewest}" if fewest == most else f"at least {fewest}" if experts < fewest else f"at most {most}"
        )
        plural = "" if wanted.endswith(" 1") else "s"
        raise ConfigError(
            f"method={method.name}: merges {wanted} expert{plural}, and {experts} are given (models.experts)"
        )


def unsupported_for_generation(method: MergeMethod, parameters: Parameters) -> str | None:
    """Return why ``method`` with these parameters cannot merge models that generate text; None when it can."""
    if method.unsupported_for_generation is None:
        return None
    accepted = inspect.signature(method.unsupported_for_generation).parameters
    settings = (parameters.arguments(), *parameters.of_rules())
    reasons = (
        method.unsupported_for_generation(**{name: value for name, value in values.items() if name in accepted})
        for values in settings
    )
    return next(filter(None, reasons), None)


def resolve_weights(
    method: MergeMethod,
    parameters: Parameters,
    names: Sequence[str],
    weights: Sequence[float] | None,
    key: str = "models.experts.*.weight",
) -> tuple[float, ...]:
    """Check parameters against the experts and against each other; return one weight per expert.

    Every merge goes through here, and every run when it is planned, before its models are looked for. A rule by tensor
    name is checked among the values that the other tensors have.

    Args:
        method: the method they are for.
        parameters: its checked parameters.
        names: the experts' names; a mapping by name gives those it leaves out the models' own weight.
        weights: the models' own weights, one per expert.
        key: where these are configured.

    Returns:
        The ``weights`` parameter where it is given, else the models' own, else ones.

    Raises:
        ConfigError: weights of a wrong length, of an unknown expert, not finite, or such as the method cannot take;
            weights for a method that has none; other parameters that are given for other experts, or that exclude
            each other.
    """
    parameters.check_experts(names)
    own = tuple(weights) if weights is not None else (1.0,) * len(names)
    if len(own) != len(names):
        raise ConfigError(f"models: {len(own)} weights are given for {len(names)} experts")
    if bad := [f"{name}={weight!r}" for name, weight in zip(names, own, strict=True) if not _finite(weight)]:
        raise ConfigError(f"models: expert weights must be finite numbers: {listed(bad)}")
    if not method.takes_weights and any(weight != 1 for weight in own):
        raise ConfigError(f"method={method.name}: takes no weights, and models give the experts {list(own)}")
    plain = _checked_together(method, parameters.arguments() | parameters.of_experts(names), names, own, key)
    for index, values in enumerate(parameters.of_rules()):
        try:
            _checked_together(method, values, names, own, key)
        except ConfigError as error:
            where, line = f"method.rules[{index}]", str(error)
            named = line.replace("method.", f"{where}.", 1) if line.startswith("method.") else f"{where}: {line}"
            raise ConfigError(named) from None
    return plain


def _checked_together(
    method: MergeMethod, values: Mapping[str, Any], names: Sequence[str], own: Sequence[float], key: str
) -> tuple[float, ...]:
    """Check each of the values, by the function's names, among the others; return one weight per expert."""
    given = values.get("weights")
    weights = _each(given, names, own) if method.takes_weights else tuple(float(weight) for weight in own)
    for name, field in method.parameters.model_fields.items():
        at = key if name == "weights" and given is None else f"method.{key_of(name)}"
        value = weights if name == "weights" else values[name]
        for mark in field.metadata:
            if (check := getattr(mark, "check", None)) is not None:
                check(at, value, values, names)
    return weights


def _each(given: Any, names: Sequence[str], own: Sequence[float]) -> tuple[float, ...]:
    """Return the ``weights`` parameter as one number for each expert, the models' own where it has none."""
    if given is None:
        return tuple(float(weight) for weight in own)
    if isinstance(given, Mapping):
        if unknown := [name for name in given if name not in names]:
            hint = did_you_mean(unknown[0], names) or f"; there are {listed(names)}"
            raise ConfigError(f"method.weights: no expert is called {unknown[0]!r}{hint}")
        return tuple(float(given.get(name, weight)) for name, weight in zip(names, own, strict=True))
    if len(given) != len(names):
        raise ConfigError(
            f"method.weights={list(given)}: must have one number per expert, {len(names)}, not {len(given)}"
        )
    return tuple(float(weight) for weight in given)


def _finite(value: object) -> bool:
    return is_number(value) and abs(float(value)) < float("inf")  # type: ignore[arg-type]
