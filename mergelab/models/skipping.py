"""Tensors that skip the merge: layers that stay the base's, and weights that no checkpoint had."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from mergelab.config import LayersConfig
from mergelab.errors import ConfigError
from mergelab.models.heads import mean_of
from mergelab.weights.align import check_finite
from mergelab.weights.naming import layer_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mergelab.config import LeaveOut
    from mergelab.weights.align import AlignedModels
    from mergelab.weights.source import TensorSource


def left_out(names: Sequence[str], leave_out: LeaveOut, *, key: str) -> list[str]:
    """Return the tensors of layers that skip the merge.

    Args:
        names: of the models' tensors.
        leave_out: numbers of layers from 0, for encoder and decoder alike, or for each.
        key: what messages call them.

    Raises:
        ConfigError: there is no such layer.
    """
    layers = {name: found for name in names if (found := layer_of(name)) is not None}
    parts = {part for part, _ in layers.values()}
    if isinstance(leave_out, LayersConfig):
        wanted = {"encoder": leave_out.encoder, "decoder": leave_out.decoder}
        for part, numbers in wanted.items():
            if numbers and part not in parts:
                raise ConfigError(
                    f"{key}.{part}={numbers}: the models' layers are not those of a{'n' * (part == 'encoder')} {part}; "
                    f"{key}=[…] counts them as they are"
                )
            _check_numbers(f"{key}.{part}", numbers, {number for at, number in layers.values() if at == part})
    else:
        _check_numbers(key, leave_out, {number for _, number in layers.values()})
        wanted = dict.fromkeys(parts, leave_out)
    return [name for name, (part, number) in layers.items() if number in wanted.get(part, ())]


def _check_numbers(key: str, numbers: Sequence[int], there_are: Collection[int]) -> None:
    for number in numbers:
        if number not in there_are:
            known = f"layers 0 to {max(there_are)}" if there_are else "no numbered layers"
            raise ConfigError(f"{key}={list(numbers)}: there is no layer {number}; the models have {known}")


def set_aside(
    aligned: AlignedModels,
    leave_out: Collection[str] = (),
    new: Sequence[Collection[str]] = (),
    dtype: torch.dtype | None = None,
) -> tuple[AlignedModels, dict[str, Tensor]]:
    """Take tensors out of the merge; return the models without them, and what the merged model has in their place.

    For layers that skip the merge: the base's. For a tensor that is newly initialised in some model: the mean
    of the experts in which it is not; if there is none, the base's; if it is new there too, the base's all the same, or
    the first expert's where there is no base.

    Args:
        aligned: the models.
        leave_out: names of tensors that stay the base's.
        new: for each model, the base first where there is one, which tensors are newly initialised.
        dtype: what means are rounded to, once; default: the first expert's that is averaged.

    Raises:
        NonFinite: one of these tensors holds NaN or infinity.
    """
    others: dict[str, Tensor] = {}
    any_new = frozenset[str]().union(*new)
    experts_new = new[-len(aligned.experts) :] if new else ()
    first = aligned.base or aligned.experts[0]
    for name in aligned.names:
        if name in leave_out:
            others[name] = _checked(first, name)
        elif name in any_new:
            trained = [expert for expert, own in zip(aligned.experts, experts_new, strict=True) if name not in own]
            others[name] = mean_of(trained, name, dtype) if trained else _checked(first, name)
    merged = tuple(name for name in aligned.names if name not in others)
    ties = {alias: name for alias, name in aligned.aliases.items() if name not in others}
    others |= {alias: others[name] for alias, name in aligned.aliases.items() if name in others}
    return replace(aligned, names=merged, aliases=ties), others


def _checked(source: TensorSource, name: str) -> Tensor:
    tensor = source.get(name)
    check_finite(source, name, tensor)
    return tensor
