"""The structure that Hydra's overrides are held to: where keys are the user's own, and what an override sets whole.

Hydra closes a composed configuration, so that ``key=value`` changes only keys that exist. A node that says
otherwise itself stays open. ``conf/config.yaml`` and ``conf/sweep/_settings.yaml`` start from what `register` stores.
"""

from __future__ import annotations

from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.basecontainer import BaseContainer

from mergelab.errors import ConfigError, did_you_mean, listed

EXPERTS = "models.experts"
_OPEN = {"struct": False}


class _SetWhole(BaseContainer):
    """A container that an override replaces; files of config groups are merged into it."""

    def merge_with(self, *others: Any) -> None:
        """Replace this container: Hydra applies ``key={...}`` and ``key=[...]`` by this call."""
        parent = self._get_parent()
        assert isinstance(parent, DictConfig)
        if parent._get_node_flag("struct") is False:  # Hydra opens the parent for `+key={...}`, which adds
            super().merge_with(*others)
            return
        mapping = type(self) if isinstance(self, _Mapping) else Experts
        parent[self._key()] = _List(others[-1]) if isinstance(others[-1], list) else mapping(others[-1], flags=_OPEN)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = super().__deepcopy__(memo)  # type: ignore[misc]
        object.__setattr__(copied, "__class__", type(self))  # OmegaConf copies to its own classes
        return copied


class _List(_SetWhole, ListConfig):
    """Experts in a list."""


class _Mapping(_SetWhole, DictConfig):
    """A base model that is a pair of an encoder and a decoder."""


class Experts(_Mapping):
    """Experts by name."""

    def __setattr__(self, key: str, value: Any) -> None:
        """Set an expert: Hydra applies ``models.experts.NAME=value`` by this call.

        Raises:
            ConfigError: null, which leaves an expert out, for a name that does not exist.
        """
        if value is None and key not in self:
            raise ConfigError(f"{EXPERTS}.{key}=null: {no_expert(key, self)}")
        super().__setattr__(key, value)

    def __setitem__(self, key: Any, value: Any) -> None:
        """Set an expert; of one that is a reference alone, ``models.experts.NAME.weight=value`` keeps the reference."""
        before = self.get(key)
        if isinstance(before, str) and value == {}:  # what Hydra puts there before it sets the weight
            value = {"reference": before}
        super().__setitem__(key, value)


class _Method(DictConfig):
    """A method's parameters, and which of them overrides have set."""

    def __setattr__(self, key: str, value: Any) -> None:
        """Set a parameter: Hydra applies ``method.KEY=value`` by this call, one override after another.

        ``method.preset=NAME`` sets the preset's values, except for parameters that an override sets, before or after.

        Raises:
            ConfigError: the method has no such preset.
        """
        explicit = self.__dict__.get("_explicit", frozenset())
        method = _method_of(self) if key == "preset" else None
        if method is None:
            object.__setattr__(self, "_explicit", explicit | {key})
            super().__setattr__(key, value)
            return
        from mergelab.engine.registry import preset_values

        for name, each in preset_values(method, value).items():
            if name not in explicit:
                super().__setattr__(name, each)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = super().__deepcopy__(memo)
        object.__setattr__(copied, "__class__", type(self))  # OmegaConf copies to its own classes
        object.__setattr__(copied, "_explicit", self.__dict__.get("_explicit", frozenset()))
        return copied


def _method_of(node: DictConfig) -> Any:
    """Return the method whose parameters these are, if it can have presets; None for a user's own function."""
    from mergelab.engine.registry import PRESET, get_method, is_preset

    function = node._get_node("function")
    path = None if function is None else function._value()
    if not isinstance(path, str) or "." not in path:
        return None
    method = get_method(path)
    return method if is_preset(method, PRESET) else None


def no_expert(name: str, experts: Any) -> str:
    """Return a message that there is no expert ``name`` among ``experts``, and which there are."""
    names = [str(each) for each in experts or () if experts[each] is not None]
    return f"no expert {name!r}{did_you_mean(name, names)} (there are {listed(names)})"


def register() -> None:
    """Store the structure where Hydra finds it."""
    store = ConfigStore.instance()
    models = {
        "name": MISSING,
        "base": _Mapping(None, flags=_OPEN),
        "experts": Experts({}, flags=_OPEN),
        "slices": _Mapping(None, flags=_OPEN),
        "stages": _Mapping(None, flags=_OPEN),
        "head": "average",
        "passthrough": [],
        "vocab": None,
        "config": None,
        "leave_out": None,
        "merge_new": False,
        "untie": False,
    }
    # A method's parameters and a task's settings are checked, with a better message, by the method and the task.
    schema = {"method": _Method({}, flags=_OPEN), "models": models, "task": DictConfig({}, flags=_OPEN)}
    sweep = {"sweep": {"params": DictConfig({}, flags=_OPEN)}}
    for name, node in (("schema", schema), ("sweep", sweep)):
        store.store(name, node, group="mergelab", package="_global_", provider="mergelab")


def open_launchers() -> None:
    """Open the options that a launcher hands on to Ray, whose keys are Ray's."""
    launchers = ConfigStore.instance().repo.get("hydra", {}).get("launcher", {})
    if (ray := launchers.get("ray.yaml")) is not None:
        for part in ("init", "remote"):
            OmegaConf.set_struct(ray.node.ray[part], False)
