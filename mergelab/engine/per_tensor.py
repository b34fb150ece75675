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
from mergelab.weights.naming import LayerPlace, matches_any, places

KEY = "rules"
MATCH, LAYERS = "match", "layers"
RULES_AS, REQUIRED = "rules_as", "required"
MERGEKIT = "mergekit"
Layers = tuple[int | None, int | None]


@dataclass(frozen=True)
class Rule:
    """Values for the tensors whose names match a shell-style pattern and that lie in a range of layers.

    Attributes:
        match: the pattern.
        values: by config key; a tuple is a curve over the depth, or over the range of layers where there is one.
        layers: first layer, and the one after the last; None: no bound, what lies before or after the layers included.
    """

    match: str
    values: Mapping[str, Any]
    layers: Layers = (None, None)

    def fits(self, name: str, place: LayerPlace) -> bool:
        """Return whether the rule is for a tensor."""
        start, stop = self.layers
        within = (start is None or place.layer >= start) and (stop is None or place.layer < stop)
        return within and matches_any(name, [self.match])


@dataclass(frozen=True)
class Varied:
    """Parameters that differ between tensors.

    Attributes:
        curves: by config key, parameters given as a list of numbers, from the first layer to the last, or such lists
            and numbers by expert. Values for layers in between are interpolated linearly. Tensors before the layers
            (embeddings) have the first number, tensors after them the last.
        rules: rules by tensor name; of several that match a tensor, the last one applies. Numbers by expert hold for
            the experts that they name.
        as_mergekit: of several rules the first applies; a rule that matches nothing is a warning; tensors after the
            layers have a list's first number, an only layer has the last.
        required: parameters ("t"), and such of an expert ("weights.a"), that have no value but those of rules.
    """

    curves: Mapping[str, Any] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    as_mergekit: bool = False
    required: tuple[str, ...] = ()

    def by_key(self) -> dict[str, Any]:
        """Return the values in the form of the config, by config key."""
        rules = [
            {MATCH: rule.match}
            | ({LAYERS: list(rule.layers)} if rule.layers != (None, None) else {})
            | {key: _as_lists(value) for key, value in rule.values.items()}
            for rule in self.rules
        ]
        found = {key: _as_lists(curve) for key, curve in self.curves.items()} | ({KEY: rules} if rules else {})
        found |= {RULES_AS: MERGEKIT} if self.as_mergekit else {}
        return found | ({REQUIRED: list(self.required)} if self.required else {})

    def check_names(self, names: Sequence[str]) -> None:
        """Raise `ConfigError` for a rule that matches no tensor; warn when two set the same parameter of a tensor.

        Args:
            names: names of all tensors that are merged.
        """
        found = places(names)
        setters: dict[tuple[str, str], int] = {}
        for index, rule in enumerate(self.rules):
            matching = [name for name in names if rule.fits(name, found[name])]
            if not matching:
                self._unmatched(index, names)
            for key in () if self.as_mergekit else rule.values:
                earlier = {setters[name, key] for name in matching if (name, key) in setters}
                for first in sorted(earlier):
                    warnings.warn(
                        f"method.rules: {self.rules[first].match!r} and {rule.match!r} both set {key} of some tensors; "
                        "the later rule counts",
                        MergeWarning,
                        stacklevel=2,
                    )
                setters.update({(name, key): index for name in matching})

    def _unmatched(self, index: int, names: Sequence[str]) -> None:
        """Report a rule that matches no tensor."""
        rule = self.rules[index]
        within = "" if rule.layers == (None, None) else f" in layers {list(rule.layers)}"
        hint = did_you_mean(rule.match, names) or f"; tensors are called {listed(names)}"
        line = f"method.rules[{index}].match={rule.match!r}: fits no tensor that is merged{within}{hint}"
        if not self.as_mergekit:
            raise ConfigError(line)
        warnings.warn(line, MergeWarning, stacklevel=2)

    def at(self, names: Sequence[str], given: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield each tensor's name with its values, by config key.

        Args:
            names: names of all tensors that are merged.
            given: the values that hold where no rule says otherwise, by config key.

        Raises:
            ConfigError: no rule gives a tensor a value that is required.
        """
        for name, place in places(names).items():
            at = self._position(place)
            own: dict[str, Any] = {key: value_at(curve, at) for key, curve in self.curves.items()}
            by_rule: set[str] = set()
            for rule in reversed(self.rules) if self.as_mergekit else self.rules:
                if not rule.fits(name, place):
                    continue
                within = self._position(place, *rule.layers)
                for key, value in rule.values.items():
                    one = value_at(value, within)
                    by_rule |= {key, *(f"{key}.{expert}" for expert in (one if isinstance(one, Mapping) else ()))}
                    own[key] = joined(own.get(key, given.get(key)), one)
            if missing := [key for key in self.required if key not in by_rule]:
                raise ConfigError(f"method.{missing[0]}: needs a value for {name}, and no rule gives one")
            yield name, own

    def _position(self, place: LayerPlace, start: int | None = None, stop: int | None = None) -> float:
        """Return how far along the layers a tensor lies, or along those from ``start`` to ``stop``: from 0 to 1."""
        if not place.count:
            return 0.0 if self.as_mergekit else place.depth()
        first, count = start or 0, (place.count if stop is None else min(stop, place.count)) - (start or 0)
        if count <= 1:
            return 1.0 if self.as_mergekit else 0.0
        return (place.layer - first) / (count - 1)


def joined(before: Any, value: Any) -> Any:
    """Return ``value``; numbers by expert are joined with those of the experts that it does not name."""
    return {**before, **value} if isinstance(before, Mapping) and isinstance(value, Mapping) else value


def on_curve(curve: Sequence[float], depth: float) -> float:
    """Interpolate a curve linearly: the first number is at depth 0, the last at depth 1."""
    position = depth * (len(curve) - 1)
    before = min(int(position), max(len(curve) - 2, 0))
    after = min(before + 1, len(curve) - 1)
    share = position - before
    return curve[before] if share == 0 else (1 - share) * curve[before] + share * curve[after]


def value_at(value: Any, depth: float) -> Any:
    """Return a value as it is at a depth: curves as numbers, also those of single experts."""
    if isinstance(value, Mapping):
        return {key: value_at(one, depth) for key, one in value.items()}
    return on_curve(value, depth) if isinstance(value, tuple) else value


def as_curves(value: Any) -> Any:
    """Return a value with every list of numbers in it as a tuple."""
    if isinstance(value, Mapping):
        return {str(key): as_curves(one) for key, one in value.items()}
    return tuple(value) if is_curve(value) else value


def _as_lists(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _as_lists(one) for key, one in value.items()}
    return list(value) if isinstance(value, tuple) else value


def runs_over_layers(value: Any) -> bool:
    """Return whether a value of experts by name has a list of numbers for one of them."""
    return isinstance(value, Mapping) and any(is_curve(one) for one in value.values())


def is_curve(value: object) -> bool:
    """Return whether a value is a non-empty list of numbers."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) > 0
        and all(isinstance(each, int | float) and not isinstance(each, bool) for each in value)
    )
