"""Find the tensors of a base that an adapter changes, by the names that transformers has for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from mergelab.adapters.canonical import Stack
from mergelab.adapters.changes import Change, Factor, LowRank, Magnitude, Product, Replacement, Rows, Shift, Stacked
from mergelab.adapters.names import Names, adapted_class, named
from mergelab.adapters.parameters import with_parameters
from mergelab.adapters.pissa import Residual
from mergelab.adapters.ties import Ties, kept_ties
from mergelab.adapters.vera import projected_factors
from mergelab.errors import KeyMismatch, ModelError, ShapeMismatch
from mergelab.weights.agreement import dtype_and_shape
from mergelab.weights.skeleton import skeleton
from mergelab.weights.stored_rows import StoredRows, stored_rows

if TYPE_CHECKING:
    import torch
    from torch import nn

    from mergelab.adapters.canonical import Adapter, Factors
    from mergelab.weights.checkpoint import Checkpoint
    from mergelab.weights.source import TensorSource


@dataclass(frozen=True, eq=False)
class Placement:
    """An adapter on its base.

    Attributes:
        class_name: the class of the adapted model.
        source: the base's tensors, under the names that the adapted model's are read under.
        changes: what is changed, by these names.
        new: tensors that the base does not have, such as a head.
        apart: names that the base has tied to another one and the adapted model has not, each with the name under which
            the base's tensor is read.
        sizes: keys of the config that follow from tensors which the adapter replaces: ``vocab_size``, ``num_labels``.
    """

    class_name: str
    source: TensorSource
    changes: dict[str, list[Change]]
    new: dict[str, Replacement]
    apart: dict[str, str]
    sizes: dict[str, int]


def place(adapter: Adapter, base: Checkpoint, part: str | None = None) -> Placement:
    """Find what an adapter changes in a base.

    Args:
        adapter: in canonical form.
        base: the model that it was trained on.
        part: ``encoder`` or ``decoder`` for an adapter of a model that is one part of the base.

    Raises:
        KeyMismatch: names match nothing in the base; the line gives the first three and their number.
        ShapeMismatch: a tensor of the base has another shape than the adapter was trained for.
        ModelError: the base is quantised; the adapted model would have weights that are nowhere.
    """
    if base.is_quantised:
        raise ModelError(
            f"{adapter.name}: its base {base.name} is quantised; give the unquantised one, on which adapters that were "
            "trained with a quantised base (QLoRA) are merged too"
        )
    _check_type(adapter, base)
    class_name = adapted_class(adapter.task_type, adapter.class_name, base.config)
    module = skeleton(base.folder, {**base.config, "architectures": [class_name]})
    adapter = with_parameters(adapter, module)
    names = named(adapter.names, base, module, class_name, adapter.name, part)
    _check_layers(adapter, names, module)
    _check_modules(adapter, names, module)
    changes: dict[str, list[Change]] = {}
    for name, change in _changes(adapter, names, module, base):
        own = replace(change, kind=adapter.factor_kind) if isinstance(change, LowRank) else change
        changes.setdefault(name, []).append(own)
    if not names.other_class and (odd := stored_rows(module, base, changes.keys() & names.new)):
        name, parts = next(iter(odd.items()))
        raise _stored_otherwise(name, parts, adapter)
    new = {name: _only_replacement(name, changes.pop(name), adapter) for name in list(changes) if name in names.new}
    ties = kept_ties(changes, names, adapter, is_pair=_is_pair(base))
    _check_shapes(ties, names, adapter, base)
    _drop_copies(ties, names)
    _check_whole(module, names, new, base, adapter)
    real = _without_copies(ties, names)
    return Placement(class_name, names.source, real, new, ties.apart, _sizes(module, names, changes, new))


def _check_type(adapter: Adapter, base: Checkpoint) -> None:
    """Check that a base, or a part of it, is of the type that an adapter says it was made for."""
    parts = (base.config, base.config.get("encoder"), base.config.get("decoder"))
    types = [str(part.get("model_type")) for part in parts if isinstance(part, dict)]
    if adapter.model_type is not None and adapter.model_type not in types:
        raise ModelError(
            f"{adapter.name}: it was trained on a model of type {adapter.model_type}, and {base.name} is a {types[0]}"
        )


def _changes(
    adapter: Adapter, names: Names, module: nn.Module | None, base: Checkpoint
) -> Iterable[tuple[str, Change]]:
    """Yield what is changed, by the names of the module's tensors, in the order in which it applies to one tensor."""
    for name, tensor in adapter.tensors.items():
        if (at := names.of(name)) is not None:
            yield at, Replacement(tensor, may_grow=_may_grow(at, module))
    parts = _computed(adapter, names, module, base)
    for name, stack in adapter.stacks.items():
        if (at := names.of(name)) in parts:
            yield from ((part.stored, stack.change_of(part)) for part in parts[at])
        elif at is not None:
            yield at, stack.change()
    for layer, product in adapter.products.items():
        if (at := names.of(f"{layer}.weight")) is not None:
            yield at, product
    for layer, factors in {**adapter.factors, **_projected(adapter, names, module)}.items():
        if (at := names.of(f"{layer}.weight")) is None:
            continue
        if adapter.residual and not factors.embedding:
            yield at, _residual(layer, at, factors, names, adapter)
        across = factors.embedding or _is_transposed(at, module, adapter)
        change = LowRank.of(factors.a, factors.b, factors.scale, transposed=across)
        yield from _low_rank(layer, at, change, parts, adapter)
        if layer in adapter.magnitudes:
            yield at, Magnitude(adapter.magnitudes[layer], by_column=across)
        if layer in adapter.biases:
            yield _bias(at, names, adapter), Shift(adapter.biases[layer], factors.scale)
    for layer, vector in adapter.vectors.items():
        if (at := names.of(f"{layer}.weight")) is None:
            continue
        if vector.dim() != 2 or 1 not in vector.shape:
            raise ModelError(
                f"{adapter.name}: the IA³ vector of {layer} is {list(vector.shape)}: of linear layers only"
            )
        of_outputs = vector.shape[1] == 1
        yield at, Factor(vector.reshape(-1), axis=int(of_outputs == _is_transposed(at, module, adapter)))
        if of_outputs and (bias := names.bias(at)) is not None:
            yield bias, Factor(vector.reshape(-1), axis=0)
    for layer, (indices, values) in adapter.rows.items():
        if (at := names.of(f"{layer}.weight")) is not None:
            yield at, Rows(indices, values)


def _check_modules(adapter: Adapter, names: Names, module: nn.Module | None) -> None:
    """Check that modules which are stored whole have a weight and a bias; biases alone may be trained too.

    Raises:
        KeyMismatch: one of them is missing.
    """
    if module is None:
        return
    given, own = {names.of(name) for name in adapter.tensors}, module.state_dict().keys()
    saved = adapter.settings.get("modules_to_save")
    whole = [f".{each}." for each in saved] if isinstance(saved, list) else []
    for at in sorted(name for name in given if name is not None):
        parent, _, leaf = at.rpartition(".")
        other = f"{parent}.{'bias' if leaf == 'weight' else 'weight'}"
        if leaf != "weight" and not any(each in f".{parent}." for each in whole):
            continue
        if other in own and given.isdisjoint(names.tied.get(other, (other,))):
            raise KeyMismatch(f"{adapter.name}: it has {at} without {other}, which belongs to the same module")


def _stored_otherwise(name: str, parts: Sequence[StoredRows], adapter: Adapter) -> KeyMismatch:
    return KeyMismatch(
        f"{adapter.name}: it changes {name} by more than a low-rank product, and the base stores that in "
        f"{parts[0].stored}; merge it into its base (PeftModel.merge_and_unload) and save that"
    )


def _computed(
    adapter: Adapter, names: Names, module: nn.Module | None, base: Checkpoint
) -> dict[str, list[StoredRows]]:
    """Return the stored rows of those weights that the base does not store as the model has them."""
    if names.other_class:
        return {}
    wanted = [*adapter.stacks, *(f"{layer}.weight" for layer in (*adapter.factors, *adapter.projected))]
    found = {at for name in wanted if (at := names.of(name)) is not None}
    return stored_rows(module, base, found & names.new)


def _low_rank(
    layer: str, at: str, change: LowRank, parts: Mapping[str, Sequence[StoredRows]], adapter: Adapter
) -> Iterable[tuple[str, Change]]:
    """Yield a layer's low-rank change, for the matrices that are stored of its weight."""
    if at not in parts:
        yield at, change
        return
    if adapter.residual or layer in adapter.magnitudes or layer in adapter.biases:
        raise _stored_otherwise(at, parts[at], adapter)
    stack = Stack(change.left[None], change.right[None], change.scale, is_stacked=False)
    yield from ((part.stored, stack.change_of(part)) for part in parts[at])


def _residual(layer: str, at: str, factors: Factors, names: Names, adapter: Adapter) -> Residual:
    """Return what PiSSA did to a weight before it was trained."""
    if len(group := names.tied.get(at, (at,))) > 1:
        raise ModelError(
            f"{adapter.name}: init_lora_weights='pissa' changed {layer} together with "
            f"{next(each for each in group if each != at)}, which is tied to it; save it again with "
            "path_initial_model_for_weight_conversion, which converts it"
        )
    return Residual(factors.rank, f"{adapter.name}: {layer}")


def _projected(adapter: Adapter, names: Names, module: nn.Module | None) -> dict[str, Factors]:
    """Return VeRA's factors, which follow from the sizes of all its layers."""
    sizes: dict[str, tuple[int, int]] = {}
    dtypes: set[torch.dtype] = set()
    for layer in adapter.projected:
        if (at := names.of(f"{layer}.weight")) is None:
            continue
        if at in names.new:
            raise KeyMismatch(f"{adapter.name}: it changes {at}, which the base does not store by itself")
        if len(shape := names.source.shape(names.at(at))) != 2:
            raise ShapeMismatch(f"{adapter.name}: VeRA changes matrices, and {at} has {len(shape)} dimensions")
        sizes[layer] = (shape[1], shape[0]) if _is_transposed(at, module, adapter) else (shape[0], shape[1])
        dtypes.add(names.source.dtype(names.at(at)))
    return projected_factors(adapter.projected, sizes, dtypes, adapter.name)


def _check_layers(adapter: Adapter, names: Names, module: nn.Module | None) -> None:
    """Check that the adapter's type is one for the layers that it changes.

    Raises:
        ModelError: it is not.
    """
    if module is None or not adapter.layer_classes:
        return
    for layer in (*adapter.factors, *adapter.products, *adapter.projected):
        if (at := names.of(f"{layer}.weight")) is None:
            continue
        try:
            classes = [cls.__name__ for cls in type(module.get_submodule(at.rpartition(".")[0])).__mro__]
        except AttributeError:  # a layer in the files alone, as one of stacked experts
            continue
        if not set(classes) & set(adapter.layer_classes):
            raise ModelError(
                f"{adapter.name}: adapters of type {adapter.kind} are of layers of the classes "
                f"{', '.join(adapter.layer_classes)}, and {layer} is a {classes[0]}"
            )


def _is_transposed(name: str, module: nn.Module | None, adapter: Adapter) -> bool:
    """Return whether a layer's weight is stored as (inputs, outputs)."""
    if module is None:
        return adapter.fan_in_fan_out
    try:
        return type(module.get_submodule(name.rpartition(".")[0])).__name__ == "Conv1D"
    except AttributeError:
        return False


def _bias(weight: str, names: Names, adapter: Adapter) -> str:
    if (bias := names.bias(weight)) is None:
        raise KeyMismatch(f"{adapter.name}: lora_bias is set, and the base has no bias beside {weight}")
    return bias


def _may_grow(name: str, module: nn.Module | None) -> bool:
    """Return whether a tensor may have other rows than the base's: embeddings of tokens, and heads."""
    if module is None:
        return False
    prefix = str(getattr(module, "base_model_prefix", ""))
    is_head = hasattr(module, prefix) and not name.startswith(f"{prefix}.")
    return is_head or name in embeddings(module)


def embeddings(module: Any) -> list[str]:
    """Return the names of a model's input and output embedding, those that it has, the input's first."""
    found: list[str] = []
    parameters = list(module.named_parameters(remove_duplicate=False))
    for get in (module.get_input_embeddings, module.get_output_embeddings):
        try:
            weight = getattr(get(), "weight", None)
        except (NotImplementedError, AttributeError):
            continue
        found += [name for name, own in parameters if weight is not None and own is weight]
    return list(dict.fromkeys(found))


def _drop_copies(ties: Ties, names: Names) -> None:
    """Drop copies of the base's tensors, which PEFT stores beside the factors of an adapted embedding."""
    for name, own in ties.changes.items():
        if len(own) > 1 and isinstance(own[0], Replacement):
            stored = names.source.get(ties.apart.get(name, name))
            if stored.shape == own[0].values.shape and torch.equal(own[0].values.to(stored.dtype), stored):
                ties.changes[name] = own[1:]


def _is_pair(base: Checkpoint) -> bool:
    return bool(base.config.get("is_encoder_decoder")) or base.config.get("model_type") == "encoder-decoder"


def _only_replacement(name: str, changes: Sequence[Change], adapter: Adapter) -> Replacement:
    first = changes[0]
    if len(changes) != 1 or not isinstance(first, Replacement):
        raise KeyMismatch(f"{adapter.name}: it changes {name}, which the base does not have")
    return first


def _check_shapes(ties: Ties, names: Names, adapter: Adapter, base: Checkpoint) -> None:
    for name, changes in ties.changes.items():
        held = ties.apart.get(name, name)
        dtype, stored = names.source.dtype(held), tuple(names.source.shape(held))
        if not dtype.is_floating_point:
            raise ModelError(f"{adapter.name}: it changes {name}, which holds integers in {base.name}")
        shape = stored
        for change in changes:
            after = change.shape(shape)
            if after is None:
                raise ShapeMismatch(
                    f"{adapter.name}: it was trained for a {name} of shape {_wanted(change)}, and that of {base.name} "
                    f"is {dtype_and_shape(stored, dtype)}: it belongs to another base"
                )
            shape = after


def _without_copies(ties: Ties, names: Names) -> dict[str, list[Change]]:
    """Leave out copies of the base's own tensors, as libraries save them with a head."""
    found: dict[str, list[Change]] = {}
    for name, changes in ties.changes.items():
        first = changes[0]
        stored = names.source.get(ties.apart.get(name, name)) if isinstance(first, Replacement) else None
        is_copy = stored is not None and first.same_as(Replacement(stored))
        if own := changes[1:] if is_copy else changes:
            found[name] = own
    return found


def _wanted(change: Change) -> list[int] | str:
    """Return the shape that a change is for, in the layout in which the tensor is stored."""
    if isinstance(change, LowRank | Product | Stacked):
        return list(change.product_shape)
    if isinstance(change, Replacement):
        return list(change.values.shape)
    if isinstance(change, Rows):
        return f"[more than {int(change.indices.max())}, {change.values.shape[1]}]"
    if isinstance(change, Residual):
        return "(outputs, inputs)"
    vector = change.magnitude if isinstance(change, Magnitude) else change.vector  # type: ignore[attr-defined]
    return f"with {vector.numel()} entries along one axis"


def _check_whole(
    module: nn.Module | None, names: Names, new: dict[str, Replacement], base: Checkpoint, adapter: Adapter
) -> None:
    """Check that a model of another class than the base's has all its weights, in the base or in the adapter."""
    if module is None or not names.other_class:
        return
    available = {*names.source.keys(), *names.source.aliases(), *new}
    lacking = [
        name
        for name, _ in module.named_parameters()
        if name not in available and not any(other in available for other in names.tied.get(name, ()))
    ]
    if lacking:
        shown = ", ".join(lacking[:3]) + (f" and {len(lacking) - 3} more" if len(lacking) > 3 else "")
        raise ModelError(
            f"{adapter.name}: a {type(module).__name__} has {shown}, which are neither in the adapter nor in its base "
            f"{base.name}: transformers would draw them at random"
        )


def _sizes(
    module: nn.Module | None, names: Names, changes: dict[str, list[Change]], new: dict[str, Replacement]
) -> dict[str, int]:
    """Find the keys of the config that follow from replaced tensors."""
    first = {**{name: each for name, all_of in changes.items() for each in all_of[:1]}, **new}
    replaced = {name: each for name, each in first.items() if isinstance(each, Replacement)}
    if module is None or not replaced:
        return {}
    own = module.state_dict()
    grown = {
        name: each.values.shape[0]
        for name, each in replaced.items()
        if name in own and each.values.shape != own[name].shape
    }
    for name, rows in grown.items():
        for leaf in ("weight", "bias"):
            beside = f"{name.rpartition('.')[0]}.{leaf}"
            if beside in own and grown.get(beside, own[beside].shape[0]) != rows:
                raise ShapeMismatch(
                    f"{names.label}: its {name} has {rows} rows, and {beside} has "
                    f"{grown.get(beside, own[beside].shape[0])}: they do not fit together"
                )
    tokens = {grown[name] for name in embeddings(module) if name in grown}
    outputs = {rows for name, rows in grown.items() if name not in embeddings(module)}
    if len(tokens) > 1 or len(outputs) > 1:
        raise ShapeMismatch(f"{names.label}: the tensors of {', '.join(grown)} do not fit together")
    return {**({"vocab_size": tokens.pop()} if tokens else {}), **({"num_labels": outputs.pop()} if outputs else {})}
