"""Read stored tensors under the names, and in the shapes, that a model of transformers has for them in memory.

Transformers renames, stacks and splits what it reads: version 5 stores the experts of Mixtral one by one and computes
with them stacked, and vision-language models have had two layouts. Its own mapping decides here too. Tensors are
converted one by one, when they are read.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mergelab.errors import KeyMismatch, ModelError, listed
from mergelab.weights.align import RenamedSource
from mergelab.weights.module import load_into
from mergelab.weights.source import DictSource, TensorSource


@dataclass(frozen=True)
class _Computed:
    """Tensors that transformers computes together from stored ones.

    Attributes:
        name: what transformers calls the first tensor that it makes of them.
        converter: its ``WeightConverter``, without tensors.
        parts: the stored tensors in order, each with the pattern that its name fits.
        module: the model that they are for.
    """

    name: str
    converter: Any
    parts: list[tuple[str, str]] = field(default_factory=list)
    module: Any = None

    def convert(self, read: Any) -> dict[str, Tensor]:
        """Compute the tensors; ``read`` returns the stored tensor of a name."""
        converter = copy.deepcopy(self.converter)
        for pattern, stored in self.parts:
            converter.add_tensor(self.name, stored, pattern, read(stored))
        with torch.no_grad():
            made = converter.convert(self.name, model=self.module, config=self.module.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


@dataclass(frozen=True)
class _Plan:
    """How stored tensors become a model's: by renaming (new name to stored name), or by computing."""

    renamed: dict[str, str]
    computed: tuple[_Computed, ...] = ()

    @property
    def is_identity(self) -> bool:
        return not self.computed and all(name == stored for name, stored in self.renamed.items())


class ConvertedSource:
    """A source under the names that transformers' model has for its tensors.

    Args:
        source: the stored tensors.
        plan: how each becomes a tensor of the model.

    Attributes:
        renamed: the stored name of each tensor that is not computed.

    Raises:
        ModelError: transformers cannot convert them: some are missing, or do not fit together.
    """

    def __init__(self, source: TensorSource, plan: _Plan) -> None:
        self.source, self.renamed = source, plan.renamed
        self._renamed = RenamedSource(source, plan.renamed)
        self._computed: dict[str, _Computed] = {}
        self._like: dict[str, Tensor] = {}
        for group in plan.computed:
            try:
                made = group.convert(self._stand_in)
            except Exception as error:  # whatever the operations of transformers raise
                stored = listed([name for _, name in group.parts])
                raise ModelError(f"{source.name}: {group.name} cannot be made of {stored}: they do not fit") from error
            for name, tensor in made.items():
                self._computed[name], self._like[name] = group, tensor

    def _stand_in(self, stored: str) -> Tensor:
        return torch.empty(self.source.shape(stored), dtype=self.source.dtype(stored), device="meta")

    @property
    def name(self) -> str:
        """The model's name in error messages."""
        return self.source.name

    def keys(self) -> list[str]:
        """List the tensors, one name per group of tied tensors."""
        return [*self._renamed.keys(), *self._computed]

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of ``key``."""
        return tuple(self._like[key].shape) if key in self._like else self._renamed.shape(key)

    def dtype(self, key: str) -> torch.dtype:
        """Return the dtype of ``key``."""
        return self._like[key].dtype if key in self._like else self._renamed.dtype(key)

    def get(self, key: str) -> Tensor:
        """Read ``key``, and compute it where it is not stored as it is."""
        if key not in self._computed:
            return self._renamed.get(key)
        return self._computed[key].convert(self.source.get)[key]

    def prefetch(self, key: str) -> None:
        """Request that the data of ``key`` be read ahead in the background."""
        if key not in self._computed:
            self._renamed.prefetch(key)
            return
        for _, stored in self._computed[key].parts:
            self.source.prefetch(stored)

    def aliases(self) -> dict[str, str]:
        """Return the further names of tied tensors."""
        return self._renamed.aliases()


def is_transformers_model(module: object) -> bool:
    """Return whether a module is a model of transformers, without importing it."""
    return isinstance(module, nn.Module) and any(cls.__name__ == "PreTrainedModel" for cls in type(module).__mro__)


def as_in(module: nn.Module, source: TensorSource) -> TensorSource:
    """Return ``source`` under the names that ``module`` has for its tensors, as transformers would load it.

    Names that the module has no place for stay as they are, in transformers' current spelling.

    Args:
        module: a model of transformers; its values do not matter, so that it may be on the meta device.
        source: what a checkpoint stores.

    Returns:
        ``source`` itself where its names are the module's.

    Raises:
        KeyMismatch: two stored tensors are one in the module. ModelError: stored tensors do not fit together.
    """
    plan = _plan(module, [*source.keys(), *source.aliases()], source.name)
    return source if plan.is_identity else ConvertedSource(source, plan)


def names_in(module: nn.Module, source: TensorSource) -> dict[str, str]:
    """Return the stored name of each tensor that ``module`` has as it is stored, by its name in the module."""
    return dict(_plan(module, [*source.keys(), *source.aliases()], source.name).renamed)


def module_names(module: nn.Module, names: Collection[str]) -> dict[str, str]:
    """Return what ``module`` calls tensors that transformers would read under these names, each by its name here.

    Those that it would compute of several are not among them, nor those that it would call as another one.
    """
    found: dict[str, str] = {}
    for name in names:
        with suppress(KeyMismatch, ModelError):
            found.update({stored: new for new, stored in _plan(module, [name], type(module).__name__).renamed.items()})
    return found


def fit(module: nn.Module, names: Collection[str]) -> tuple[int, int]:
    """Count the tensors of ``module`` that transformers makes of stored ones, and how many it has under these names."""
    own = module.state_dict().keys()
    try:
        plan = _plan(module, names, type(module).__name__)
    except (KeyMismatch, ModelError):
        return 0, 0
    return len(own & {*plan.renamed, *(group.name for group in plan.computed)}), len(own & set(names))


def check_readable(module: nn.Module, source: TensorSource) -> None:
    """Check that transformers reads a source's tensors as they are once they are stored under their names here.

    Raises:
        ModelError: it would rename or convert some of them.
    """
    plan = _plan(module, [*source.keys(), *source.aliases()], source.name)
    changed = [name for name, stored in plan.renamed.items() if name != stored] + [each.name for each in plan.computed]
    if changed:
        raise ModelError(
            f"{source.name}: transformers has {listed(changed)} of {type(module).__name__} in another layout in memory "
            "than in files; save all models with one version of transformers, so that their files have equal names"
        )


_IDENTICAL: WeakKeyDictionary[nn.Module, set[tuple[str, ...]]] = WeakKeyDictionary()


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor], *, untied: bool = False) -> nn.Module:
    """Load a whole model's weights into a module of transformers as it would load them from a folder.

    Args:
        module: is written into; a module of another library must have the tensors' names.
        tensors: as they are stored, or under the module's names.
        untied: whether tensors that the module has tied may be given different values. They are separate in it then,
            until equal values are given.

    Raises:
        KeyMismatch: parameters that are not given, or tensors that the module has no place for.
        ShapeMismatch, ModelError: as `mergelab.weights.module.load_into`.
    """
    names = tuple(sorted(tensors))
    if is_transformers_model(module) and names not in _IDENTICAL.setdefault(module, set()):
        source = as_in(module, DictSource(type(module).__name__, tensors))
        if isinstance(source, ConvertedSource):
            tensors = {name: source.get(name) for name in [*source.keys(), *source.aliases()]}
        else:
            _IDENTICAL[module].add(names)
    if untied:
        _separate(module, tensors)
    return load_into(module, tensors)


_SEPARATED: WeakKeyDictionary[nn.Module, dict[str, str]] = WeakKeyDictionary()


def _separate(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Separate tied parameters that are given different values; tie those again that are not."""
    earlier = _SEPARATED.setdefault(module, {})
    for alias, holder in {**earlier, **tied_parameters(module)}.items():
        given = [tensors[name] for name in (alias, holder) if name in tensors]
        apart = len(given) == 2 and not torch.equal(*given)
        owner, _, attribute = alias.rpartition(".")
        if apart and alias not in earlier:
            shared = module.get_parameter(alias)
            setattr(module.get_submodule(owner), attribute, nn.Parameter(shared.detach().clone(), shared.requires_grad))
            earlier[alias] = holder
        elif not apart and alias in earlier:
            setattr(module.get_submodule(owner), attribute, module.get_parameter(holder))
            del earlier[alias]


def tied_parameters(module: nn.Module) -> dict[str, str]:
    """Return the further names of parameters that a module has under several, each with the first one."""
    first: dict[int, str] = {}
    ties: dict[str, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if (holder := first.setdefault(id(parameter), name)) != name:
            ties[name] = holder
    return ties


def _plan(module: Any, names: Iterable[str], label: str) -> _Plan:
    try:
        from transformers.core_model_loading import WeightConverter  # noqa: F401
    except ImportError:  # transformers 4
        return _plan_by_class(module, list(names), label)
    return _plan_by_transforms(module, names, label)


def _plan_by_transforms(module: Any, names: Iterable[str], label: str) -> _Plan:
    """Follow ``convert_and_load_state_dict_in_model`` of transformers 5, for names alone."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(module)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    own, prefix = module.state_dict(), module.base_model_prefix
    renamed: dict[str, str] = {}
    computed: dict[str, _Computed] = {}
    for stored in sorted(names, key=dot_natural_key):
        name, pattern = rename_source_key(stored, renamings, converters, prefix, own)
        if name not in own and stored in own:
            name, pattern = rename_source_key(stored, [], [], prefix, own)
        if pattern is None:
            _add(renamed, name, stored, label)
        elif name in own:
            group = computed.setdefault(name, _Computed(name, by_pattern[pattern], module=module))
            group.parts.append((pattern, stored))
        else:
            _add(renamed, stored, stored, label)
    if both := computed.keys() & renamed.keys():
        raise KeyMismatch(f"{label}: {listed(sorted(both))} are stored twice, whole and in parts")
    order = {stored: at for at, stored in enumerate(names)}
    return _Plan(dict(sorted(renamed.items(), key=lambda item: order[item[1]])), tuple(computed.values()))


def _plan_by_class(module: Any, names: Collection[str], label: str) -> _Plan:
    """Follow ``from_pretrained`` of transformers 4, for names alone: each class has its own renamings."""
    from transformers import modeling_utils

    vision_language: Collection[str] = getattr(modeling_utils, "VLMS", ())
    classes = [cls.__name__.lower() for cls in type(module).__mro__[:-1]]
    mapped = any(part in name for name in classes for part in vision_language)
    prefix = str(module.base_model_prefix)
    has_prefix = bool(prefix) and any(name.startswith(prefix) for name in names)
    expects_prefix = bool(prefix) and hasattr(module, prefix)
    mapping: dict[str, str] = module._get_key_renaming_mapping(
        list(names),
        module._checkpoint_conversion_mapping if mapped else None,
        has_prefix and not expects_prefix,
        not has_prefix and expects_prefix,
    )
    own = module.state_dict()
    renamed: dict[str, str] = {}
    for stored in names:
        name = mapping.get(stored, stored)
        _add(renamed, stored if stored in own and name not in own else name, stored, label)
    return _Plan(renamed)


def _add(renamed: dict[str, str], name: str, stored: str, label: str) -> None:
    if name in renamed:
        raise KeyMismatch(f"{label}: {renamed[name]} and {stored} are the same tensor in two spellings")
    renamed[name] = stored
