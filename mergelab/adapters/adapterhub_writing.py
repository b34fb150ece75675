"""Write adapters as the Adapters library loads them with its defaults: ``model.load_adapter(folder)``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergelab.adapters.locations import FUSED, MODEL_TYPES, Place, place_of
from mergelab.adapters.writing import SITES, LoraFolder, new_folder, sites, write_json_file
from mergelab.errors import ConfigError, listed
from mergelab.weights.adapters import ADAPTER_CONFIG, HEAD_CONFIG, HEAD_WEIGHTS, LIBRARY_WEIGHTS

NAME = "merged"  # what the library calls the adapter
VERSION = "adapters.1.3.0"  # the version whose format is written
_HOLDS = "save.library=peft or save.form=dense can hold it"


@dataclass(frozen=True)
class Described:
    """What the library writes of the model beside an adapter or a head.

    Attributes:
        model_type, model_class: of the base.
        model_name: a hub id or a folder.
        hidden_size: None where a model has more than one.
    """

    model_type: str
    model_class: str
    model_name: str
    hidden_size: int | None = None

    def config(self, inner: Mapping[str, Any] | None, **further: Any) -> dict[str, Any]:
        """Return an ``adapter_config.json`` or a ``head_config.json`` with ``inner`` as what it describes."""
        return {**vars(self), "name": NAME, "config": inner, "version": VERSION, **further}


@dataclass(frozen=True)
class _Layer:
    """LoRA of one layer: for each matrix in it, up to three in fused ones, A (r, inputs) and B (rows, r)."""

    place: Place
    blocks: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


def check_library_model(config: Mapping[str, Any], form: str) -> None:
    """Check that the library has models of a base's type built in.

    Raises:
        ConfigError: it has not.
    """
    parts = [config[part] for part in ("encoder", "decoder") if isinstance(config.get(part), Mapping)]
    for one in (config, *parts):
        if (kind := one.get("model_type")) not in MODEL_TYPES:
            raise ConfigError(
                f"save.library=adapters: the Adapters library has no models of type {kind!r:.60}; save.library=peft "
                f"with save.form={form} can be written"
            )


def write_library_lora(folder: Path, adapter: LoraFolder, base: str, config: Mapping[str, Any]) -> None:
    """Write LoRA for the Adapters library; the folder exists once it is complete.

    The library has one rank for all layers: it is the largest, and the others are filled up with zeros. α is the rank,
    so that the scale is 1.

    Args:
        folder: does not exist, or is empty.
        adapter: what is written.
        base: a hub id or a folder.
        config: the adapted model's.

    Raises:
        ConfigError: something changes that LoRA of the library cannot hold.
        ModelError: there is nothing that changes, or the folder is in use or cannot be written.
    """
    factors = adapter.matrices()
    if others := [*adapter.biases, *adapter.modules, *[layer for layer in adapter.factors if layer not in factors]]:
        raise ConfigError(
            f"save.library=adapters: {listed(others, 3)} changes, where the Adapters library has no LoRA; {_HOLDS}"
        )
    layers = {layer: _layer(layer, *pair) for layer, pair in factors.items()}
    matrices = [key for key in FUSED if any(key in each.blocks for each in layers.values())]
    ranks = [a.shape[0] for layer in layers.values() for a, _ in layer.blocks.values()]
    rank = max(ranks, default=1)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        wanted = matrices if layer.place.matrices == FUSED else list(layer.blocks)
        a, b = next(iter(layer.blocks.values()))
        none = (a.new_zeros(0, a.shape[1]), b.new_zeros(b.shape[0], 0))
        filled = [_filled(*layer.blocks.get(matrix, none), rank) for matrix in wanted]
        tensors[f"{name}.loras.{NAME}.lora_A"] = torch.cat([a for a, _ in filled])
        tensors[f"{name}.loras.{NAME}.lora_B"] = torch.cat([b for _, b in filled])
    width = config.get("hidden_size", config.get("n_embd"))
    model = Described(str(config.get("model_type")), type(adapter.module).__name__, base, width)
    flags = {f"{at}_lora": any(layer.place.location == at for layer in layers.values()) for at in _LOCATIONS}
    with new_folder(folder, adapter) as making:
        torch.save(tensors, making / LIBRARY_WEIGHTS[0])
        write_json_file(making / SITES, sites(adapter))
        if adapter.heads:
            torch.save({name: tensor.contiguous() for name, tensor in adapter.heads.items()}, making / HEAD_WEIGHTS[0])
            labels = {str(label): int(at) for at, label in (config.get("id2label") or {}).items()}
            head = model.config(None, label2id=labels, num_labels=len(labels)) | {"name": None}
            write_json_file(making / HEAD_CONFIG, head)
        write_json_file(making / ADAPTER_CONFIG, model.config(_lora_config(rank, matrices, flags)))


_LOCATIONS = ("selfattn", "intermediate", "output")


def _lora_config(rank: int, matrices: list[str], flags: Mapping[str, bool]) -> dict[str, Any]:
    return {
        "architecture": "lora",
        **flags,
        "leave_out": [],
        "r": rank,
        "alpha": rank,
        "dropout": 0.0,
        "attn_matrices": matrices,
        "composition_mode": "add",
        "init_weights": "lora",
        "init_weights_seed": None,
        "use_gating": False,
        "use_dora": False,
        "vera_d": None,
        "vera_b": None,
        "dtype": None,
    }


def _layer(name: str, a: Tensor, b: Tensor) -> _Layer:
    """Return what the library has in a layer, of A (r, inputs) and B (outputs, r)."""
    place = place_of(name)
    if place is None:
        raise ConfigError(f"save.library=adapters: {name} changes, where the Adapters library has no LoRA; {_HOLDS}")
    if place.matrices != FUSED:
        return _Layer(place, {place.matrices: (a, b)})
    blocks = {}
    for matrix, rows in zip(FUSED, b.chunk(3), strict=True):
        used = rows.any(dim=0)  # a block of the library's own has its columns alone
        if used.any():
            blocks[matrix] = (a[used], rows[:, used])
    return _Layer(place, blocks or {FUSED[0]: (a[:1], b.chunk(3)[0][:, :1])})


def _filled(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Fill A and B up with zeros to a rank."""
    lacking = rank - a.shape[0]
    return torch.cat([a, a.new_zeros(lacking, a.shape[1])]), torch.cat([b, b.new_zeros(b.shape[0], lacking)], dim=1)
