"""An adapter's names are found in bases that are stored under other names, and on bases with more tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mergelab.models.adapted import on_base, open_model
from tests.adapters import made as small

peft = pytest.importorskip("peft")


def renamed(file: Path, rename: Any) -> None:
    save_file({rename(name): tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})


def agrees(made: small.Made) -> None:
    opened = open_model(on_base(made.base, made.adapter, where="a"))
    expected = small.outputs(made.peft, input_ids=small.INPUTS)
    torch.testing.assert_close(small.outputs(small.loaded(opened), input_ids=small.INPUTS), expected)


@pytest.mark.parametrize("of", ["the base", "the adapter"])
@pytest.mark.parametrize("build", [small.gpt2, small.llama, small.bert])
def test_the_bodys_prefix_may_be_missing(build: Any, of: str, tmp_path: Path) -> None:
    model = build()
    targets = {"gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"], "bert": ["query", "value"]}[build.__name__]
    made = small.made(tmp_path, model, peft.LoraConfig(r=2, target_modules=targets))
    prefix = f"{model.base_model_prefix}."
    if of == "the base":
        if build is not small.gpt2:  # no other model of these is stored so
            pytest.skip("such bases have no head")
        renamed(made.base / "model.safetensors", lambda name: name.removeprefix(prefix))
    else:
        start = "base_model.model."
        renamed(
            made.adapter / "adapter_model.safetensors",
            lambda name: start + name.removeprefix(start).removeprefix(prefix),
        )
    agrees(made)


def test_old_spellings_of_the_base_are_found(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["query"], bias="all", task_type="SEQ_CLS")
    made = small.made(tmp_path, small.bert(), config)
    renamed(
        made.base / "model.safetensors",
        lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"),
    )
    agrees(made)


def test_layers_beside_fused_experts_are_found(tmp_path: Path) -> None:
    made = small.made(tmp_path, small.mixtral(), peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"]))
    opened, dense = open_model(on_base(made.base, made.adapter, where="a")), made.dense()
    attention = [name for name in opened.keys() if "self_attn" in name]  # noqa: SIM118
    assert len(attention) == 8
    for name in attention:
        torch.testing.assert_close(opened.get(name), dense[name], rtol=1e-10, atol=1e-10)
    stored = load_file(made.base / "model.safetensors")
    assert all(torch.equal(opened.get(name), stored[name]) for name in stored if name not in attention)


def test_experts_that_were_adapted_one_by_one_are_found_where_the_base_stores_them_so(tmp_path: Path) -> None:
    """As with version 4 of transformers, which does not stack them."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    small.mixtral().save_pretrained(base)
    stored = load_file(base / "model.safetensors")
    site = next(name for name in stored if name.endswith("experts.1.w2.weight")).removesuffix(".weight")
    a, b = torch.randn(2, 24), torch.randn(16, 2)
    adapter.mkdir()
    start = f"base_model.model.{site}"
    save_file({f"{start}.lora_A.weight": a, f"{start}.lora_B.weight": b}, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "lora_alpha": 3, "r": 2, "task_type": "CAUSAL_LM", "target_modules": ["w2"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    opened = open_model(on_base(base, adapter, where="a"))
    for name, tensor in stored.items():
        change = 1.5 * (b.double() @ a.double()) if name == f"{site}.weight" else 0
        torch.testing.assert_close(opened.get(name).double(), tensor.double() + change, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_with_more_tokens_than_its_base_has_their_rows(tied: bool, tmp_path: Path) -> None:
    base = tmp_path / "base"
    small.llama(tie_word_embeddings=tied).save_pretrained(base)
    grown: Any = transformers.AutoModelForCausalLM.from_pretrained(base)
    grown.resize_token_embeddings(51)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    folder, wrapped = small.adapter(tmp_path / "adapter", grown, config)
    opened = open_model(on_base(base, folder, where="a"))
    assert opened.config["vocab_size"] == 51
    expected = small.outputs(wrapped, input_ids=small.INPUTS + 25)
    torch.testing.assert_close(
        small.outputs(small.loaded(opened), input_ids=small.INPUTS + 25), expected, rtol=1e-5, atol=1e-5
    )
