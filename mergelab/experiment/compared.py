"""The parameters of a run: what was used, and what people compare. The whole configuration is an artifact."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from mergelab.config import CONF_DIR, ModelsConfig
from mergelab.tracking import names

if TYPE_CHECKING:
    from pathlib import Path

# Recorded also where they are as the files have them.
_ALWAYS = frozenset({"method.name", "task.name", "models.name", "models.base", "models.head", "eval.protocol", "seed"})
# Where something is recorded and written, and what a run's tags say.
_NEVER = frozenset({"tracking", "output", "source", "models.mini"})
_STANDARD = "standard"  # of groups whose options have no name of their own
_MISSING = object()
_EMPTY: tuple[Any, ...] = (None, [], {})


def compared(config: Mapping[str, Any], source: str, typed: Collection[str] = ()) -> dict[str, Any]:
    """Return what is recorded as the parameters of a run.

    Left out is what is as in the files of ``conf`` that the configuration names, but for a method's numbers and what
    the user typed. So the named files and the parameters together say what was run. With the miniature, the names of
    the models that were asked for are missing: others were used (see `models_used`).

    Args:
        config: the resolved configuration, nested; it may lack parts.
        source: where the models came from.
        typed: the keys that the user set.
    """
    found: dict[str, Any] = {}
    for group, node in config.items():
        if group in _NEVER:
            continue
        if not isinstance(node, Mapping):
            if group in _ALWAYS or group in typed or node != _top().get(group, _MISSING):
                found[group] = node
            continue
        own = {
            key: value
            for key, value in node.items()
            if f"{group}.{key}" not in _NEVER and _is_compared(group, node, str(key), value, typed)
        }
        if group == "models" and source == "mini":
            own = {key: value for key, value in own.items() if key not in ("name", "base", "experts")}
        if own:
            found[group] = own
    return found


def models_used(tags: Mapping[str, str]) -> dict[str, Any]:
    """Return the parameters that name the models, from the tags that `mergelab.experiment.recording.model_tags` has."""
    prefix = names.model("")
    hashes = {names.model_hash(tag.removeprefix(prefix)) for tag in tags if tag.startswith(prefix)}
    used = {tag.removeprefix(prefix): value for tag, value in tags.items() if tag.startswith(prefix)}
    used = {name: value for name, value in used.items() if names.model(name) not in hashes}
    base = {"base": used.pop("base")} if "base" in used else {}
    return {"models": {"name": tags[names.MODELS], **base, "experts": used}}


def typed_keys() -> set[str]:
    """Return the keys of the configuration that the user set in the command; nothing outside of one."""
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        return set()
    return {str(override).lstrip("+~").partition("=")[0] for override in HydraConfig.get().overrides.task}


def _is_compared(group: str, node: Mapping[str, Any], key: str, value: Any, typed: Collection[str]) -> bool:
    path = f"{group}.{key}"
    below = any(one == path or one.startswith(f"{path}.") for one in typed)
    if path in _ALWAYS or path == "models.experts" or below:
        return value is not None or below
    if group == "method" and isinstance(value, int | float) and not isinstance(value, bool):
        return True
    default = _default(group, str(node.get("name", _STANDARD)), key)
    return bool(value != default and not (value in _EMPTY and default in _EMPTY))


def _default(group: str, option: str, key: str) -> Any:
    """Return what a key has without a setting: in the option's file, else in the schema, else null."""
    known = _file(CONF_DIR / group / f"{option}.yaml")
    if key in known:
        return known[key]
    if group == "models" and key in ModelsConfig.model_fields:
        return ModelsConfig.model_fields[key].default
    return None


def _top() -> Mapping[str, Any]:
    return _file(CONF_DIR / "config.yaml")


@functools.lru_cache(maxsize=64)
def _file(file: Path) -> Mapping[str, Any]:
    """Read a file of ``conf``, its references unresolved; nothing where there is none."""
    from omegaconf import OmegaConf

    if not file.is_file():
        return {}
    found: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    return dict(found)


def used_name(models: ModelsConfig) -> str:
    """Return the name of a set of models: a ready set's own only where its models are used, else the experts' names."""
    known = _ready_models(models.name)
    if not known:
        return models.name
    if known.get("experts"):  # a set of the user's own starts without any
        ready = ModelsConfig.model_validate({key: known[key] for key in ("name", "base", "experts") if key in known})
        if ready.base == models.base and _references(ready) == _references(models):
            return models.name
    return ", ".join(_shortened(models.experts))


def _ready_models(name: str) -> dict[str, Any]:
    """Read a ready set of models, and the sets that it changes: those of its defaults before ``_self_``."""
    from omegaconf import OmegaConf

    own = dict(_file(CONF_DIR / "models" / f"{name}.yaml"))
    below = [_ready_models(other) for other in own.pop("defaults", []) if other != "_self_"]
    found: Any = OmegaConf.to_container(OmegaConf.merge(*below, own), resolve=False)
    return dict(found)


def _references(models: ModelsConfig) -> dict[str, Any]:
    return {name: (expert.reference, expert.part) for name, expert in models.experts.items()}


def _shortened(experts: Collection[str], most: int = 4) -> Iterator[str]:
    yield from list(experts)[:most]
    if len(experts) > most:
        yield f"and {len(experts) - most} more"
