"""Parameters that differ between tensors: lists that run over a model's depth, and rules by name.

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
    """Values for the tensors whose names fit a shell-style pattern; a tuple runs over the depth."""

    match: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Varied:
    """What differs between tensors.

    Attributes:
        curves: parameters, by config key, given as a list of numbers: the first is for the first layer, the last for
            the last, and layers between lie on the lines between the numbers. What comes before the layers
            (embeddings) has the first number, what comes after them the last.
        rules: where several fit a tensor, the later one's value counts.
    """

    curves: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()

    def by_key(self) -> dict[str, Any]:
        """Return them as they are configured."""
        rules = [
            {MATCH: rule.match} | {k: list(v) if isinstance(v, tuple) else v for k, v in rule.values.items()}
            for rule in self.rules
        ]
        return {key: list(curve) for key, curve in self.curves.items()} | ({KEY: rules} if rules else {})

    def check_names(self, names: Sequence[str]) -> None:
        """Raise `ConfigError` for a rule that fits no tensor; warn where two set the same parameter of one.

        Args:
            names: of all tensors that are merged.
        """
        setters: dict[tuple[str, str], int] = {}
        for index, rule in enumerate(self.rules):
            fitting = [name for name in names if matches_any(name, [rule.match])]
            if not fitting:
                hint = did_you_mean(rule.match, names) or f"; tensors are called {listed(names)}"
                raise ConfigError(f"method.rules[{index}].match={rule.match!r}: fits no tensor that is merged{hint}")
            for key in rule.values:
                earlier = {setters[name, key] for name in fitting if (name, key) in setters}
                for first in sorted(earlier):
                    warnings.warn(
                        f"method.rules: {self.rules[first].match!r} and {rule.match!r} both set {key} of some tensors; "
                        "the later rule counts",
                        MergeWarning,
                        stacklevel=2,
                    )
                setters.update({(name, key): index for name in fitting})

    def at(self, names: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Return for each tensor the values that are its own, by config key."""
        depth = depths(names)
        for name in names:
            own: dict[str, Any] = {key: on_curve(curve, depth[name]) for key, curve in self.curves.items()}
            for rule in self.rules:
                if matches_any(name, [rule.match]):
                    own |= {key: _value(value, depth[name]) for key, value in rule.values.items()}
            yield name, own


def on_curve(curve: Sequence[float], depth: float) -> float:
    """Interpolate: the first number at depth 0, the last at depth 1, straight lines between them."""
    place = depth * (len(curve) - 1)
    before = min(int(place), max(len(curve) - 2, 0))
    after = min(before + 1, len(curve) - 1)
    share = place - before
    return curve[before] if share == 0 else (1 - share) * curve[before] + share * curve[after]


def _value(value: Any, depth: float) -> Any:
    return on_curve(value, depth) if isinstance(value, tuple) else value


def is_curve(value: object) -> bool:
    """Tell a list of numbers."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) > 0
        and all(isinstance(each, int | float) and not isinstance(each, bool) for each in value)
    )
