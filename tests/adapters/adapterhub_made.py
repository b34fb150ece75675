"""Adapters in the Adapters library's format, written by hand: the library is not in this environment."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.conftest import Outcome

LORA = {
    **{"architecture": "lora", "selfattn_lora": True, "intermediate_lora": False, "output_lora": False},
    **{"leave_out": [], "r": 2, "alpha": 6, "dropout": 0.0, "attn_matrices": ["q", "v"], "composition_mode": "add"},
    **{"init_weights": "lora", "init_weights_seed": None, "use_gating": False, "use_dora": False},
    **{"vera_d": None, "vera_b": None, "dtype": None},
}
BOTTLENECK = {
    **{"mh_adapter": False, "output_adapter": True, "reduction_factor": 4, "non_linearity": "relu"},
    **{"original_ln_before": True, "original_ln_after": True, "scaling": 1.0, "use_gating": False, "leave_out": []},
    **{"init_weights": "bert", "dropout": 0.0},
}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def written(
    folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None = None, *, name: str = "a", **described: Any
) -> Path:
    """Write an adapter's folder; ``described`` replaces what is said of the model."""
    folder.mkdir(parents=True)
    whole = {
        **{"config": LORA if config is None else config, "name": name, "version": "adapters.1.3.0"},
        **{"model_type": "bert", "model_class": "BertForSequenceClassification", "model_name": "", "hidden_size": 16},
    }
    (folder / "adapter_config.json").write_text(json.dumps(whole | described))
    torch.save(tensors, folder / "pytorch_adapter.bin")
    return folder


def with_head(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None = None, **described: Any) -> Path:
    """Write a head beside an adapter."""
    cls = "BertForSequenceClassification" if config is None else "BertAdapterModel"
    whole = {"config": config, "name": None if config is None else "a", "model_type": "bert", "model_class": cls}
    whole |= {"label2id": {"x": 0, "y": 1}}
    (folder / "head_config.json").write_text(json.dumps(whole | described))
    torch.save(tensors, folder / "pytorch_model_head.bin")
    return folder


def lora(layers: dict[str, tuple[int, int]], rank: int = 2, *, name: str = "a", seed: int = 0) -> dict[str, Tensor]:
    """LoRA for layers, by outputs and inputs."""
    found = {}
    for number, (layer, (outputs, inputs)) in enumerate(layers.items()):
        found[f"{layer}.loras.{name}.lora_A"] = drawn(rank, inputs, seed=100 * seed + 2 * number)
        found[f"{layer}.loras.{name}.lora_B"] = drawn(outputs, rank, seed=100 * seed + 2 * number + 1)
    return found


def of_bert(rank: int = 2, *, name: str = "a", seed: int = 0) -> dict[str, Tensor]:
    """LoRA of queries and values of the small BERT's two layers."""
    layers = [f"bert.encoder.layer.{at}.attention.self.{what}" for at in (0, 1) for what in ("query", "value")]
    return lora(dict.fromkeys(layers, (16, 16)), rank, name=name, seed=seed)


def bottleneck(*, name: str = "a", seed: int = 0) -> dict[str, Tensor]:
    """Bottlenecks behind the two layers' outputs."""
    found = {}
    for at in (0, 1):
        start = f"bert.encoder.layer.{at}.output.adapters.{name}."
        shapes = {"adapter_down.0.weight": (4, 16), "adapter_down.0.bias": (4,), "adapter_up.weight": (16, 4)}
        for number, (leaf, shape) in enumerate(shapes.items()):
            found[start + leaf] = drawn(*shape, seed=100 * seed + 10 * at + number)
    return found


def merged(
    command: Callable[..., Outcome], base: Path, adapters: Mapping[str, Any], *arguments: str, code: int = 0
) -> Outcome:
    """Merge adapters from the command line, without evaluating, into ``out``."""
    experts = ", ".join(f"{name}: {given}" for name, given in adapters.items())
    outcome = command(
        *(f"models.base={base}", f"models.experts={{{experts}}}", "task=rte", "evaluate=false", "tracking=none"),
        *("output=out", *arguments),
    )
    assert outcome.code == code, outcome.err
    return outcome
