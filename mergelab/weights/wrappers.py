"""Remove what wrappers put into tensors' names: data-parallel, compiled, FSDP, PEFT, Lightning."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from operator import methodcaller
from typing import TYPE_CHECKING

from mergelab.errors import KeyMismatch

if TYPE_CHECKING:
    from torch import nn

# Modules that hold another one and nothing else; no model has one of this name.
_HOLDERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_fpw_module"})
_DATA_PARALLEL = "module"
_LIGHTNING = "model."
_PEFT = "base_model.model."
_ADAPTED = "base_layer"
# Decoders' own names begin with "model." throughout where the output embedding is tied.
_PLAIN = re.compile(r"model\.((decoder|language_model|text_model)\.)?layers\.\d")


def unwrapped(names: Collection[str], label: str, module: Callable[[], nn.Module | None]) -> dict[str, str] | None:
    """Return the stored name of each tensor by its name in the model itself; None where no wrapper has left a trace.

    Args:
        names: of all tensors, as stored.
        label: the model's name in error messages.
        module: builds transformers' model on the meta device, or returns None. It decides where a name may be a
            wrapper's or the model's own, and is called in no other case.

    Raises:
        KeyMismatch: two stored names are one without the wrappers.
    """
    found = _peeled({name: name for name in names}, label)
    inner = [name for name in found if f".{_DATA_PARALLEL}." in name]
    whole = all(name.startswith(_LIGHTNING) for name in found) and not any(_PLAIN.match(name) for name in found)
    if found and (inner or whole):
        found = _best(found, label, module(), inner=bool(inner), whole=whole)
    return None if all(name == stored for name, stored in found.items()) else found


def _peeled(names: Mapping[str, str], label: str) -> dict[str, str]:
    """Remove wrappers that no model's own names look like."""
    found = _renamed(names, label, lambda name: _without(name, {*_HOLDERS, _ADAPTED}))
    for prefix in (f"{_DATA_PARALLEL}.", _PEFT):
        if found and all(name.startswith(prefix) for name in found):
            return _peeled(_renamed(found, label, methodcaller("removeprefix", prefix)), label)
    return found


def _best(
    names: Mapping[str, str], label: str, module: nn.Module | None, *, inner: bool, whole: bool
) -> dict[str, str]:
    """Choose, of the names with and without what may be a wrapper's, those that fit the model best."""
    from mergelab.weights.conversion import fit

    plain = _renamed(names, label, lambda name: _without(name, {_DATA_PARALLEL})) if inner else dict(names)
    candidates = [dict(names), plain]
    if whole:
        stripped = _renamed(plain, label, lambda name: name.removeprefix(_LIGHTNING))
        candidates += [stripped, _peeled(stripped, label)]
    if module is None:
        nested = whole and any(name.startswith(2 * _LIGHTNING) for name in plain)
        return candidates[-1] if nested else candidates[0]
    return max(candidates, key=lambda found: fit(module, found))  # the first of equals


def _without(name: str, parts: Collection[str]) -> str:
    return ".".join(part for part in name.split(".") if part not in parts)


def _renamed(names: Mapping[str, str], label: str, rename: Callable[[str], str]) -> dict[str, str]:
    renamed: dict[str, str] = {}
    for name, stored in names.items():
        new = rename(name)
        if new in renamed:
            raise KeyMismatch(f"{label}: {renamed[new]} and {stored} are one tensor without their wrappers' names")
        renamed[new] = stored
    return renamed
