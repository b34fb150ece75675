"""Stages: merges that come before the one that the rest of the configuration describes, and are models in it.

``models.stages.NAME`` is a merge of its own, with a method; NAME then stands for its result wherever a model may be
named, in other stages too. In place of the merge there may be the folder that holds its result.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from mergelab.config import ExperimentConfig, ModelsConfig, check, local_path
from mergelab.engine.registry import method_config
from mergelab.errors import ConfigError, MergelabError, listed, nearest, shortened

if TYPE_CHECKING:
    from omegaconf import DictConfig

KEY = "models.stages"
OF_SAVE = ("dtype", "tokenizer", "chat_template")  # keys of a stage that are keys of `save`
_NAME = re.compile(r"[A-Za-z_][\w-]*")
_REFERENCES = ("reference", "encoder", "decoder", "stack", "model")  # keys below which models are named


class StageConfig(ModelsConfig):
    """One stage: its models as a merge has them, its method, and how its result is written."""

    name: str = ""
    method: dict[str, Any]
    """Its name and its parameters."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """As ``save.dtype``."""
    tokenizer: str | None = None
    """As ``save.tokenizer``."""
    chat_template: str | None = None
    """As ``save.chat_template``."""


def with_made_stages(config: ExperimentConfig) -> ExperimentConfig:
    """Put the folders of stages that are made in the places of their names; the others stay.

    Raises:
        ConfigError: stages need each other, one has a name that is no name, that of a folder or of a key.
    """
    stages = config.models.stages
    if not stages:
        return config
    _check_names(config.models)
    folders = {name: each for name, each in stages.items() if isinstance(each, str)}
    named = {key: getattr(config.models, key) for key in ("base", "experts")}
    models = config.models.model_copy(update=_checked(with_folders(_dumped(named), folders)))
    left = {name: each for name, each in stages.items() if name not in folders}
    return config.model_copy(update={"models": models.model_copy(update={"stages": left or None})})


def in_order(models: ModelsConfig) -> list[str]:
    """Return the names of the stages that are to be made, each after those that it needs.

    Raises:
        ConfigError: stages need each other.
    """
    stages = models.stages or {}
    needed = {name: _needed(each, stages) for name, each in stages.items() if not isinstance(each, str)}
    found: list[str] = []

    def add(name: str, above: Sequence[str]) -> None:
        if name in above:
            circle = " → ".join([*above[above.index(name) :], name])
            raise ConfigError(f"{KEY}: {circle}: a stage cannot need itself")
        if name in needed and name not in found:
            for each in needed[name]:
                add(each, [*above, name])
            found.append(name)

    for name in needed:
        add(name, [])
    return found


def stage_experiment(
    resolved: Mapping[str, Any], name: str, folders: Mapping[str, str], output: str | None = None
) -> DictConfig:
    """Return the configuration of a stage as an experiment of its own.

    Args:
        resolved: the whole configuration.
        name: the stage's.
        folders: those of the stages before it.
        output: its own folder.

    Raises:
        ConfigError: a setting of the stage is not usable.
    """
    from omegaconf import OmegaConf

    stage = check(StageConfig, resolved["models"]["stages"][name], f"{KEY}.{name}")
    if stage.stages:
        raise ConfigError(f"{KEY}.{name}.stages: a stage has none of its own; write them beside it")
    own = stage.model_dump(exclude={"method", "stages", *OF_SAVE}) | {"name": stage.name or name}
    method = {**method_config(str(stage.method.get("name"))), **stage.method}
    save = {**resolved["save"], **{key: getattr(stage, key) for key in OF_SAVE}, "form": "dense"}
    save |= {"rank": None, "energy": None, "library": None, "push_to_hub": None}
    changed = {
        "models": with_folders(own, folders),
        "method": method,
        "save": save,
        "evaluate": False,
        "output": output,
        "tracking": {**resolved["tracking"], "log_model": "none", "register": None},
    }
    return OmegaConf.create({**resolved, **changed})


@contextmanager
def named(key: str) -> Iterator[None]:
    """Name in an error the key of the stage, or of the model, that it is about."""
    try:
        yield
    except MergelabError as error:
        raise type(error)(f"{key}: {error}") from error


def with_folders(models: Mapping[str, Any], folders: Mapping[str, str]) -> dict[str, Any]:
    """Return models with the folders of stages in the places of their names, adapters on stages included."""

    def changed(text: str) -> str:
        stage, plus, adapter = text.partition("+")
        return f"{folders[stage]}{plus}{adapter}" if stage in folders else text

    experts = {name: _changed(each, changed) for name, each in (models.get("experts") or {}).items()}
    return {**models, "base": _changed(models.get("base"), changed), "experts": experts}


def model_names(models: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield every model that is named, with its place among ``models``."""
    found: list[tuple[str, str]] = []

    def at(place: str) -> Callable[[str], str]:
        def seen(text: str) -> str:
            found.append((place, text))
            return text

        return seen

    _changed(models.get("base"), at("base"))
    experts = models.get("experts") or {}
    named = experts.items() if isinstance(experts, Mapping) else ((str(i), each) for i, each in enumerate(experts))
    for name, each in named:
        _changed(each, at(f"experts.{name}"))
    yield from found


def _changed(node: Any, change: Callable[[str], str]) -> Any:
    if isinstance(node, str):
        return change(node)
    if isinstance(node, Mapping):
        return {key: _changed(each, change) if key in _REFERENCES else each for key, each in node.items()}
    return [_changed(each, change) for each in node] if isinstance(node, Sequence) else node


def _needed(stage: Mapping[str, Any], stages: Mapping[str, Any]) -> list[str]:
    return [name for _, text in model_names(stage) if (name := text.partition("+")[0]) in stages]


def _check_names(models: ModelsConfig) -> None:
    """Check the stages' names, and that what looks like one of them is one."""
    stages = models.stages or {}
    for name, each in stages.items():
        if not _NAME.fullmatch(name):
            raise ConfigError(f"{KEY}.{shortened(name)}: a stage's name is of letters, digits, _ and -")
        if local_path(name, KEY).is_dir():
            raise ConfigError(f"{KEY}.{name}: there is a folder of that name too; give the stage another one")
        if not isinstance(each, str | Mapping):
            raise ConfigError(f"{KEY}.{name}={shortened(repr(each))}: must be a merge, with method, or a folder")
    merges = {f"{KEY}.{name}.": each for name, each in stages.items() if isinstance(each, Mapping)}
    for where, node in {"models.": _dumped(dict(models)), **merges}.items():
        for place, text in model_names(node):
            name = text.partition("+")[0].partition("@")[0]
            near = nearest(name, stages)
            if near and "/" not in name and name not in stages and not local_path(name, where).is_dir():
                raise ConfigError(
                    f"{where}{place}={text}: no stage is called so; did you mean {near!r}? (there are {listed(stages)})"
                )
    in_order(models)


def _dumped(models: Mapping[str, Any]) -> dict[str, Any]:
    """Return the base and the experts of checked models as plain containers."""
    base, experts = models["base"], models["experts"]
    plain = base if base is None or isinstance(base, str) else base.model_dump()
    return {"base": plain, "experts": {name: each.model_dump() for name, each in experts.items()}}


def _checked(named: Mapping[str, Any]) -> dict[str, Any]:
    found = check(ModelsConfig, {"name": "", **named}, "models")
    return {"base": found.base, "experts": found.experts}
