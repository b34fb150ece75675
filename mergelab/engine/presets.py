"""Named sets of parameter values that differ from the defaults: ``method.preset=authors`` sets the authors' values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mergelab.engine.parameters import key_of
from mergelab.errors import ConfigError, listed

if TYPE_CHECKING:
    from mergelab.engine.method import MergeMethod

KEY = "preset"
AUTHORS = "authors"


def preset_values(method: MergeMethod, preset: object) -> dict[str, Any]:
    """Return the values that a preset sets, by config key; none for None.

    Raises:
        ConfigError: there is no such preset, or the method has none.
    """
    if preset is None:
        return {}
    if preset != AUTHORS:
        raise ConfigError(f"method.{KEY}={preset!r}: must be {AUTHORS!r} or null")
    if not method.authors:
        raise ConfigError(
            f"method.{KEY}={preset}: {method.name} has no preset; methods with one are {listed(with_preset(), 99)}"
        )
    return {key_of(name): value for name, value in method.authors.items()}


def with_preset() -> list[str]:
    """List the built-in methods that have a preset."""
    from mergelab.engine.registry import get_method, method_names

    return [name for name in method_names() if get_method(name).authors]


def is_preset(method: MergeMethod, key: str) -> bool:
    """Return whether ``key`` asks for a preset, and is not a parameter of the user's own function."""
    return key == KEY and not method.custom and KEY not in method.parameters.model_fields


def with_preset_values(method: MergeMethod, values: Mapping[str, Any]) -> dict[str, Any]:
    """Replace a preset among explicit values by the values it sets; explicit ones take precedence.

    Raises:
        ConfigError: there is no such preset.
    """
    explicit = {key: value for key, value in values.items() if not is_preset(method, key)}
    if len(explicit) == len(values):
        return explicit
    known = {key_of(key) for key in explicit}
    return {key: value for key, value in preset_values(method, values[KEY]).items() if key not in known} | explicit
