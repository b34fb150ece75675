"""Python's values as overrides of the configuration, in the form that the command line has them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergelab.cli.quoting import parsed, quoted_text
from mergelab.errors import ConfigError, did_you_mean, listed, shortened

# Groups with options: a name chooses one, a mapping sets keys of it, and `name` in the mapping chooses as well.
GROUPS = ("method", "models", "task", "eval", "save", "tracking", "experiment", "sweep")
_PLAIN = re.compile(r"[\w./@+-]+")
_SPECIAL = re.compile(r"([\\()\[\]{}:=, \t])")


def overrides_of(settings: Mapping[str, Any]) -> list[str]:
    """Write settings as overrides.

    Args:
        settings: a group's option or a mapping of its keys, or the value of any key of the configuration, whose dots
            are part of its name (``"method.density"``).

    Raises:
        ConfigError: a value is nothing that a configuration can hold.
    """
    return [override for key, value in settings.items() for override in _of(key, value)]


def _of(key: str, value: Any) -> Iterator[str]:
    if key not in GROUPS or not isinstance(value, Mapping):
        yield f"{key}={text_of(value, key)}"
        return
    keys = {name_in(key, name): one for name, one in value.items()}
    if len(keys) < len(value):
        raise ConfigError(f"{key}: {listed(map(str, value))} has a key twice")
    if "name" in keys:
        yield f"{key}={text_of(keys.pop('name'), f'{key}.name')}"
    for name, one in keys.items():
        yield f"{key}.{name}={text_of(one, f'{key}.{name}')}"


def name_in(group: str, name: Any) -> str:
    """Return a key's name in the configuration: a method's ``lambda`` is ``lambda_`` in Python."""
    return str(name).removesuffix("_") if group == "method" else str(name)


def text_of(value: Any, key: str) -> str:
    """Write a value as an override has it.

    Text is taken as it stands. A positional override of `ml.run` is what refers to other keys.

    Raises:
        ConfigError: it is nothing that a configuration can hold.
    """
    value = value.item() if hasattr(value, "item") and not isinstance(value, type) and _is_scalar(value) else value
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str | Path):
        return _written(str(value))
    if isinstance(value, Mapping):
        pairs = (f"{_SPECIAL.sub(_escaped, str(name))}:{text_of(one, f'{key}.{name}')}" for name, one in value.items())
        return "{" + ",".join(pairs) + "}"
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return "[" + ",".join(text_of(one, key) for one in value) + "]"
    raise ConfigError(
        f"{key}={shortened(value)}: is a {type(value).__name__}, which a configuration cannot hold; models are given "
        "as hub ids or folders, other values as text, numbers, lists and mappings"
    )


def _written(text: str) -> str:
    """Write a text as it stands where Hydra reads that as the same text, else in quotes."""
    override = parsed(f"x={text}") if _PLAIN.fullmatch(text) else None
    return text if override is not None and override.value() == text else quoted_text(text)


def _escaped(found: re.Match[str]) -> str:
    return f"\\{found[1]}"


def _is_scalar(value: Any) -> bool:
    """Return whether a value is a single number of NumPy."""
    return getattr(value, "ndim", None) == 0


def space_of(params: Mapping[str, Any]) -> list[str]:
    """Write a search space as overrides: ``(low, high)`` is an interval, a list a choice, a text Hydra's own syntax.

    Raises:
        ConfigError: a range is none of these.
    """
    return [f"{key}={_range(key, value)}" for key, value in params.items()]


def _range(key: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, tuple) and len(value) == 2 and all(_is_number(each) for each in value):
        return f"interval({float(value[0])!r},{float(value[1])!r})"
    if isinstance(value, list) and value:
        return f"choice({','.join(text_of(each, key) for each in value)})"
    raise ConfigError(
        f"params[{key!r}]={shortened(repr(value))}: must be (low, high), a list of values, or text such as "
        "'tag(log,interval(1e-3,1.0))'"
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_known(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Raise `ConfigError` for a keyword that is not known."""
    for key in given:
        if key not in known:
            raise ConfigError(
                f"{where}: no such keyword {key!r}{did_you_mean(key, known)} (there are {listed(known, 20)})"
            )
