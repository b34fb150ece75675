"""Write adapters as the Adapters library loads them with its defaults: ``model.load_adapter(folder)``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mergelab.adapters.locations import FUSED, LOCATIONS, MODEL_TYPES, Place, place_of
from mergelab.adapters.writing import SITES, Ia3Folder, LoraFolder, whole_folder, write_json_file
from mergelab.errors import ConfigError, ModelError, listed
from mergelab.weights.adapters import ADAPTER_CONFIG, HEAD_CONFIG, HEAD_WEIGHTS, LIBRARY_WEIGHTS
from mergelab.weights.writer import write_texts

NAME = "merged"  # what the library calls the adapter
VERSION = "adapters.1.3.0"  # the version whose format is written
_HOLDS = "save.library=peft or save.form=dense can hold it"

Blocks = dict[str, tuple[Tensor, ...]]  # by matrix: B (rows, r) and A (r, inputs) of LoRA, or the vector of IA³


def check_library_model(config: Mapping[str, Any]) -> None:
    """Check that the Adapters library has models of a base's type built in.

    Raises:
        ConfigError: it has not.
    """
    parts = [config[part] for part in ("encoder", "decoder") if isinstance(config.get(part), Mapping)]
    for one in (config, *parts):
        if (kind := one.get("model_type")) not in MODEL_TYPES:
            raise ConfigError(
                f"save.library=adapters: the Adapters library has no models of type {kind!r:.60}; save.library=peft "
                "can be written"
            )


def write_library_adapter(
    folder: Path,
    adapter: LoraFolder | Ia3Folder,
    *,
    base: str,
    config: Mapping[str, Any],
    documents: Mapping[str, str] | None = None,
) -> None:
    """Write LoRA or IA³ for the Adapters library; the folder exists once it is complete.

    The library has one rank for all layers: it is the largest, and the others are filled up with zeros. α is the rank,
    so that the scale is 1. A head goes beside it as that of the model's own class.

    Args:
        folder: does not exist, or is empty.
        adapter: what is written.
        base: a hub id or a folder.
        config: the adapted model's.
        documents: the texts of further files, by their names.

    Raises:
        ConfigError: something changes that the library cannot hold.
        ModelError: there is nothing that changes, or the folder is in use or cannot be written.
    """
    if not adapter.layers:
        raise ModelError(f"{folder}: the merged model is its base, so that there is nothing to write as an adapter")
    is_lora = isinstance(adapter, LoraFolder)
    blocks = _lora_blocks(adapter) if isinstance(adapter, LoraFolder) else _ia3_blocks(adapter)
    matrices = [matrix for matrix in FUSED if any(matrix in each for each in blocks.values())]
    rank = max((each[0].shape[1] for layer in blocks.values() for each in layer.values()), default=1)
    tensors: dict[str, Tensor] = {}
    for layer, own in blocks.items():
        filled = _filled(own, matrices if _place(layer).matrices == FUSED else list(own), rank)
        for leaf, parts in zip(("lora_B", "lora_A"), zip(*filled, strict=True), strict=False):
            tensors[f"{layer}.loras.{NAME}.{leaf}"] = torch.cat(parts)
    flags = {f"{at}_lora": any(_place(layer).location == at for layer in blocks) for at in LOCATIONS}
    described = {"r": rank, "alpha": rank, "attn_matrices": matrices, **flags}
    described |= {"composition_mode": "add" if is_lora else "scale", "init_weights": "lora" if is_lora else "ia3"}
    with whole_folder(folder) as making:
        torch.save(tensors, making / LIBRARY_WEIGHTS[0])
        write_texts(making, documents or {})
        if sites := adapter.sites():
            write_json_file(making / SITES, sites)
        if adapter.heads:
            torch.save({name: tensor.contiguous() for name, tensor in adapter.heads.items()}, making / HEAD_WEIGHTS[0])
            labels = {str(label): int(at) for at, label in (config.get("id2label") or {}).items()}
            further = {"name": None, "label2id": labels, "num_labels": len(labels)}
            write_json_file(making / HEAD_CONFIG, {**described_model(adapter.module, base, config, None), **further})
        write_json_file(making / ADAPTER_CONFIG, described_model(adapter.module, base, config, _UNSET | described))


_UNSET: dict[str, Any] = {
    "architecture": "lora",
    "leave_out": [],
    "dropout": 0.0,
    "init_weights_seed": None,
    "use_gating": False,
    "use_dora": False,
    "vera_d": None,
    "vera_b": None,
    "dtype": None,
}


def described_model(
    module: nn.Module, base: str, config: Mapping[str, Any], inner: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return what the library writes into its configurations, with ``inner`` as that of an adapter or a head."""
    return {
        "config": inner,
        "hidden_size": config.get("hidden_size", config.get("n_embd", config.get("d_model"))),
        "model_class": type(module).__name__,
        "model_name": base,
        "model_type": config.get("model_type"),
        "name": NAME,
        "version": VERSION,
    }


def _place(layer: str) -> Place:
    place = place_of(layer)
    if place is None:
        raise ConfigError(
            f"save.library=adapters: {layer} changes, which the Adapters library does not adapt; {_HOLDS}"
        )
    return place


def _lora_blocks(adapter: LoraFolder) -> dict[str, Blocks]:
    """Return the factors of each layer, of fused ones by matrix: the columns of B that this matrix's rows have."""
    factors, found = adapter.matrices(), dict[str, Blocks]()
    if others := [*adapter.biases, *adapter.modules, *[layer for layer in adapter.layers if layer not in factors]]:
        raise ConfigError(
            f"save.library=adapters: {listed(others, 3)} changes, which the Adapters library does not adapt; {_HOLDS}"
        )
    for layer, (a, b) in factors.items():
        place = _place(layer)
        if place.matrices != FUSED:
            found[layer] = {place.matrices: (b, a)}
            continue
        found[layer] = {}
        for matrix, rows in zip(FUSED, b.chunk(3), strict=True):
            used = rows.any(dim=0)
            found[layer][matrix] = (rows[:, used], a[used])
        found[layer] = {matrix: pair for matrix, pair in found[layer].items() if pair[1].shape[0]}
    return {layer: each for layer, each in found.items() if each}


def _ia3_blocks(adapter: Ia3Folder) -> dict[str, Blocks]:
    """Return the vectors of each layer, (outputs, 1), of fused ones by matrix."""
    if adapter.of_inputs:
        raise ConfigError(
            f"save.library=adapters: the inputs of {listed(sorted(adapter.of_inputs), 3)} are multiplied, and the "
            f"Adapters library multiplies outputs alone; {_HOLDS}"
        )
    found: dict[str, Blocks] = {}
    for layer, vector in adapter.vectors.items():
        place, column = _place(layer), vector.reshape(-1, 1)
        pieces = zip(FUSED, column.chunk(3), strict=True) if place.matrices == FUSED else [(place.matrices, column)]
        found[layer] = {matrix: (rows,) for matrix, rows in pieces if place.matrices != FUSED or (rows != 1).any()}
    return {layer: each for layer, each in found.items() if each}


def _filled(own: Blocks, wanted: list[str], rank: int) -> list[tuple[Tensor, ...]]:
    """Return the blocks of all wanted matrices: LoRA filled up with zeros to a rank, IA³ with ones."""
    some = next(iter(own.values()))
    if len(some) == 1:
        return [own.get(matrix, (torch.ones_like(some[0]),)) for matrix in wanted]
    found: list[tuple[Tensor, ...]] = []
    for matrix in wanted:
        b, a = own.get(matrix, (some[0][:, :0], some[1][:0]))
        lacking = rank - a.shape[0]
        found.append(
            (
                torch.cat([b, b.new_zeros(b.shape[0], lacking)], dim=1),
                torch.cat([a, a.new_zeros(lacking, a.shape[1])]),
            )
        )
    return found
