"""Classes that a setting names: Optuna's by short names, any other by its dotted path."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mergelab.errors import SweepError, did_you_mean, listed


@dataclass(frozen=True)
class Known:
    """What a short name stands for.

    Attributes:
        path: the class's dotted path.
        options: the defaults of its keyword arguments, where they are others than the class's own.
    """

    path: str
    options: Mapping[str, Any] = field(default_factory=dict)


def named(setting: str | dict[str, Any], what: str, known: Mapping[str, Known | None]) -> tuple[str, dict[str, Any]]:
    """Split ``tpe`` or ``{name: tpe, n_startup_trials: 20}`` into the name and the options.

    The dotted path of a class that has a short name becomes that name.

    Raises:
        SweepError: the name is neither known nor a dotted path.
    """
    options = dict(setting) if isinstance(setting, dict) else {"name": setting}
    name = str(options.pop("name", None))
    name = next((short for short, entry in known.items() if entry is not None and entry.path == name), name)
    if name not in known and not _is_dotted_path(name):
        raise SweepError(
            f"sweep.{what}={name}: no such {what}{did_you_mean(name, known)} (there are {listed(known)}; or the dotted "
            "path of a class)"
        )
    return name, options


def load_class(path: str, what: str, base: type[Any]) -> type[Any]:
    """Import the subclass of ``base`` that a dotted path names; modules in the working folder can be found.

    Raises:
        SweepError: there is no such module or class, its module fails to import, or it is not a subclass.
    """
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    module_name, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise SweepError(f"sweep.{what}={path}: importing {module_name} fails: {reason}") from error
    found = getattr(module, name, None)
    if found is None:
        hint = did_you_mean(name, vars(module))
        raise SweepError(f"sweep.{what}={path}: {module_name} has no {name!r}{hint}")
    if not (isinstance(found, type) and issubclass(found, base)):
        raise SweepError(f"sweep.{what}={path}: is not a subclass of optuna's {base.__name__}")
    return found


def make(cls: type[Any], name: str, what: str, options: Mapping[str, Any]) -> Any:
    """Create an object of a class with the options of the setting that names it.

    Raises:
        SweepError: the class refuses an option or its value.
    """
    try:
        return cls(**options)
    except (TypeError, ValueError) as error:
        raise SweepError(f"sweep.{what}={name}: {error}") from None


def _is_dotted_path(name: str) -> bool:
    return "." in name and all(part.isidentifier() for part in name.split("."))
