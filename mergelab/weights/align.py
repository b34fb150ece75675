"""Bring models of one architecture under common tensor names, and check that they match before weights are read.

Checkpoints of the same network name its tensors differently: google-bert/bert-base-uncased stores ``LayerNorm.gamma``
and two pretraining heads, openai-community/gpt2 omits the ``transformer.`` prefix and stores its attention masks.
`align` maps stored names to current ones, sets aside buffers and heads that have no counterpart by design, and raises
an error for any other difference.
"""

from __future__ import annotations

import cmath
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mergelab.errors import KeyMismatch, ModelError, NonFinite, ShapeMismatch, listed
from mergelab.weights.agreement import dtype_and_shape, joined, key_differences
from mergelab.weights.naming import (
    backbone_prefix as find_backbone_prefix,
)
from mergelab.weights.naming import (
    is_optional,
    is_position_buffer,
    is_stale,
    matches_any,
    missing_prefix,
    modern_name,
    names_outside_backbone,
)
from mergelab.weights.source import TensorSource

__all__ = ["AlignedModels", "RenamedSource", "align", "check_finite", "names_outside_backbone"]


@dataclass(frozen=True)
class RenamedSource:
    """A source under other names.

    Attributes:
        source: where the tensors are.
        stored: the stored name of each tensor, by the name it has here, including the further names of tied tensors.
    """

    source: TensorSource
    stored: dict[str, str]

    @property
    def name(self) -> str:
        """The model's name in error messages."""
        return self.source.name

    def keys(self) -> list[str]:
        """List the tensors, one name per group of tied tensors."""
        ties = self.aliases()
        return [key for key in self.stored if key not in ties]

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of ``key``."""
        return self.source.shape(self._at(key))

    def dtype(self, key: str) -> torch.dtype:
        """Return the dtype of ``key``."""
        return self.source.dtype(self._at(key))

    def get(self, key: str) -> Tensor:
        """Read ``key``."""
        return self.source.get(self._at(key))

    def prefetch(self, key: str) -> None:
        """Request that the data of ``key`` be read ahead in the background."""
        self.source.prefetch(self._at(key))

    def read_from(self, key: str) -> tuple[TensorSource, str]:
        """Return where ``key`` is read, as for `mergelab.weights.source.traced`."""
        return self.source, self._at(key)

    def aliases(self) -> dict[str, str]:
        """Return the further names of tied tensors."""
        ties = self.source.aliases()
        first: dict[str, str] = {}
        holders = {name: first.setdefault(ties.get(at, at), name) for name, at in self.stored.items()}
        return {name: holder for name, holder in holders.items() if name != holder}

    def _at(self, key: str) -> str:
        try:
            return self.stored[key]
        except KeyError:
            raise KeyMismatch(f"{self.name}: has no tensor {key!r}") from None


@dataclass(frozen=True)
class AlignedModels:
    """The input of a merge: the models under common names, and how each name is treated.

    Attributes:
        base: the base under the common names, or None.
        experts: the experts under the common names.
        names: floating-point tensors to merge, one per group of tied tensors, in the first expert's order.
        integers: integer and boolean tensors, equal in all models, to be copied.
        aliases: further names that experts have for tied tensors, each with the one in ``names`` (or ``experts_only``).
        base_only: pretraining heads and poolers, also tied ones, that only the base has; they are not merged.
        experts_only: heads and poolers that every expert has and the base lacks; the caller decides about them.
        ignored: names that fit an ``ignore`` pattern; they can still be read from the models that have them.
        dropped: stale buffers that are not merged.
        backbone: the prefix of the backbone's names ("bert."), or "" when the names show none.
        memo: results of preparing passes, for models that are merged repeatedly; None for a single merge.
    """

    base: TensorSource | None
    experts: tuple[TensorSource, ...]
    names: tuple[str, ...]
    integers: tuple[str, ...]
    aliases: dict[str, str]
    base_only: tuple[str, ...] = ()
    experts_only: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    backbone: str = ""
    memo: dict[str, Any] | None = None


@dataclass(frozen=True)
class _View:
    """A model while its names are aligned: stored names by common name, and which common names are heads."""

    source: TensorSource
    stored: dict[str, str]
    heads: frozenset[str]
    present: dict[str, None] = field(default_factory=dict)  # the names that are compared, in order

    @property
    def label(self) -> str:
        return repr(self.source.name)


def align(
    base: TensorSource | None,
    experts: Sequence[TensorSource],
    *,
    ignore: Sequence[str] = (),
    backbone_prefix: str | None = None,
    adapt: Callable[[Sequence[TensorSource]], Sequence[TensorSource]] | None = None,
) -> AlignedModels:
    """Bring models of one architecture under common names and check that names, shapes and integer tensors match.

    Common names have the current spelling (``LayerNorm.weight`` for ``gamma``) and the experts' backbone prefix. Stale
    buffers are dropped. Integer tensors must be equal. The only tensors that are read are integer tensors, and matrices
    that some models lack, to see whether they are copies of a tied one.

    Args:
        base: the pretrained model, or None.
        experts: at least one model.
        ignore: shell-style patterns of common names that are handled elsewhere (heads, passthrough).
        backbone_prefix: the backbone's prefix, as in transformers' ``base_model_prefix`` ("bert."); "" for none, so
            that no tensor counts as a head; default: found from the names.
        adapt: receives the models under common names, the base first; returns the sources to compare and merge instead.

    Raises:
        KeyMismatch: lists what a model lacks or has in addition. Heads and poolers may be in the base alone, or in all
            experts and not in the base.
        ShapeMismatch: names tensor, shapes and models; also for floating point in one model and integer in another.
        ModelError: no experts, or integer tensors that differ.
    """
    if not experts:
        raise ModelError("no experts to merge")
    views = [_modern(source, backbone_prefix) for source in ([base] if base is not None else []) + list(experts)]
    views = _same_prefix(views, first_expert=0 if base is None else 1)
    heads = frozenset[str]().union(*(view.heads for view in views))
    views, ignored, dropped = _set_aside(views, ignore)
    ties = _tied_groups(views)
    in_experts = {key for view in views[-len(experts) :] for key in view.stored}
    aliases = {alias: key for alias, key in ties.items() if alias in in_experts}
    views = [_without_aliases(view, ties, aliases) for view in views]
    if adapt is not None:
        adapted = adapt([RenamedSource(view.source, view.stored) for view in views])
        views = [
            replace(view, source=source, stored={name: name for name in view.stored})
            for view, source in zip(views, adapted, strict=True)
        ]

    base_view = views[0] if base is not None else None
    expert_views = views[1:] if base is not None else views
    base_only, experts_only = _check_keys(base_view, expert_views, heads)
    _check_shapes(views)
    common = [key for key in expert_views[0].present if key not in experts_only]
    names = tuple(key for key in common if _dtype(expert_views[0], key).is_floating_point)
    integers = tuple(key for key in common if not _dtype(expert_views[0], key).is_floating_point)
    _check_integers(views, integers)
    renamed = [RenamedSource(view.source, view.stored) for view in views]
    return AlignedModels(
        base=renamed[0] if base is not None else None,
        experts=tuple(renamed[1:] if base is not None else renamed),
        names=names,
        integers=integers,
        aliases={alias: key for alias, key in aliases.items() if key in expert_views[0].present},
        base_only=(*base_only, *(alias for alias in ties if alias not in aliases)),
        experts_only=experts_only,
        ignored=ignored,
        dropped=dropped,
        backbone=find_backbone_prefix(expert_views[0].stored) if backbone_prefix is None else backbone_prefix,
    )


def check_finite(source: TensorSource, key: str, tensor: Tensor) -> None:
    """Raise `NonFinite`, naming the model and the tensor, when ``tensor`` holds NaN or infinity.

    A finite tensor costs one pass without temporaries, as a sum is finite only if every entry is.
    """
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.numel() == 0:
        return
    wide = tensor.float() if tensor.element_size() == 1 else tensor  # no sums of 8-bit floats
    dtype = torch.float32 if wide.dtype in (torch.float16, torch.bfloat16) else None
    if cmath.isfinite(wide.detach().sum(dtype=dtype).item()):
        return
    bad = ~torch.isfinite(wide.detach())
    if count := int(bad.sum()):  # else the sum of finite entries overflowed
        first = torch.nonzero(bad)[0].tolist()
        raise NonFinite(
            f"{source.name}: {key} holds NaN or infinity ({count} of {tensor.numel()} entries, the first at {first})"
        )


def _modern(source: TensorSource, prefix: str | None) -> _View:
    """View a model under current names; its heads are those that its own names show."""
    stored: dict[str, str] = {}
    for key in [*source.keys(), *source.aliases()]:
        name = modern_name(key)
        if name in stored:
            raise KeyMismatch(f"{source.name}: {stored[name]} and {key} are the same tensor in two spellings")
        stored[name] = key
    own = find_backbone_prefix(stored) if prefix is None else prefix
    if not any(key.startswith(own) for key in stored):  # saved without the prefix, so without heads
        own = ""
    return _View(source, stored, frozenset(key for key in stored if not key.startswith(own)))


def _same_prefix(views: list[_View], first_expert: int) -> list[_View]:
    """Add the backbone's prefix where it is missing, or strip it from a base whose experts do not have it."""
    target = views[first_expert].stored
    for view in views[first_expert + 1 :]:
        if missing_prefix(target, view.stored):
            target = view.stored
    adapted = []
    for view in views:
        if prefix := missing_prefix(view.stored, target):
            renaming = {key: key if key in target else prefix + key for key in view.stored}
        elif prefix := missing_prefix(target, view.stored):
            renaming = {key: key.removeprefix(prefix) for key in view.stored}
            view = replace(view, heads=frozenset(key for key in view.stored if not key.startswith(prefix)))
        else:
            renaming = {key: key for key in view.stored}
        if len(set(renaming.values())) < len(renaming):
            raise KeyMismatch(f"{view.label}: names clash once the prefix {prefix!r} is added or removed")
        stored = {renaming[key]: at for key, at in view.stored.items()}
        adapted.append(_View(view.source, stored, frozenset(renaming[key] for key in view.heads)))
    return adapted


def _set_aside(views: list[_View], ignore: Sequence[str]) -> tuple[list[_View], tuple[str, ...], tuple[str, ...]]:
    """Exclude ignored names and stale buffers from the comparison; position ids only where some model lacks them."""
    ignored: dict[str, None] = {}
    dropped: dict[str, None] = {}
    everywhere = set(views[0].stored).intersection(*(view.stored for view in views))
    result = []
    for view in views:
        present: dict[str, None] = {}
        for key, stored in view.stored.items():
            if is_stale(view.source, stored) or (key not in everywhere and is_position_buffer(view.source, stored)):
                dropped[key] = None
            elif matches_any(key, ignore):
                ignored[key] = None
            else:
                present[key] = None
        result.append(replace(view, present=present))
    return result, tuple(ignored), tuple(dropped)


def _tied_groups(views: list[_View]) -> dict[str, str]:
    """Return ``{alias: name}`` for tensors that are tied in every model that stores both names.

    Every model has the name. A tensor that is tied in one model and separate in another is no alias.
    """
    holders = [_ties(view, views) for view in views]
    pairs = [(alias, key) for ties in holders for alias, key in ties.items()]
    groups: dict[str, set[str]] = {}
    for a, b in pairs:
        merged = groups.get(a, {a}) | groups.get(b, {b})
        groups.update(dict.fromkeys(merged, merged))
    rank = {key: i for view in reversed(views) for i, key in enumerate(view.present)}
    aliases: dict[str, str] = {}
    for group in {frozenset(group) for group in groups.values()}:
        everywhere = [key for key in group if all(key in view.present for view in views)]
        if not everywhere:
            continue
        name = min(everywhere, key=lambda key: (rank[key], key))
        for alias in group - {name}:
            if all(
                alias not in view.present or ties.get(alias, alias) == ties.get(name, name)
                for view, ties in zip(views, holders, strict=True)
            ):
                aliases[alias] = name
    return dict(sorted(aliases.items()))


def _ties(view: _View, views: list[_View]) -> dict[str, str]:
    """Return a model's tied names: those that share memory, and equal matrices of which other models store one."""
    here = {stored: name for name, stored in view.stored.items()}
    ties = {here[alias]: here[key] for alias, key in view.source.aliases().items()}
    ties = {alias: key for alias, key in ties.items() if alias in view.present and key in view.present}
    everywhere = set(view.present).intersection(*(other.present for other in views))
    for key in view.present:
        if key in everywhere or key in ties or key in ties.values() or len(_shape(view, key)) < 2:
            continue
        for other in view.present:
            if other in everywhere and _same_values(view, key, other):
                ties[key] = ties.get(other, other)
                break
    return ties


def _same_values(view: _View, a: str, b: str) -> bool:
    if a == b or _shape(view, a) != _shape(view, b) or _dtype(view, a) != _dtype(view, b) or 0 in _shape(view, a):
        return False
    left, right = view.source.get(view.stored[a]), view.source.get(view.stored[b])
    return bool(left[0].any()) and torch.equal(left[0], right[0]) and torch.equal(left, right)


def _without_aliases(view: _View, ties: dict[str, str], shared: dict[str, str]) -> _View:
    """Exclude tied names from the comparison; make the ``shared`` ones readable in models that do not store them."""
    stored = {key: at for key, at in view.stored.items() if key not in ties}
    stored |= {alias: view.stored[alias] for alias in ties if alias in view.stored}
    stored |= {alias: view.stored[name] for alias, name in shared.items() if alias not in stored}
    return replace(view, stored=stored, present={key: None for key in view.present if key not in ties})


def _check_keys(
    base: _View | None, experts: Sequence[_View], heads: frozenset[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Check the names; return the allowed ones that only the base has, and those that only the experts have."""
    in_some = {key for view in experts for key in view.present}
    in_all = in_some.intersection(*(view.present for view in experts))
    compared = [(view.label, set(view.present)) for view in experts]
    base_only: tuple[str, ...] = ()
    experts_only: tuple[str, ...] = ()
    if base is not None:
        optional = {key for key in in_some | base.present.keys() if key in heads or is_optional(key)}
        base_only = tuple(key for key in base.present if key not in in_some and key in optional)
        experts_only = tuple(
            key for key in experts[0].present if key in in_all and key not in base.present and key in optional
        )
        compared.insert(0, (base.label, base.present.keys() - set(base_only) | set(experts_only)))
    ordered = list(dict.fromkeys(key for view in [*([base] if base else []), *experts] for key in view.present))
    if difference := key_differences([(label, [key for key in ordered if key in keys]) for label, keys in compared]):
        raise KeyMismatch(f"tensor names differ: {difference}")
    return base_only, experts_only


def _check_shapes(views: Sequence[_View]) -> None:
    first: dict[str, _View] = {}
    clashes = []
    for view in views:
        for key in view.present:
            reference = first.setdefault(key, view)
            ours, theirs = (_dtype(view, key), _dtype(reference, key))
            alike = ours == theirs or (ours.is_floating_point and theirs.is_floating_point)
            if not alike or _shape(view, key) != _shape(reference, key):
                clashes.append(
                    f"{key} is {dtype_and_shape(_shape(reference, key), theirs)} in {reference.label} "
                    f"but {dtype_and_shape(_shape(view, key), ours)} in {view.label}"
                )
    if clashes:
        raise ShapeMismatch(joined(clashes))


def _check_integers(views: Sequence[_View], integers: Sequence[str]) -> None:
    for key in integers:
        reference = views[0].source.get(views[0].stored[key])
        differing = [v.label for v in views[1:] if not torch.equal(v.source.get(v.stored[key]), reference)]
        if differing:
            raise ModelError(
                f"{key} holds integers, which are copied and so must be equal, "
                f"but {listed(differing)} differs from {views[0].label}"
            )


def _shape(view: _View, key: str) -> tuple[int, ...]:
    return view.source.shape(view.stored[key])


def _dtype(view: _View, key: str) -> torch.dtype:
    return view.source.dtype(view.stored[key])
