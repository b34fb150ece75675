"""A config that names no class: the class is the one that has the folder's tensors, as when transformers loads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mergelab.errors import MergeWarning, ModelError
from mergelab.experiment.opening import MergeScope, open_models
from mergelab.experiment.sources import from_folder
from tests.conftest import Outcome
from tests.vocabularies import bert

Command = Callable[..., Outcome]
SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
CLASSES: list[tuple[str, dict[str, Any]]] = [
    ("BertForSequenceClassification", {**SMALL, "num_labels": 3}),
    ("BertForTokenClassification", {**SMALL, "num_labels": 3}),
    ("BertForQuestionAnswering", SMALL),
    ("BertForMultipleChoice", SMALL),
    ("BertForMaskedLM", SMALL),
    ("BertModel", SMALL),
    ("RobertaForSequenceClassification", SMALL),
    ("LlamaForCausalLM", {**SMALL, "num_key_value_heads": 1}),
    ("LlamaForSequenceClassification", {**SMALL, "num_key_value_heads": 1}),
    ("MixtralForCausalLM", {**SMALL, "num_key_value_heads": 1, "num_local_experts": 2}),
    ("GPT2LMHeadModel", {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2}),
    ("T5ForConditionalGeneration", {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1}),
]


def without_class(folder: Path) -> Path:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in content.items() if k != "architectures"}))
    return folder


@pytest.mark.parametrize(("name", "settings"), CLASSES)
def test_the_class_is_told_by_the_tensors(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    cls = getattr(transformers, name)
    cls(cls.config_class(**settings)).save_pretrained(tmp_path)
    kind = from_folder(without_class(tmp_path), "a").architecture
    assert kind is not None
    assert kind.name == name
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | {"model_type": "nothing"}))
    with pytest.raises(ModelError, match="names no model class"):
        assert from_folder(tmp_path, "a").architecture


def test_such_experts_are_merged_with_others(mergelab_command: Command, workplace: Path) -> None:
    for seed, name in enumerate(("a", "b")):
        bert(workplace / name, seed)
    without_class(workplace / "b")
    settings = ["models.base=null", "models.experts=[./b,./a]", "evaluate=false", "tracking=none", "output=merged"]
    outcome = mergelab_command("method=soup", *settings)
    assert outcome.code == 0, outcome.err
    a, b, merged = (load_file(workplace / name / "model.safetensors") for name in ("a", "b", "merged"))
    torch.testing.assert_close(merged["classifier.weight"], (a["classifier.weight"] + b["classifier.weight"]) / 2)
    content = json.loads((workplace / "merged" / "config.json").read_text())
    assert content["architectures"] == ["BertForSequenceClassification"]


def test_what_a_class_does_not_read_is_left_out_and_said(tmp_path: Path) -> None:
    folders = [bert(tmp_path / name, seed) for seed, name in enumerate(("a", "b"))]
    tensors = load_file(folders[1] / "model.safetensors")
    tensors["v_head.summary.weight"] = torch.ones(1, 16)
    save_file(tensors, folders[1] / "model.safetensors", metadata={"format": "pt"})
    for ordered in (folders, folders[::-1]):
        experts = [from_folder(folder, folder.name) for folder in ordered]
        with pytest.warns(
            MergeWarning, match=r"^b: its class does not read v_head.summary.weight, which are left out$"
        ):
            opened = open_models(None, experts, MergeScope())
        assert sorted(opened.head_names) == ["classifier.bias", "classifier.weight"]
        assert not [name for name in opened.aligned.names if "v_head" in name]
