"""A mergekit config on the command line: as overrides of the config here, and as a file of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergelab.errors import ConfigError, listed, one_line
from mergelab.mergekit.document import load
from mergelab.mergekit.stages import translate_stages
from mergelab.mergekit.translate import DTYPE, Translation
from mergelab.report.commands import spelled

KEY, STRICT = "mergekit", "strict"
_METHOD = "method."


def expanded(arguments: Sequence[str], searched: Callable[[str], Collection[str]] = lambda _name: ()) -> list[str]:
    """Put, in the place of ``mergekit=FILE`` among a command's arguments, the overrides that the file stands for.

    They come first, so that every other argument can change them. A sweep's search space takes the place of the file's
    values, as of an experiment's. What mergekit passes over is said on standard error; with ``strict=true`` it is an
    error.

    Args:
        arguments: the command's.
        searched: returns the keys that a ready sweep, by its name, sets or varies.

    Raises:
        ConfigError: the file is no mergekit config, or cannot be merged here to the same numbers.
    """
    prefix = f"{KEY}="
    files = [argument.removeprefix(prefix) for argument in arguments if argument.startswith(prefix)]
    if not files:
        return list(arguments)
    if len(files) > 1:
        raise ConfigError(f"{KEY}: given {len(files)} times; one file is one merge")
    strict = is_strict(arguments)
    rest = [each for each in arguments if not each.startswith((prefix, f"{STRICT}="))]
    found = read(files[0], strict=strict)
    sweeps = [each.partition("=")[2] for each in arguments if each.startswith("sweep=")]
    typed = {each.lstrip("+~").partition("=")[0] for each in rest}
    return [*overrides(_to_sweep(found, {*searched(sweeps[-1])} - typed) if sweeps else found), *rest]


def _to_sweep(found: Translation, keys: Collection[str]) -> Translation:
    """Return a translation without the method's values that a sweep searches; say which these are.

    Args:
        found: the translation.
        keys: what the sweep searches, as ``method.lambda``.
    """
    own = {key.removeprefix(_METHOD) for key in keys if key.startswith(_METHOD)}
    if values := [f"{key}={spelled(value)}" for key, value in found.method.items() if key in own]:
        sys.stderr.write(f"{one_line(f'note: the sweep searches in place of the config: {listed(values)}')}\n")
    if ruled := sorted(own & {key for rule in found.method.get("rules", ()) for key in rule}):
        line = f"note: the config's filters set {listed(ruled)} where they fit; the sweep varies the other tensors"
        sys.stderr.write(f"{one_line(line)}\n")
    method = {key: value for key, value in found.method.items() if key not in own}
    if "required" in method:
        method["required"] = [key for key in method["required"] if key.partition(".")[0] not in own]
    return replace(found, method=method)


def is_strict(arguments: Sequence[str]) -> bool:
    """Return whether ``strict=true`` is among arguments."""
    given = [each.partition("=")[2].lower() for each in arguments if each.startswith(f"{STRICT}=")]
    if odd := [value for value in given if value not in ("true", "false")]:
        raise ConfigError(f"{STRICT}={odd[0]}: must be true or false")
    return given[-1:] == ["true"]


def read(file: str, *, strict: bool = False) -> Translation:
    """Read a file of a merge, with its stages in further documents, and say what in it has no effect.

    Raises:
        ConfigError: as for `expanded`.
    """
    found = translate_stages(load(file), file, Path(file).stem)
    for note in found.notes:
        if strict and f": {DTYPE}" not in note:
            raise ConfigError(f"{note} (strict=true)")
        sys.stderr.write(f"{one_line(f'note: {note}')}\n")
    return found


def overrides(found: Translation) -> list[str]:
    """Return a translation as overrides of the config here."""
    method = {key: value for key, value in found.method.items() if key != "name"}
    groups = {"models": found.models, "method": method, "save": found.save}
    lines = [f"method={found.method['name']}", "models=custom"]
    for group, values in groups.items():
        for key, value in values.items():
            if value is not None or key == "base":
                lines.append(f"{group}.{key}={spelled(value)}")
    return lines


def as_config(found: Translation) -> dict[str, Any]:
    """Return a translation as a file of the group ``experiment`` has it."""
    return {
        "defaults": [{"override /method": found.method["name"]}, {"override /models": "custom"}],
        "models": {key: value for key, value in found.models.items() if value is not None},
        "method": {key: value for key, value in found.method.items() if key != "name"},
        "save": found.save,
    }


def text_of(found: Translation, file: str) -> str:
    """Write a translation as the file of an experiment: for the folder ``experiment`` of a ``--config-dir``."""
    import yaml  # type: ignore[import-untyped]

    class Dumper(yaml.SafeDumper):  # type: ignore[misc]
        """Writes lists of numbers on one line, and no references."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    def listed(dumper: Any, data: list[Any]) -> Any:
        flat = all(isinstance(each, int | float | None) for each in data)
        return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=flat)

    Dumper.add_representer(list, listed)
    body = yaml.dump(as_config(found), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)
    return f"# @package _global_\n# {one_line(file)}, a config of mergekit\n{body}"
