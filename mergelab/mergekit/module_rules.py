"""Parameters of mergekit's modules as rules by tensor name: of the rules that fit a tensor the first counts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from mergelab.errors import ConfigError, listed
from mergelab.mergekit.methods import Method
from mergelab.mergekit.settings import Settings, escaped, filter_of, pattern

_WEIGHTS, _MATCH = "weights", "match"
_NUMBER = re.compile(r"(.*?)\.(\d+)\.")


@dataclass(frozen=True)
class Region:
    """The tensors that some of a merge's parameters are for: those of a module, or of some of its layers.

    Attributes:
        prefixes: what their names begin with; none for those that are in no other module.
        names: the module's tensors.
        layers: the first layer and the one after the last, as a rule has them.
    """

    prefixes: tuple[str, ...]
    names: tuple[str, ...]
    layers: tuple[int | None, int | None] = (None, None)

    @property
    def unordered(self) -> list[str]:
        """The tensors whose names have a number that counts no layers, as that of a part of an MLP."""
        numbered = {name: (match[1], int(match[2])) for name in self.names if (match := _NUMBER.match(name))}
        numbers: dict[str, set[int]] = {}
        for start, number in numbered.values():
            numbers.setdefault(start, set()).add(number)
        return [name for name, (start, _) in numbered.items() if len(numbers[start]) <= max(numbers[start])]

    def rules(self, match: str, values: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the rules that set values for those of the tensors that fit a filter's pattern, or ``*``."""
        layers = {} if self.layers == (None, None) else {"layers": list(self.layers)}
        return [{_MATCH: each, **layers, **values} for each in self._matches(match)]

    def _matches(self, match: str) -> list[str]:
        if not self.prefixes:
            return [match]
        text = filter_of(match)
        if text is None:
            return [f"{escaped(prefix)}*" for prefix in self.prefixes]
        both = list(dict.fromkeys(found for prefix in self.prefixes for found in _within(prefix, text)))
        return [each for each in both if any(fnmatchcase(name, each) for name in self.names)] or both[-1:]


def _within(prefix: str, text: str) -> Iterator[str]:
    """Yield the patterns for names that begin with ``prefix`` and have ``text`` in them."""
    if text in prefix:
        yield f"{escaped(prefix)}*"
        return
    for length in range(1, len(text)):
        if prefix.endswith(text[:length]):
            yield f"{escaped(prefix + text[length:])}*"
    yield escaped(prefix) + pattern(text)


def joined(
    found: Sequence[Settings], regions: Sequence[Region], method: Method, experts: Sequence[str], where: str
) -> Settings:
    """Return the parameters of all modules as those of one merge: what is the same for all, and rules for the rest.

    Args:
        found: the parameters in each region.
        regions: the tensors that each is for; where two have one in common, the first counts.
        method: the method.
        experts: all of them by name; one that a region lacks has the weight 0 there.
        where: what messages call the config.

    Raises:
        ConfigError: a parameter differs between modules and has values by filters alone in one of them; or a list runs
            over what are no layers.
    """
    keys = dict.fromkeys(key for each in found for key in _keys(each))
    # Lists run over each slice's layers, and so differ between a sliced module and the others.
    listed_by_slice = any(each.layers != (None, None) for each in regions) and any(each.has_lists for each in found)
    differing = [key for key in keys if listed_by_slice or any(_of(each, key) != _of(found[0], key) for each in found)]
    shared = Settings(
        {key: value for key, value in found[0].values.items() if key not in differing},
        [rule for rule in found[0].rules if not rule.keys() & {*differing}],
        [key for key in found[0].required if key.partition(".")[0] not in differing],
    )
    rules: list[dict[str, Any]] = []
    for each, region in zip(found, regions, strict=True):
        if needed := [key for key in each.required if key.partition(".")[0] in differing]:
            raise ConfigError(
                f"{where}: modules: {needed[0]} differs, and needs a value without filter in each of them"
            )
        if each.has_lists and (odd := region.unordered):
            raise ConfigError(
                f"{where}: modules: a list of numbers runs over layers, and {listed(odd)} are in none; give their "
                "module single numbers"
            )
        values = {key: _for_all(key, each.values[key], method, experts) for key in differing}
        for rule in each.rules:
            if rule.keys() & {*differing}:
                rules += region.rules(rule[_MATCH], {key: value for key, value in rule.items() if key != _MATCH})
        if not region.prefixes:
            shared.values |= values
        if values and region.rules("*", {}) != [{_MATCH: "*"}]:
            rules += region.rules("*", values)
    return Settings(shared.values, [*rules, *shared.rules], shared.required)


def _keys(settings: Settings) -> list[str]:
    ruled = (key for rule in settings.rules for key in rule if key != _MATCH)
    return [*settings.values, *ruled, *(key.partition(".")[0] for key in settings.required)]


def _of(settings: Settings, key: str) -> tuple[object, ...]:
    rules = [rule for rule in settings.rules if key in rule]
    return settings.values.get(key), rules, [each for each in settings.required if each.partition(".")[0] == key]


def _for_all(key: str, value: Any, method: Method, experts: Sequence[str]) -> Any:
    """Return numbers by expert with one for each: an expert that is not there has the weight 0 and the defaults."""
    if not isinstance(value, Mapping):
        return value
    default = 0.0 if key == _WEIGHTS else next(each.default for each in method.settings if each.ours == key)
    return {name: value.get(name, default) for name in experts}
