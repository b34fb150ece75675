"""LoRA of parameters that are no layer's weight, such as the stacked experts of mixture models (``target_parameters``).

PEFT wraps the module that owns the parameters once for each of them, the first innermost, and stores the factors of all
experts of a parameter in one pair of matrices.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mergelab.adapters.canonical import Adapter, Factors, Stack
from mergelab.adapters.peft_types import scale_of
from mergelab.errors import KeyMismatch, ModelError, ShapeMismatch

if TYPE_CHECKING:
    from torch import nn

_WRAPPER = ".base_layer"


def with_parameters(adapter: Adapter, module: nn.Module | None) -> Adapter:
    """Tell the factors of parameters from those of layers, by PEFT's rule.

    Args:
        adapter: as it was read; its factors are by the module that PEFT wrapped.
        module: the adapted model without weights.

    Returns:
        The adapter, with the factors of parameters in ``stacks``.

    Raises:
        ModelError: transformers has no class for the model. KeyMismatch, ShapeMismatch: the factors are not those of
            the parameters that the configuration names.
    """
    if not adapter.target_parameters:
        return adapter
    if module is None:
        raise ModelError(f"{adapter.name}: target_parameters needs a model that transformers has a class for")
    owners: dict[str, dict[int, Factors]] = {}
    for site, factors in adapter.factors.items():
        owner = site
        while owner.endswith(_WRAPPER):
            owner = owner.removesuffix(_WRAPPER)
        owners.setdefault(owner, {})[(len(site) - len(owner)) // len(_WRAPPER)] = factors
    layers: dict[str, Factors] = {}
    stacks: dict[str, Stack] = {}
    for owner, levels in owners.items():
        targets = _targets(owner, module, adapter)
        if not targets:
            layers |= {owner + _WRAPPER * depth: factors for depth, factors in levels.items()}
            continue
        if levels.keys() != set(range(len(targets))):
            raise KeyMismatch(
                f"{adapter.name}: target_parameters names {len(targets)} parameters of {owner}, and the adapter has "
                f"factors of {len(levels)}"
            )
        parent = _parent(owner, module)
        for depth, name in zip(range(len(targets) - 1, -1, -1), targets, strict=True):
            stacks[f"{owner}.{name}"] = _stack(f"{owner}.{name}", getattr(parent, name), parent, levels[depth], adapter)
    if not stacks:
        raise KeyMismatch(f"{adapter.name}: target_parameters is set, and the adapter has no factors of parameters")
    return replace(adapter, factors=layers, stacks=stacks)


def _parent(owner: str, module: nn.Module) -> nn.Module | None:
    """Return the module of a name, which may have the body's prefix more, or less."""
    everywhere = dict(module.named_modules())
    near = (each for name, each in everywhere.items() if name and f".{name}".endswith(f".{owner}"))
    further = (each for name, each in everywhere.items() if name and f".{owner}".endswith(f".{name}"))
    return everywhere.get(owner) or next(near, None) or next(further, None)


def _targets(owner: str, module: nn.Module, adapter: Adapter) -> list[str]:
    """Return the names of a module's own parameters that the configuration names, in their order."""
    parent = _parent(owner, module)
    names = [] if parent is None else [name for name, _ in parent.named_parameters(recurse=False)]
    wanted = tuple(f".{each}" for each in adapter.target_parameters)
    return [name for name in names if f".{owner}.{name}".endswith(wanted)]


def _stack(name: str, parameter: Tensor, parent: Any, factors: Factors, adapter: Adapter) -> Stack:
    """Divide the factors of all experts: those of A follow each other, those of B alternate."""
    shape = tuple(parameter.shape)
    experts = shape[0] if len(shape) == 3 else 1
    rank, rest = divmod(factors.rank, experts)
    if rest or not rank or len(shape) not in (2, 3) or factors.embedding:
        raise ShapeMismatch(
            f"{adapter.name}: the factors of {name} have {factors.rank} ranks, and the parameter is {list(shape)}: it "
            "belongs to another base"
        )
    a = factors.a.reshape(experts, rank, -1)  # (experts, r, inputs)
    b = factors.b.reshape(len(factors.b), rank, experts).permute(2, 0, 1)  # (experts, outputs, r)
    across = len(shape) == 3 and bool(getattr(parent, "is_transposed", False))
    if across and experts == 1:
        raise ModelError(f"{adapter.name}: PEFT cannot adapt {name}, a stack of one transposed matrix")
    left, right = (a.mT, b.mT) if across else (b, a)
    if (left.shape[1], right.shape[2]) != shape[-2:]:
        raise ShapeMismatch(
            f"{adapter.name}: it was trained for a {name} of {left.shape[1]} × {right.shape[2]} for each expert, and "
            f"the model has {list(shape)}: it belongs to another base"
        )
    return Stack(left, right, scale_of(name, rank, adapter.settings, adapter.name), len(shape) == 3)
