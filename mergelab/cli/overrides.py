"""Overrides that Hydra refuses, in one line each; and experts that a sweep's jobs leave out."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import Sweep
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, Node, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, InterpolationKeyError, OmegaConfBaseException

from mergelab.cli.quoting import instead, parsed
from mergelab.cli.schema import EXPERTS, no_expert
from mergelab.config import renamed
from mergelab.errors import did_you_mean, listed, nearest

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

_NO_NAME = "Config group override"  # how Hydra's error begins that an option's name is no text
_NO_GROUP = re.compile(r"Could not override '([^']+)'\.\s+No match in the defaults list")

_SEVERAL = re.compile(
    r"(?:Ambiguous value for argument|Sweep parameters) '(.*?)'(?:\n| requires --multirun)", re.DOTALL
)
_LAUNCHER = re.compile(r"hydra_plugins\.hydra_(\w+)_launcher\b")


def refusal(error: BaseException) -> str | None:
    """Return one line about an error of Hydra's composition; None for an error of another kind."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        group, _, name = error.missing_cfg_file.rpartition("/")
        options = [option for option in error.options if not option.startswith("_")]
        return f"{group}={name}: no such option{did_you_mean(name, options)} (there are {listed(options, 20)})"
    if isinstance(error, OverrideParseException):
        reason = (str(error).strip().splitlines() or ["cannot be read"])[0]
        return f"{error.override}: {reason}" + (f"; {instead(error.override)}" if "=" in error.override else "")
    if several := _SEVERAL.match(str(error).strip()):
        return f"{several[1]}: several values, which -m takes one after another; {instead(several[1])}"
    if isinstance(error, ValueError) and str(error).startswith(_NO_NAME) and (read := _variables(error, "__init__")):
        override, options = read["override"], read["repo"].get_group_options(read["override"].key_or_group)
        there_are = listed([option for option in options if not option.startswith("_")], 20)
        return f"{override.input_line}: must be the name of an option (there are {there_are})"
    composing = _variables(error, "_load_configuration_impl")
    applying = _variables(error, "_apply_overrides_to_config")
    if composing and applying:
        groups = composing["defaults_list"].overrides.known_choices
        return _refused(applying["override"], applying["cfg"], groups, error)
    if composing and (unknown := _NO_GROUP.match(str(error))):
        parent = unknown[1].rpartition("/")[0]
        known = [f"{parent}/{group}".lstrip("/") for group in composing["self"].list_groups(parent)]
        return f"{unknown[1]}: no such group{did_you_mean(unknown[1], known)} (there are {listed(known, 20)})"
    if isinstance(error, InterpolationKeyError):
        return no_such_reference(error)
    if (launcher := _launcher(error)) is not None:
        said = " ".join(str(error).split()) or type(error).__name__
        return f"hydra/launcher={launcher}: {said} (its settings are hydra.launcher.KEY=VALUE)"
    of_flags = _frames(error)[-1].f_code.co_name == "_run_hydra" and isinstance(error, ValueError)
    known_kind = of_flags or isinstance(error, HydraException | OmegaConfBaseException)
    return " ".join(str(error).split()) if known_kind else None


def _launcher(error: BaseException) -> str | None:
    """Return the name of the launcher that refused its settings or its machine; None for an error from elsewhere."""
    modules = [str(frame.f_globals.get("__name__")) for frame in _frames(error)]
    names = [match[1] if (match := _LAUNCHER.match(module)) else None for module in modules]
    if not any(names) or (isinstance(error, OSError) and error.filename is not None):
        return None
    last = max(place for place, name in enumerate(names) if name)
    return None if any(module.partition(".")[0] == "mergelab" for module in modules[last:]) else names[last]


def no_such_reference(error: InterpolationKeyError) -> str:
    """Return one line about a value that refers to a key that does not exist, and how to write it as text."""
    key, parent = str(error.full_key), error.parent_node
    said = " ".join(str(error).split()).partition(" full_key:")[0]
    node = parent._get_node(error.key) if isinstance(parent, DictConfig) else None
    value = node._value() if isinstance(node, Node) else None
    return f"{key}={value}: {said}; {instead(f'{key}={value}')}" if isinstance(value, str) else f"{key}: {said}"


def _frames(error: BaseException) -> list[FrameType]:
    """List the calls that ``error`` passed through, the outermost first."""
    return [frame for frame, _ in traceback.walk_tb(error.__traceback__)]


def _variables(error: BaseException, function: str) -> Mapping[str, Any] | None:
    """Return the variables of the innermost call of ``function`` that ``error`` passed through.

    Hydra's errors do not carry what was composed when an override was refused.
    """
    calls = [frame for frame in _frames(error) if frame.f_code.co_name == function]
    return calls[-1].f_locals if calls else None


def _refused(override: Override, config: DictConfig, groups: Mapping[str, str | None], error: BaseException) -> str:
    """Explain why ``override`` does not apply to ``config``, which is composed up to there from ``groups``."""
    key, line = str(override.key_or_group), str(override.input_line)
    parent, _, name = key.rpartition(".")
    for above in _parents(key):
        if OmegaConf.is_list(OmegaConf.select(config, above, throw_on_missing=False)):
            entry = ".".join(key.split(".")[: above.count(".") + 2])
            how = f"write {EXPERTS}={{NAME: REFERENCE, ...}}" if above == EXPERTS else "write the whole list"
            return f"{entry}: {above} is a list here, whose entries cannot be set by name; {how}"
    value = override.value()
    if isinstance(value, dict) and (ranges := [str(name) for name, one in value.items() if isinstance(one, Sweep)]):
        return f"{line}: a range within braces is text, {{{ranges[0]}: '...'}}; or write {ranges[0]}=... by itself"
    cause = error.__cause__
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and cause.full_key:
        unknown = str(cause.full_key)  # may be above the override's key, or below it
        return _unknown(key if key.startswith(f"{unknown}.") else unknown, value, config, groups)
    if override.is_delete() and OmegaConf.select(config, key, throw_on_missing=False) is None:
        missing = f"{key}: {no_expert(name, config.models.experts)}" if parent == EXPERTS else None
        return f"~{missing or _unknown(key, None, config, groups)}"
    said = " ".join(str(error).split()) if cause is None else str(cause).splitlines()[0]
    return said if isinstance(error, HydraException) and cause is None else f"{line}: {said}"


def _unknown(key: str, value: object, config: DictConfig, groups: Mapping[str, str | None]) -> str:
    """Say that ``config`` has no ``key``, and what it has that is like it."""
    known = list(_keys(config))
    sweeper = "hydra.sweeper."  # takes the same keys as sweep
    as_sweep = [name.replace(sweeper, "sweep.", 1) for name in known]
    if (line := renamed(key.replace(sweeper, "sweep.", 1), value, as_sweep)) is not None:
        return line
    group = key.partition(".")[0]
    if groups.get(group, "") is None:
        return f"{key}: no {group} is chosen; {group}=NAME chooses one (--help lists them)"
    parent = next((name for name in reversed(_parents(key)) if name in known), "")
    siblings = [name for name in known if name.rpartition(".")[0] == parent]
    hint = f"; did you mean {near!r}?" if (near := _nearest_key(key, known, groups)) else ""
    return f"{key}: no such key{hint or f' (there are {listed(siblings, 20)})'}"


def _nearest_key(key: str, known: Sequence[str], groups: Iterable[str]) -> str | None:
    """Return the key most like one that does not exist: a sibling, a key of its name elsewhere, or any."""
    parent, _, name = key.rpartition(".")
    if parent and parent not in known:
        return nearest(key, known)
    siblings = {each.rpartition(".")[2]: each for each in known if each.rpartition(".")[0] == parent}
    if not parent:
        siblings |= {group: group for group in groups}
    if near := nearest(name, siblings):
        return siblings[near]
    return next((each for each in known if each.rpartition(".")[2] == name and not each.startswith("hydra.")), None)


def _parents(key: str) -> list[str]:
    """List the keys above ``key``, the outermost first."""
    return [key[:at] for at, letter in enumerate(key) if letter == "."]


def _keys(node: Any, prefix: str = "") -> Iterator[str]:
    """Yield every key below ``node``, as an override names it."""
    if isinstance(node, DictConfig) and not (node._is_none() or node._is_missing() or node._is_interpolation()):
        keys: list[Any] = list(node)
        for key in keys:
            yield f"{prefix}{key}"
            yield from _keys(node._get_node(key), f"{prefix}{key}.")


# --------------------------------------------------------------------------------- experts that a sweep's jobs omit


def in_jobs(arguments: Sequence[str]) -> list[str]:
    """Take from a sweep's ``arguments`` what leaves experts out, where its jobs may have other experts than itself.

    Hydra composes the sweep itself with the default choice of a group that the sweep varies, and applies every override
    of one value to that. What is taken here is given to `LeftOut`.
    """
    readable = [(argument, override) for argument in arguments if (override := parsed(argument)) is not None]
    left = {argument for argument, override in readable if _leaves_out(override)}
    if not left or not any(_brings_experts(override) for _, override in readable):
        return list(arguments)
    own = [argument for argument, override in readable if not override.is_hydra_override()]
    moved = ",".join(f"[{at},'{argument}']" for at, argument in enumerate(own) if argument in left)
    return [argument for argument in arguments if argument not in left] + [f"hydra.callbacks.left_out.given=[{moved}]"]


def _brings_experts(override: Override) -> bool:
    """Return whether an override may give each job another set of experts; a sweep's own file may vary groups too."""
    key = str(override.key_or_group)
    varies_set = key == EXPERTS or ("." not in key and key != "method")
    return key in ("sweep", "experiment") or (override.is_sweep_override() and varies_set)


def _leaves_out(override: Override) -> bool:
    parent, _, name = str(override.key_or_group).rpartition(".")
    return parent == EXPERTS and bool(name) and override.value() is None


class LeftOut(Callback):
    """Hydra callback that hands to a sweep's jobs the overrides that `in_jobs` took.

    Args:
        given: the position of each among the sweep's overrides, and the override.
    """

    def __init__(self, given: Sequence[tuple[int, str]] = ()) -> None:
        self.given = given

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Add them to the jobs' overrides, and apply them to the sweep's own experts where it has these."""
        for at, argument in self.given:
            config.hydra.overrides.task.insert(at, argument)
            override = parsed(argument)
            if override is not None and isinstance(config.models.experts, DictConfig):
                config.models.experts.pop(str(override.key_or_group).rpartition(".")[2], None)
