"""Which tensor of a base an adapter's names mean: transformers' own renaming decides, then the body's prefix."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from mergelab.errors import KeyMismatch, ModelError
from mergelab.weights.align import RenamedSource
from mergelab.weights.conversion import as_in, module_names, names_in, tied_parameters

if TYPE_CHECKING:
    from torch import nn

    from mergelab.weights.checkpoint import Checkpoint
    from mergelab.weights.source import TensorSource

# PEFT's task types, with what the class of a model for the task ends in, and transformers' list of such classes.
_TASKS: Mapping[str, tuple[str, str]] = {
    "SEQ_CLS": ("ForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"),
    "TOKEN_CLS": ("ForTokenClassification", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES"),
    "QUESTION_ANS": ("ForQuestionAnswering", "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES"),
}
_PART = re.compile(r"(?:(?:model|transformer)\.)?(encoder|decoder)\.")


def adapted_class(task_type: str | None, class_name: str | None, config: Mapping[str, Any]) -> str:
    """Return the class of a base with an adapter: the base's, unless the adapter's task needs another head.

    Args:
        task_type: PEFT's.
        class_name: the class that the adapter was trained on, where it says so.
        config: the base's.
    """
    own = str((config.get("architectures") or [""])[0])
    suffixes = [suffix for suffix, _ in _TASKS.values()]
    if task_type is not None and task_type in _TASKS:
        suffix, mapping = _TASKS[task_type]
        if own.endswith(suffix):
            return own
        from transformers.models.auto import modeling_auto

        return str(getattr(modeling_auto, mapping, {}).get(config.get("model_type"), own))
    if class_name is not None and class_name.endswith(tuple(suffixes)):
        return class_name
    return own


@dataclass(frozen=True, eq=False)
class Names:
    """The names of an adapter's tensors in its base.

    Attributes:
        label: what errors call the adapter.
        source: the base's tensors; where the adapted model is of another class, those that it shares with the base.
        stored: the name in ``source`` of each tensor, by its name in the module.
        found: the name in the module of each tensor, by the adapter's name for it.
        new: names in the module of tensors that the base does not have.
        module: the adapted model without weights, if transformers has it.
        other_class: whether it is of another class than the base.
    """

    label: str
    source: TensorSource
    stored: Mapping[str, str]
    found: Mapping[str, str]
    new: frozenset[str]
    module: nn.Module | None
    other_class: bool

    def of(self, name: str) -> str | None:
        """Return the name in the module of an adapter's tensor; None for one outside the part that is wanted."""
        return self.found.get(name)

    def bias(self, weight: str) -> str | None:
        """Return the name of the bias beside a weight, if the base has one."""
        name = f"{weight.removesuffix('.weight')}.bias"
        return name if name in self.stored else None

    def at(self, name: str) -> str:
        """Return the name under which ``source`` has, or would have, a tensor of the module."""
        return self.stored.get(name, name)

    @cached_property
    def tied(self) -> dict[str, tuple[str, ...]]:
        """The groups of tied tensors: for each name in the module all names of its group, its own included."""
        pairs = [] if self.module is None else list(tied_parameters(self.module).items())
        here = {stored: name for name, stored in self.stored.items()}
        pairs += [(here.get(alias, alias), here.get(key, key)) for alias, key in self.source.aliases().items()]
        groups: dict[str, tuple[str, ...]] = {}
        for a, b in pairs:
            group = tuple(dict.fromkeys([*groups.get(b, (b,)), *groups.get(a, (a,))]))
            groups.update(dict.fromkeys(group, group))
        return groups


def named(
    wanted: Sequence[str], base: Checkpoint, module: nn.Module | None, class_name: str, label: str, part: str | None
) -> Names:
    """Find each of an adapter's tensors in its base.

    Args:
        wanted: the tensors' names in the adapter.
        base: its base.
        module: the adapted model without weights, if transformers has it.
        class_name: the class of the adapted model.
        label: what errors call the adapter.
        part: the part of an encoder-decoder that it is for.

    Raises:
        KeyMismatch: names match nothing; the line gives the first three and their number.
        ModelError: the adapter fits both parts of an encoder-decoder and ``part`` does not say which.
    """
    other_class = class_name != str((base.config.get("architectures") or [""])[0])
    source, stored = _stored(base, module, other_class)
    own = set() if module is None else set(module.state_dict())
    places = {*stored, *own}
    found = _found(wanted, places, stored, module, label, part)
    if unmatched := [name for name in wanted if name not in found]:
        shown = ", ".join(name.removesuffix(".weight") for name in unmatched[:3])
        more = f" and {len(unmatched) - 3} more" if len(unmatched) > 3 else ""
        raise KeyMismatch(
            f"{label}: {len(unmatched)} of {len(wanted)} names of the adapter match nothing in {base.name} "
            f"({class_name}): {shown}{more}"
        )
    if part is not None:
        found = {name: at for name, at in found.items() if _part_of(at) == part}
        if not found:
            raise KeyMismatch(f"{label}: part={part}: the adapter changes nothing in the {part} of {base.name}")
    names = Names(label, source, stored, found, frozenset(), module, other_class)
    new = {name for name in own - stored.keys() if stored.keys().isdisjoint(names.tied.get(name, ()))}
    return replace(names, new=frozenset(new))


def _stored(base: Checkpoint, module: nn.Module | None, other_class: bool) -> tuple[TensorSource, dict[str, str]]:
    """Return the tensors that the adapted model takes from its base, and their names by those in the module."""
    everything = [*base.keys(), *base.aliases()]
    if module is None:
        return base, {name: name for name in everything}
    if not other_class:
        stored = _names_in(module, base)
        return base, {**{name: name for name in everything if name not in stored.values()}, **stored}
    converted, own = as_in(module, base), module.state_dict()
    shared = {name: name for name in [*converted.keys(), *converted.aliases()] if name in own}
    return RenamedSource(converted, shared), shared


_NAMES: WeakKeyDictionary[nn.Module, tuple[list[str], dict[str, str]]] = WeakKeyDictionary()


def _names_in(module: nn.Module, base: Checkpoint) -> dict[str, str]:
    """Return `names_in`, found once for all adapters of a base: ``module`` is its skeleton, which nothing changes."""
    everything = [*base.keys(), *base.aliases()]
    known, names = _NAMES.get(module, ([], {}))
    if known != everything:
        names = names_in(module, base)
        _NAMES[module] = everything, names
    return names


def _found(
    wanted: Sequence[str],
    places: Collection[str],
    stored: Mapping[str, str],
    module: nn.Module | None,
    label: str,
    part: str | None,
) -> dict[str, str]:
    here = {at: name for name, at in stored.items()}
    found = {name: name if name in places else here[name] for name in wanted if name in places or name in here}
    if module is not None and len(found) < len(wanted):
        for name, renamed in module_names(module, [name for name in wanted if name not in found]).items():
            if renamed in places:
                found[name] = renamed
    if len(found) == len(wanted) and (part is None or any(_part_of(at) == part for at in found.values())):
        return found
    fitting = list(_with_prefixes(wanted, places, part))
    if not fitting:
        return found
    if len({_part_of(next(iter(each.values()))) for each in fitting}) > 1:
        raise ModelError(
            f"{label}: the adapter fits both parts of its base; say which one with part: encoder or decoder"
        )
    return fitting[0]


def _with_prefixes(wanted: Sequence[str], places: Collection[str], part: str | None) -> Iterator[dict[str, str]]:
    """Yield the ways to match all names by one prefix less, or one more: the body's, or a part's."""
    for less in ("", *_leading(wanted)):
        if not all(name.startswith(less) for name in wanted):
            continue
        for more in ("", *_leading(places)):
            found = {name: more + name.removeprefix(less) for name in wanted}
            if all(at in places and (part is None or _part_of(at) == part) for at in found.values()):
                yield found


def _leading(names: Collection[str]) -> list[str]:
    """List the prefixes of one, two and three components that names begin with."""
    found: dict[str, None] = {}
    for name in names:
        pieces = name.split(".")
        for depth in (1, 2, 3):
            if len(pieces) > depth + 1 and not pieces[depth - 1].isdigit():
                found[".".join(pieces[:depth]) + "."] = None
    return list(found)


def _part_of(name: str) -> str | None:
    match = _PART.match(name)
    return match[1] if match else None
