"""Read and write PyTorch modules as containers of named tensors."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mergelab.errors import KeyMismatch, ModelError, ShapeMismatch, listed
from mergelab.weights.adapters import refuse_adapted
from mergelab.weights.agreement import dtype_and_shape, joined
from mergelab.weights.quantised import refuse_quantised, refuse_quantised_class
from mergelab.weights.source import TensorInfo, tied_names


def module_of(model: object) -> nn.Module | None:
    """Return the module itself, or the one inside a transformers pipeline; None for anything else."""
    if isinstance(model, nn.Module):
        return model
    inner = getattr(model, "model", None)
    return inner if isinstance(inner, nn.Module) else None


def mergeable(name: str, tensors: dict[str, Tensor], module: nn.Module | None = None) -> dict[str, Tensor]:
    """Return a model's tensors after checking that they are there, and neither quantised nor those of an adapter.

    Args:
        name: what errors call the model.
        tensors: a state dict, or the parameters of ``module``.
        module: where they come from.

    Raises:
        ModelError: they are.
    """
    refuse_adapted(name, tensors, module)
    infos = [TensorInfo(key, tuple(t.shape), t.dtype) for key, t in tensors.items() if isinstance(t, Tensor)]
    stored = {} if module is None else dict(module.named_buffers())  # where some methods keep packed weights and scales
    infos += [TensorInfo(key, tuple(t.shape), t.dtype) for key, t in stored.items() if key not in tensors]
    for key, tensor in tensors.items():
        refuse_quantised_class(name, key, type(tensor))
        if isinstance(tensor, Tensor) and tensor.is_meta:
            raise ModelError(
                f"{name}: {key} has no values (it is on the meta device: offloaded, or never loaded); give the "
                "model's folder, or load it with device_map='cpu'"
            )
    refuse_quantised(name, infos)
    return tensors


def copy_module(module: nn.Module) -> nn.Module:
    """Copy a module with its weights; tied parameters stay tied."""
    with torch.no_grad():
        return copy.deepcopy(module)


# The weights of a module that it has elsewhere while it does not compute, by name (`mergelab.evaluation.spread`).
OFFLOADED: WeakKeyDictionary[nn.Module, Mapping[str, Tensor]] = WeakKeyDictionary()


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer by name, a tied one under each of its names."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
        **OFFLOADED.get(module, {}),
    }


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], *, strict: bool = True) -> nn.Module:
    """Copy ``tensors`` into the module's memory, in the module's dtypes, and return the module.

    A tied tensor may be given under any of its names. Nothing is written unless everything matches.

    Args:
        module: is written into.
        tensors: parameters and buffers by name.
        strict: whether every parameter must be given; those that follow from the config are computed instead.

    Raises:
        KeyMismatch: names that the module does not have, or, when ``strict``, parameters that are not given.
        ShapeMismatch: lists tensors whose shapes differ, or that are floating point in one and integer in the other.
        ModelError: two names of one tied tensor are given different values.
    """
    label = type(module).__name__
    own = named_tensors(module)
    if unknown := [key for key in tensors if key not in own]:
        raise KeyMismatch(f"{label} has no tensor {listed(unknown)}")
    ties = tied_names(own)
    chosen: dict[str, str] = {}
    for key, value in tensors.items():
        first = chosen.setdefault(ties.get(key, key), key)
        if first != key and not torch.equal(tensors[first], value):
            raise ModelError(f"{first} and {key} are one tied tensor in {label}, but are given different values")
    absent = [name for name, _ in module.named_parameters() if ties.get(name, name) not in chosen]
    if strict and (missing := [name for name in absent if not _is_computed(module, name)]):
        raise KeyMismatch(f"the tensors for {label} lack {listed(missing)}")
    clashes = [
        f"{key} is {dtype_and_shape(own[key].shape, own[key].dtype)} in {label} but "
        f"{dtype_and_shape(value.shape, value.dtype)} is given"
        for key, value in tensors.items()
        if own[key].shape != value.shape or own[key].is_floating_point() != value.is_floating_point()
    ]
    if clashes:
        raise ShapeMismatch(joined(clashes))
    with torch.no_grad():
        for name in absent if strict else ():
            module._init_weights(module.get_submodule(name.rpartition(".")[0]))  # type: ignore[operator]
        for key in chosen.values():
            own[key].copy_(tensors[key])
    return module


def _is_computed(module: nn.Module, name: str) -> bool:
    """Return whether a parameter follows from the config, so that transformers does not store it: fixed positions."""
    return any(re.search(pattern, name) for pattern in getattr(module, "_keys_to_ignore_on_save", None) or ())
