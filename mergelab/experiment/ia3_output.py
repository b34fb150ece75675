"""A merge of IA³ adapters written as one: the vectors are merged as 1 + Σ w (l − 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mergelab.adapters.changes import Factor
from mergelab.adapters.checkpoint import changes_of
from mergelab.adapters.writing import Ia3Folder
from mergelab.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from mergelab.experiment.opening import OpenedModels


def merged_vectors(
    module: nn.Module,
    opened: OpenedModels,
    coefficients: Mapping[str, Sequence[float]],
    places: Mapping[str, str],
) -> Ia3Folder:
    """Merge IA³ experts, layer by layer; an expert that does not adapt a layer has l = 1 there.

    Args:
        module: the adapted model, without weights.
        opened: the models.
        coefficients: the experts' weights w, by tensor.
        places: the name in the module of each tensor.

    Raises:
        ConfigError: something changes that is no IA³; a layer's bias is merged otherwise than its weight.
    """
    merged: dict[str, tuple[Tensor, int]] = {}
    for name in opened.aligned.names:
        if (found := _vector(opened, name, coefficients[name])) is not None:
            merged[places[name]] = found
    folder = Ia3Folder(module)
    for place, (vector, axis) in merged.items():
        layer, _, leaf = place.rpartition(".")
        if leaf == "bias":
            continue
        folder.vectors[layer] = vector.float()
        across = type(module.get_submodule(layer)).__name__ == "Conv1D"
        if (axis == 0) == across:
            folder.of_inputs.add(layer)
    has_bias = set(places.values())
    for layer, vector in folder.vectors.items():
        bias = merged.get(f"{layer}.bias")
        wanted = layer not in folder.of_inputs and f"{layer}.bias" in has_bias
        if (bias is not None) != wanted or (bias is not None and not torch.equal(bias[0].float(), vector)):
            raise ConfigError(
                f"save.form=ia3: the weight and the bias of {layer} are merged with different weights, and IA³ has one "
                "vector for both; save.form=dense can hold it"
            )
    return folder


def _vector(opened: OpenedModels, name: str, weights: Sequence[float]) -> tuple[Tensor, int] | None:
    """Return 1 + Σ w (l − 1), float64, and the axis that it multiplies; None where no expert changes the tensor."""
    total: Tensor | None = None
    axis = 0
    for expert, weight in zip(opened.aligned.experts, weights, strict=True):
        changes = changes_of(expert, name)
        if changes is None or any(not isinstance(change, Factor) for change in changes) or len(changes) > 1:
            raise ConfigError(
                f"save.form=ia3: {expert.name} changes {name} by more than IA³; save.form=dense can hold it, and "
                "save.form=lora_cat sums of LoRA adapters"
            )
        for change in changes:
            assert isinstance(change, Factor)
            if total is not None and change.axis != axis:
                raise ConfigError(
                    f"save.form=ia3: experts multiply the inputs and the outputs of {name}; save.form=dense can hold it"
                )
            axis = change.axis
            own = weight * (change.vector.double() - 1)
            total = own if total is None else total + own
    return None if total is None else (1 + total, axis)
