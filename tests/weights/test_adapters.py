"""Adapters are refused in one line that names what they adapt, in whatever form they are given."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mergelab.errors import ModelError
from mergelab.weights.checkpoint import open_checkpoint
from mergelab.weights.module import mergeable
from mergelab.weights.pretrained import load_model

PEFT = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 8}
OF_ADAPTERS = {"config": {"architecture": "lora", "r": 8}, "model_name": "bert-base-uncased", "model_type": "bert"}
MERGE_FIRST = (
    r"adapters of PEFT and the Adapters library are merged as experts, from their folders, on their base; where a "
    r"whole model is needed, merge it into its base first \(PeftModel.merge_and_unload\) and save that"
)


@pytest.mark.parametrize(
    ("content", "file", "line"),
    [
        (PEFT, "adapter_model.safetensors", r"is a LoRA adapter of org/base \(peft_type LORA\)"),
        (PEFT, "adapter_model.bin", r"is a LoRA adapter of org/base \(peft_type LORA\)"),
        ({**PEFT, "peft_type": "IA3"}, "adapter_model.safetensors", r"is an adapter of org/base \(peft_type IA3\)"),
        (OF_ADAPTERS, "pytorch_adapter.bin", r"is a LoRA adapter of bert-base-uncased \(lora\)"),
        (OF_ADAPTERS, "adapter.safetensors", r"is a LoRA adapter of bert-base-uncased \(lora\)"),
        (None, "adapter_model.safetensors", "is a LoRA adapter"),
        (None, "pytorch_adapter.bin", "is a LoRA adapter"),
    ],
)
@pytest.mark.parametrize("others", ["nothing", "config", "a whole model"])
def test_a_folder_that_is_an_adapter_is_refused(
    content: dict[str, Any] | None, file: str, line: str, others: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    (tmp_path / file).write_bytes(b"weights")
    if others != "nothing":
        (tmp_path / "config.json").write_text("{}")
    if others == "a whole model":
        save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    for open_ in (lambda: open_checkpoint(tmp_path, "a"), lambda: load_model(tmp_path, "text-classification")):
        with pytest.raises(ModelError, match=f"{line}: {MERGE_FIRST}$") as caught:
            open_()
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400


def test_weights_with_an_adapter_inside_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    name = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.default.weight"
    save_file({name: torch.ones(2), "w": torch.ones(2)}, tmp_path / "model.safetensors")
    for open_ in (lambda: open_checkpoint(tmp_path, "a"), lambda: mergeable("a", {name: torch.ones(2)})):
        with pytest.raises(ModelError, match=rf"^a: \S*lora_A.default.weight belongs to an adapter.*: {MERGE_FIRST}$"):
            open_()


@pytest.mark.parametrize("kind", ["LORA", "IA3"])
def test_a_peft_model_is_refused_until_it_is_merged(kind: str, bert: Callable[..., Any]) -> None:
    peft = pytest.importorskip("peft")
    targets = {"target_modules": ["query", "value"]}
    settings = {
        "LORA": lambda: peft.LoraConfig(task_type="SEQ_CLS", r=2, **targets),
        "IA3": lambda: peft.IA3Config(task_type="SEQ_CLS", feedforward_modules=[], **targets),
    }[kind]()
    base = bert()
    base.name_or_path = "org/base"
    model = peft.get_peft_model(base, settings)
    with pytest.raises(
        ModelError, match=rf"^models\[1\]: has an? .*adapter of org/base \(peft_type {kind}\): "
    ) as caught:
        mergeable("models[1]", dict(model.named_parameters()), model)
    assert "\n" not in str(caught.value)
    merged = model.merge_and_unload()
    assert (
        mergeable("models[1]", dict(merged.named_parameters()), merged).keys() == dict(bert().named_parameters()).keys()
    )


def test_an_adapter_added_by_transformers_is_refused(bert: Callable[..., Any]) -> None:
    peft = pytest.importorskip("peft")
    model = bert()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["query"]))
    with pytest.raises(ModelError, match=r"^m: has a LoRA adapter.*peft_type LORA"):
        mergeable("m", dict(model.named_parameters()), model)
