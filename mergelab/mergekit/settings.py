"""A method's parameters in mergekit's config, as values and rules here.

mergekit looks for a parameter from the nearest level to the farthest (a model's, its slice's, the config's), and takes
the first filter that is a part of the tensor's name. Here that is a value, and rules of which the first counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mergelab.errors import ConfigError, shortened
from mergelab.mergekit.document import Levels, MergeDocument, Slice
from mergelab.mergekit.methods import ONLY_DEFAULT, REQUIRED, Method, Setting

_MISSING = object()


@dataclass(frozen=True)
class Chain:
    """What a parameter is for a tensor: the value of the first filter that fits, or else the fallback."""

    filters: tuple[tuple[str, Any], ...]
    fallback: Any


@dataclass
class Settings:
    """Values and rules, in the form of the config here.

    Attributes:
        values: by config key.
        rules: of which the first counts.
        required: what has no value where no rule fits: "t", "weights.a".
    """

    values: dict[str, Any] = field(default_factory=dict)
    rules: list[dict[str, Any]] = field(default_factory=list)
    required: list[str] = field(default_factory=list)

    @property
    def varies(self) -> bool:
        """Whether a value differs between tensors."""
        return bool(self.rules) or any(_is_curve(value) for value in self.values.values())

    @property
    def has_lists(self) -> bool:
        """Whether a value, or that of a filter, is a list over the layers."""
        return any(map(_is_curve, [*self.values.values(), *(value for rule in self.rules for value in rule.values())]))

    def as_config(self) -> dict[str, Any]:
        """Return them as a group ``method`` has them."""
        found = dict(self.values)
        if self.rules:
            found["rules"] = self.rules
        if self.varies:
            found["rules_as"] = "mergekit"
        return found | ({"required": self.required} if self.required else {})


def settings_of(document: MergeDocument, part: Slice, method: Method, experts: Mapping[str, str]) -> Settings:
    """Return the method's parameters for one slice.

    Args:
        document: the config.
        part: the slice.
        method: the method.
        experts: the names here of the slice's models, by their references; none for a base.

    Raises:
        ConfigError: a value is missing, or is none that the method can take.
    """
    found, where = Settings(), part.named(document.where)
    for setting in method.settings:
        if setting.by_expert and method.most != 1:
            _by_expert(found, setting, where, part, experts)
            continue
        levels = part.levels
        if setting.by_expert:
            levels = (part.sources[0].parameters, *levels)
        chain = _chain(setting, levels, where)
        _add(found, setting, chain)
    for key, only in ONLY_DEFAULT.get(document.method, {}).items():
        if any(level.get(key, only) != only for level in part.levels):
            raise ConfigError(f"{where}: {key}: {document.method} is merged here with {key}: {only} alone")
    return found


def _add(found: Settings, setting: Setting, chain: Chain) -> None:
    if chain.fallback is _MISSING:
        found.required.append(setting.ours)
    elif chain.fallback is not None:
        found.values[setting.ours] = chain.fallback
    found.rules += [{"match": pattern(text), setting.ours: value} for text, value in chain.filters]


def _by_expert(found: Settings, setting: Setting, where: str, part: Slice, experts: Mapping[str, str]) -> None:
    """Add a parameter of which each model has its own."""
    chains = {
        experts[source.model]: _chain(setting, (source.parameters, *part.levels), f"{where}: {source.model}")
        for source in part.sources
        if source.model in experts
    }
    values = {name: chain.fallback for name, chain in chains.items() if chain.fallback is not _MISSING}
    found.required += [f"{setting.ours}.{name}" for name in chains if name not in values]
    alike = {repr(chain.filters) for chain in chains.values()}
    if setting.ours != "weights" and len({repr(value) for value in values.values()}) == 1 and len(alike) == 1:
        _add(found, setting, next(iter(chains.values())))
        return
    if values:
        found.values[setting.ours] = values
    if len({tuple(text for text, _ in chain.filters) for chain in chains.values()}) == 1:
        first = next(iter(chains.values())).filters
        for at, (text, _) in enumerate(first):
            own = {name: chain.filters[at][1] for name, chain in chains.items()}
            found.rules.append({"match": pattern(text), setting.ours: own})
        return
    for name, chain in chains.items():
        found.rules += [{"match": pattern(text), setting.ours: {name: value}} for text, value in chain.filters]


def _chain(setting: Setting, levels: Levels, where: str) -> Chain:
    """Go through the levels until one has a value for all tensors."""
    filters: list[tuple[str, Any]] = []
    for level in levels:
        for text, value in _entries(level.get(setting.theirs), f"{where}: {setting.theirs}"):
            if value is None or value == []:
                continue
            taken = _value(setting, value, f"{where}: {setting.theirs}")
            if text is None:
                return Chain(tuple(filters), taken)
            filters.append((text, taken))
    if setting.default is not REQUIRED:
        default = setting.default
        return Chain(tuple(filters), default if default is None else _value(setting, default, where))
    if not filters:
        raise ConfigError(f"{where}: needs {setting.theirs}, under parameters")
    return Chain(tuple(filters), _MISSING)


def _entries(setting: Any, where: str) -> Iterator[tuple[str | None, Any]]:
    """Yield the filters of a setting, each with its value; None for what holds for all tensors."""
    if isinstance(setting, Mapping):
        setting = [setting]
    if (
        not isinstance(setting, Sequence)
        or isinstance(setting, str)
        or not any(isinstance(e, Mapping) for e in setting)
    ):
        yield None, setting
        return
    for entry in setting:
        if not isinstance(entry, Mapping) or "value" not in entry:
            raise ConfigError(f"{where}={shortened(repr(entry))}: must be {{filter: …, value: …}} as the others")
        text = entry.get("filter")
        yield None if text in (None, "*") else str(text), entry["value"]


def _value(setting: Setting, value: Any, where: str) -> Any:
    """Return a value as it is here: a number, a list of them over the layers, or what a flag stands for."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        if setting.values is not None:
            raise ConfigError(f"{where}={value}: cannot differ between layers here")
        return [_number(setting, each, where) for each in value]
    if setting.values is None:
        return _number(setting, value, where)
    flag = {"true": True, "false": False}.get(str(value).lower(), value)
    if flag not in (True, False):
        raise ConfigError(f"{where}={value}: must be true or false")
    return setting.values[int(flag)]


def _number(setting: Setting, value: Any, where: str) -> float | int:
    """Read a number; YAML reads 1e-5 as text."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{where}={value!r}: must be a number") from None
    return int(number) if isinstance(setting.default, int) and not isinstance(setting.default, bool) else number


def pattern(text: str) -> str:
    """Return the shell-style pattern for names that have ``text`` in them."""
    return f"*{escaped(text)}*"


def escaped(text: str) -> str:
    """Return the shell-style pattern for ``text`` itself."""
    return re.sub(r"([*?[])", r"[\1]", text)


def filter_of(match: str) -> str | None:
    """Return the text that names must have in them to fit a pattern; None where it asks for more than that."""
    text = re.sub(r"\[([*?[])\]", r"\1", match[1:-1])
    return text if text and pattern(text) == match else None


def _is_curve(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, Mapping) and any(map(_is_curve, value.values())))
