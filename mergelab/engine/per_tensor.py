"""Resolve parameters that differ between tensors: lists over a model's depth, and rules by tensor name.

method.lambda=[0.2,0.6]                                        # 0.2 in the first layer, 0.6 in the last
method.rules='[{match: "*.attention.*", lambda: 0.5}]'         # another value where a name matches
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mergelab.errors import ConfigError, MergeWarning, did_you_mean, listed
from mergelab.weights.naming import depths, matches_any

KEY = "rules"
MATCH = "match"


@dataclass(frozen=True)
class Rule:
    """Values for the tensors whose names match a shell-style pattern; a tuple is a curve over the depth."""

    match: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Varied:
    """Parameters that differ between tensors.

    Attributes:
        curves: by config key, parameters given as a list of numbers, from the first layer to the last. Values for
            layers in between are interpolated linearly. Tensors before the layers (embeddings) have the first number,
            tensors after them the last.
        rules: rules by tensor name; of several that match a tensor, the last one applies.
    """

    curves: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()

    def by_key(self) -> dict[str, Any]:
        """Return the values in the form of the config, by config key."""
        rules = [
            {MATCH: rule.match} | {k: list(v) if isinstance(v, tuple) else v for k, v in rule.values.items()}
            for rule in self.rules
        ]
        return {key: list(curve) for key, curve in self.curves.items()} | ({KEY: rules} if rules else {})

    def check_names(self, names: Sequence[str]) -> None:
        """Raise `ConfigError` for a rule that matches no tensor; warn when two set the same parameter of a tensor.

        Args:
            names: names of all tensors that are merged.
        """
        setters: dict[tuple[str, str], int] = {}
        for index, rule in enumerate(self.rules):
            matching = [name for name in names if matches_any(name, [rule.match])]
            if not matching:
                hint = did_you_mean(rule.match, names) or f"; tensors are called {listed(names)}"
                raise ConfigError(f"method.rules[{index}].match={rule.match!r}: fits no tensor that is merged{hint}")
            for key in rule.values:
                earlier = {setters[name, key] for name in matching if (name, key) in setters}
                for first in sorted(earlier):
                    warnings.warn(
                        f"method.rules: {self.rules[first].match!r} and {rule.match!r} both set {key} of some tensors; "
                        "the later rule counts",
                        MergeWarning,
                        stacklevel=2,
                    )
                setters.update({(name, key): index for name in matching})

    def at(self, names: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield each tensor's name with its values, by config key."""
        depth = depths(names)
        for name in names:
            own: dict[str, Any] = {key: on_curve(curve, depth[name]) for key, curve in self.curves.items()}
            for rule in self.rules:
                if matches_any(name, [rule.match]):
                    own |= {key: _value(value, depth[name]) for key, value in rule.values.items()}
            yield name, own


def on_curve(curve: Sequence[float], depth: float) -> float:
    """Interpolate a curve linearly: the first number is at depth 0, the last at depth 1."""
    position = depth * (len(curve) - 1)
    before = min(int(position), max(len(curve) - 2, 0))
    after = min(before + 1, len(curve) - 1)
    share = position - before
    return curve[before] if share == 0 else (1 - share) * curve[before] + share * curve[after]


def _value(value: Any, depth: float) -> Any:
    return on_curve(value, depth) if isinstance(value, tuple) else value


def is_curve(value: object) -> bool:
    """Return whether a value is a non-empty list of numbers."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) > 0
        and all(isinstance(each, int | float) and not isinstance(each, bool) for each in value)
    )
