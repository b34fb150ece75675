"""The command that repeats a run, from the configuration that the run has recorded."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mergelab.config import CONF_DIR
from mergelab.tracking import names
from mergelab.tracking.values import flatten

if TYPE_CHECKING:
    from mergelab.report.selection import LoggedRun

_PROGRAM = "python -m mergelab"
# Groups in the order in which they are chosen; a task brings models, which may be others.
_GROUPS = ("method", "task", "models")
# Where something is recorded or written is not part of what is repeated.
_ELSEWHERE = ("tracking", "output", "hydra", "experiment", "sweep")
_OF_SWEEPS = (names.SAMPLER, names.PRUNER, names.OBJECTIVE, names.SPACE)
_WHOLE = ("models.experts", "models.base", "task.splits")  # mappings that take the place of the default's
_PLAIN = re.compile(r"[A-Za-z_./][\w./@+-]*")  # text that Hydra's grammar reads as it is
_WORDS = frozenset({"null", "true", "false", "nan", "inf"})
_CUT = "… sha256 "  # how a value ends that was too long to be recorded


class Commands:
    """Writes commands; what is composed for a choice of groups is composed once.

    Args:
        configuration: returns what a run was composed of; empty where that is not known.
    """

    def __init__(self, configuration: Callable[[LoggedRun], Mapping[str, Any]]) -> None:
        self._configuration = configuration
        self._composed: dict[tuple[str, ...], dict[str, Any] | None] = {}
        self._known: dict[str, str | None] = {}

    def of(self, run: LoggedRun) -> str | None:
        """Return the command that merges and measures what ``run`` did, on its own; None where that is not recorded.

        A trial's is that of one experiment at its point. What was made with the embedded miniature asks for it.
        """
        if run.record.id not in self._known:
            self._known[run.record.id] = self._of(run)
        return self._known[run.record.id]

    def _of(self, run: LoggedRun) -> str | None:
        recorded = dict(self._configuration(run))
        if not isinstance(recorded.get("method"), Mapping):
            return None
        if run.record.tags.get(names.SOURCE) == "mini":
            recorded["source"] = "mini"
        choices = [f"{group}={name}" for group in _GROUPS if (name := _ready(group, recorded))]
        known = self._defaults(tuple(choices))
        if known is None:
            return None
        overrides = [*choices, *(f"{key}={spelled(value)}" for key, value in _differences(known, recorded))]
        return " ".join([_PROGRAM, *(shlex.quote(each) for each in overrides)])

    def _defaults(self, choices: tuple[str, ...]) -> dict[str, Any] | None:
        if choices not in self._composed:
            self._composed[choices] = _compose(choices)
        return self._composed[choices]


def sweep_command(run: LoggedRun) -> str | None:
    """Return the command that a sweep or a grid was started with; None where its folder is not there any more."""
    folder = run.record.tags.get(names.RUN_FOLDER) or run.record.tags.get(names.SWEEP_DIR)
    file = Path(folder, "multirun.yaml") if folder else None
    if file is not None and file.is_file():
        try:
            typed = OmegaConf.to_container(OmegaConf.load(file).hydra.overrides, resolve=False)
            if isinstance(typed, dict):
                given = [*typed.get("hydra", []), *typed.get("task", [])]
                shown = [each for each in given if not str(each).startswith("hydra.mode=")]
                return " ".join([f"{_PROGRAM} -m", *(shlex.quote(str(each)) for each in shown)])
        except (OSError, OmegaConfBaseException, AttributeError, ValueError):
            pass
    overrides = run.record.params.get(names.OVERRIDES)
    return f"{_PROGRAM} -m {overrides}" if overrides else None


def at_point(config: Mapping[str, Any], trial: Mapping[str, str], keys: Iterable[str]) -> dict[str, Any]:
    """Return a sweep's configuration with the values that a trial's parameters have for the swept ``keys``."""
    found: dict[str, Any] = {key: value for key, value in config.items() if key not in _OF_SWEEPS}
    for key in keys:
        if key not in trial:  # as the files of the configuration have it
            continue
        *above, last = key.split(".")
        node = found
        for name in above:
            node[name] = dict(node.get(name) or {})
            node = node[name]
        node[last] = _read(trial[key])
    return found


def nested(params: Mapping[str, str]) -> dict[str, Any]:
    """Build the configuration that parameters like ``method.density`` were made of, lists and numbers included.

    Empty where a value was too long to be recorded whole.
    """
    if any(_CUT in text for text in params.values()):
        return {}
    tree: dict[str, Any] = {}
    for name, text in params.items():
        *above, last = name.split(".")
        node = tree
        for key in above:
            inner = node.setdefault(key, {})
            node = inner if isinstance(inner, dict) else {}
        node.setdefault(last, _read(text))
    return {key: _with_lists(value) for key, value in tree.items()}


def _with_lists(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    inner = {key: _with_lists(one) for key, one in value.items()}
    numbered = [str(place) for place in range(len(inner))]
    return list(inner.values()) if inner and list(inner) == numbered else inner


def _read(text: str) -> Any:
    """Read a parameter: JSON where it is that, else text; ``NaN`` and the like are text."""
    try:
        return json.loads(text, parse_constant=str)
    except ValueError:
        return text


def _ready(group: str, recorded: Mapping[str, Any]) -> str | None:
    """Return the option of a group that a configuration was made from, if there is a file for it."""
    node = recorded.get(group)
    name = str(node.get("name", "")) if isinstance(node, Mapping) else ""
    return name if name and re.fullmatch(r"\w+", name) and (CONF_DIR / group / f"{name}.yaml").is_file() else None


def _compose(choices: tuple[str, ...]) -> dict[str, Any] | None:
    """Compose the configuration of a choice of groups alone; None where Hydra refuses it."""
    try:
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            config = compose("config", overrides=list(choices))
            parts = {str(key): config[key] for key in config if key not in _ELSEWHERE}
            found: Any = {
                key: OmegaConf.to_container(part, resolve=True) if OmegaConf.is_config(part) else part
                for key, part in parts.items()
            }
            return dict(found)
    except (HydraException, OmegaConfBaseException):
        return None


def _differences(known: Mapping[str, Any], recorded: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the keys whose recorded values are not those that are composed anyway."""
    for key, value in recorded.items():
        path = f"{above}{key}"
        if path in _ELSEWHERE or path in ("method.name", "task.name", "models.name"):
            continue
        default = known.get(key)
        if type(value) is type(default) and value == default:
            continue
        if isinstance(value, Mapping) and value and isinstance(default, Mapping) and path not in _WHOLE:
            yield from _differences(default, value, f"{path}.")
        elif flatten({"value": value}) != flatten({"value": default}):
            yield (path if key in known else f"+{path}"), value


def spelled(value: Any) -> str:
    """Spell a value in Hydra's grammar of overrides."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{spelled(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(spelled, value)) + "]"
    text = str(value)
    if _PLAIN.fullmatch(text) and text.lower() not in _WORDS:
        return text
    marked = re.sub(r"(\\*)'", lambda found: found[1] * 2 + "\\'", text)
    trailing = len(marked) - len(marked.rstrip("\\"))
    return "'" + (marked + "\\" * trailing).replace("${", "\\${") + "'"
