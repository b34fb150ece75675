"""A model with an adapter of the Adapters library has the outputs that the library computes with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tests.adapterhub import library
from tests.adapterhub.library import BOTH, TEXT
from tests.adapters import made as small

adapters = pytest.importorskip("adapters", reason="needs the Adapters library: make test-adapters")
from adapters import ConfigUnion, IA3Config, LoRAConfig  # noqa: E402

ON_THE_POOLER = {"num_labels": 3, "layers": 1, "activation_function": None, "use_pooler": True}
EVERYWHERE = {"intermediate_lora": True, "output_lora": True}


# model, adapter, inputs
KINDS: dict[str, tuple[Any, Any, dict[str, Tensor]]] = {
    "bert": (small.bert, LoRAConfig(r=3, alpha=7, **EVERYWHERE), TEXT),
    "bert ia3": (small.bert, IA3Config(alpha=2, output_lora=True), TEXT),
    "no head": (lambda: small.bert("BertForMaskedLM"), LoRAConfig(r=2, alpha=3), TEXT),
    "roberta": (library.roberta, LoRAConfig(r=2, alpha=6), TEXT),
    "distilbert": (library.distilbert, LoRAConfig(r=2, alpha=6, **EVERYWHERE), TEXT),
    "fused q": (small.gpt2, LoRAConfig(r=2, alpha=5, attn_matrices=["q"]), TEXT),
    "fused q, v": (small.gpt2, LoRAConfig(r=2, alpha=5, **EVERYWHERE), TEXT),
    "fused v, k, q": (small.gpt2, LoRAConfig(r=3, alpha=1, attn_matrices=["v", "k", "q"]), TEXT),
    "fused ia3": (small.gpt2, IA3Config(alpha=2), TEXT),
    "llama": (small.llama, LoRAConfig(r=2, alpha=6, **EVERYWHERE), TEXT),
    "t5": (small.t5, LoRAConfig(r=2, alpha=6, leave_out=[0], **EVERYWHERE), BOTH),
    "t5 ia3": (small.t5, IA3Config(), BOTH),
    "bart": (small.bart, LoRAConfig(r=2, alpha=6, **EVERYWHERE), BOTH),
    "pair": (small.bert2bert, LoRAConfig(r=2, alpha=6, leave_out=[0], **EVERYWHERE), BOTH),
    "pair ia3": (small.bert2bert, IA3Config(), BOTH),
    "union": (small.bert, ConfigUnion(LoRAConfig(r=2, alpha=6)), TEXT),
    "older than 1.1.0": (small.bert, LoRAConfig(r=3, alpha=7), TEXT),
}
# The same with heads of the library's own classes: model, class, settings of the head.
HEADS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "pooler and classifier": (small.bert, "BertAdapterModel", {}),
    "classifier on the pooler": (
        small.bert,
        "BertAdapterModel",
        {"layers": 1, "activation_function": None, "use_pooler": True},
    ),
    "roberta's head": (library.roberta, "RobertaAdapterModel", {"id2label": {0: "x", 1: "y", 2: "z"}}),
    "gpt2's head": (
        lambda: small.gpt2("GPT2ForSequenceClassification"),
        "GPT2AdapterModel",
        {"layers": 1, "activation_function": None, "bias": False},
    ),
    "llama's head": (
        lambda: small.llama("LlamaForSequenceClassification"),
        "LlamaAdapterModel",
        {"layers": 1, "activation_function": None, "bias": False},
    ),
    "distilbert's head": (library.distilbert, "DistilBertAdapterModel", {"activation_function": "relu"}),
}
# Adapters of one part of an encoder-decoder, and of its cross-attention alone.
PAIR = (small.bert2bert,)
PARTS = ("encoder", "decoder", "cross-attention")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, Path, Tensor]]:
    """The class and the dense form of each kind, and the library's outputs."""
    folder = tmp_path_factory.mktemp("reading")
    jobs, found = [], {}
    for number, kind in enumerate([*KINDS, *HEADS, *PARTS]):
        base, adapter, out = (folder / f"{number}-{what}" for what in ("base", "adapter", "dense"))
        build, config, inputs = KINDS.get(kind) or (*HEADS.get(kind, PAIR)[:1], LoRAConfig(r=2, alpha=6), BOTH)
        inputs = TEXT if kind in HEADS else inputs
        model = build().double()
        model.save_pretrained(base)
        cls, before = type(model).__name__, library.outputs(model, inputs)
        if kind in HEADS:
            model = getattr(adapters, HEADS[kind][1]).from_pretrained(base)
            head = {"head_type": "classification", "num_labels": 3, "layers": 2, "activation_function": "tanh"}
            model.add_prediction_head_from_config("a", head | HEADS[kind][2])
        part = kind if kind in PARTS[:2] else None
        library.with_adapter(getattr(model, part) if part else model, config)
        saved = getattr(model, part) if part else model
        saved.save_adapter(str(adapter), "a", use_safetensors=number % 2 == 1 and kind != "cross-attention")
        if kind == "cross-attention":
            held = torch.load(adapter / "pytorch_adapter.bin", weights_only=True)
            torch.save({key: held[key] for key in held if "crossattention" in key}, adapter / "pytorch_adapter.bin")
            model = reloaded(build, base, adapter)
        if kind == "older than 1.1.0":
            file = adapter / "adapter_config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"version": "adapters.1.0.1"}))
            model = reloaded(build, base, adapter, use_safetensors=number % 2 == 1)
        outputs = library.outputs(model.eval(), inputs)
        assert before.shape != outputs.shape or not torch.allclose(before, outputs, atol=1e-3), f"{kind}: does nothing"
        found[kind] = (cls, out, outputs)
        jobs.append((base, adapter, part, out))
    library.densely(jobs, folder)
    return found


def reloaded(build: Any, base: Path, adapter: Path, **settings: Any) -> Any:
    model = build().from_pretrained(base, dtype=torch.float64)
    adapters.init(model)
    model.load_adapter(str(adapter), set_active=True, **settings)
    return model.double()


@pytest.mark.parametrize("kind", [*KINDS, *HEADS, *PARTS])
def test_the_dense_form_computes_what_the_library_does(kind: str, made: dict[str, tuple[str, Path, Tensor]]) -> None:
    cls, folder, expected = made[kind]
    dense = getattr(transformers, cls).from_pretrained(folder, dtype=torch.float64).eval()
    inputs = TEXT if kind in HEADS else KINDS[kind][2] if kind in KINDS else BOTH
    torch.testing.assert_close(library.outputs(dense, inputs), expected, rtol=1e-9, atol=1e-9)


def test_labels_are_those_of_the_adapters_head(made: dict[str, tuple[str, Path, Tensor]]) -> None:
    config = json.loads((made["roberta's head"][1] / "config.json").read_text())
    assert config["id2label"] == {"0": "x", "1": "y", "2": "z"}
