"""What a model's tensor is, where that is known: a tensor of its base, and what an adapter changes in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor

from mergelab.adapters.changes import Change, LowRank
from mergelab.adapters.checkpoint import AdaptedCheckpoint
from mergelab.adapters.held import HeldModel
from mergelab.weights.align import AlignedModels
from mergelab.weights.checkpoint import Checkpoint
from mergelab.weights.source import DictSource, TensorSource, traced


@dataclass(frozen=True, eq=False)
class Delta:
    """A tensor as a change of one that is read.

    Attributes:
        source, key: where the tensor is read that is changed.
        changes: what is changed in it, in order; empty where nothing is.
    """

    source: TensorSource
    key: str
    changes: tuple[Change, ...] = ()

    @property
    def low_rank(self) -> tuple[LowRank, ...] | None:
        """The changes, where all are low-rank ones."""
        found = tuple(change for change in self.changes if isinstance(change, LowRank))
        return found if len(found) == len(self.changes) else None

    def is_on(self, other: Delta) -> bool:
        """Return whether both change the same tensor."""
        if self.source is other.source:
            return self.key == other.key
        both = isinstance(self.source, Checkpoint) and isinstance(other.source, Checkpoint)
        return both and self.key == other.key and self.source.files == other.source.files  # type: ignore[attr-defined]


def delta_of(source: TensorSource, name: str) -> Delta:
    """Return what a model's tensor is: the tensor itself without changes, where nothing more is known."""
    source, key = traced(source, name)
    if isinstance(source, AdaptedCheckpoint | HeldModel) and (changes := source.changes(key)):
        return Delta(*traced(*source.stored(key)), tuple(changes))
    return Delta(source, key)


def held_models(models: AlignedModels, load: Callable[[str, Tensor], Tensor]) -> AlignedModels:
    """Copy models into memory: of adapters the factors alone, which change the base's tensors when they are read.

    Args:
        models: base and experts.
        load: returns a copy of a tensor of this name.
    """
    lead = models.base or next((each for each in models.experts if is_adapter(each, models.names)), None)
    starts = {} if lead is None else {name: delta_of(lead, name) for name in models.names}
    shared = DictSource(
        "base" if lead is None else lead.name,
        {name: load(name, start.source.get(start.key)) for name, start in starts.items()},
    )
    experts = tuple(_held(expert, models.names, shared, starts, load) for expert in models.experts)
    return replace(models, base=None if models.base is None else shared, experts=experts)


def is_adapter(source: TensorSource, names: Sequence[str]) -> bool:
    """Return whether an adapter changes any of these tensors of a model."""
    return any(delta_of(source, name).changes for name in names)


def shared_names(models: AlignedModels) -> tuple[str, ...]:
    """Return the tensors that all experts have from the base as they are."""
    if models.base is None:
        return ()
    starts = {name: delta_of(models.base, name) for name in models.names}
    deltas = {name: [delta_of(expert, name) for expert in models.experts] for name in models.names}
    return tuple(n for n, own in deltas.items() if all(each.is_on(starts[n]) and not each.changes for each in own))


def own_bytes(source: TensorSource, name: str, base: TensorSource | None) -> int:
    """Return what `held_models` holds of an expert's tensor beside the base's."""
    delta = delta_of(source, name)
    found = sum(tensor.nbytes for change in delta.changes for tensor in tensors_of(change))
    if base is None or not delta.is_on(delta_of(base, name)):
        count = 1
        for length in source.shape(name):
            count *= length
        found += count * source.dtype(name).itemsize
    return found


def tensors_of(change: Change) -> list[Tensor]:
    """Return the tensors that a change holds."""
    values: list[Any] = [getattr(change, each.name) for each in fields(change)]  # type: ignore[arg-type]
    flat = [each for value in values for each in (value if isinstance(value, tuple) else (value,))]
    return [each for each in flat if isinstance(each, Tensor)]


def _held(
    expert: TensorSource,
    names: Sequence[str],
    shared: DictSource,
    starts: Mapping[str, Delta],
    load: Callable[[str, Tensor], Tensor],
) -> TensorSource:
    own: dict[str, Tensor] = {}
    changed: dict[str, tuple[Change, ...]] = {}
    for name in names:
        delta = delta_of(expert, name)
        if name not in starts or not delta.is_on(starts[name]):
            own[name] = load(name, delta.source.get(delta.key))
        if delta.changes:
            changed[name] = tuple(map(_copied, delta.changes))
    return HeldModel(expert.name, shared, own, changed) if starts else DictSource(expert.name, own)


def _copied(change: Change) -> Change:
    def copied(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(copied, value))
        return value.clone() if isinstance(value, Tensor) else value

    values = {each.name: copied(getattr(change, each.name)) for each in fields(change)}  # type: ignore[arg-type]
    return replace(change, **values)  # type: ignore[type-var]
