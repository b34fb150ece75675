"""A LoRA adapter extracted from a dense expert is the expert, in PEFT and here, whatever training changed in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from mergelab.models.adapted import on_base, open_model
from tests.adapters import made as small
from tests.conftest import Outcome

peft = pytest.importorskip("peft")

Command = Callable[..., Outcome]
KINDS: dict[str, tuple[Any, Any]] = {
    "gpt2, tied": (small.gpt2, transformers.AutoModelForCausalLM),
    "llama, tied": (lambda: small.llama(tie_word_embeddings=True), transformers.AutoModelForCausalLM),
    "llama": (small.llama, transformers.AutoModelForCausalLM),
    "bert with a language model's head": (lambda: small.bert("BertForMaskedLM"), transformers.AutoModelForMaskedLM),
    "a classifier": (small.bert, transformers.AutoModelForSequenceClassification),
}


def trained(build: Any, folder: Path, *, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Save a base, and an expert in which everything has changed."""
    base, expert = build().to(dtype), build().to(dtype)
    base.save_pretrained(folder / "base")
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    expert.save_pretrained(folder / "expert")
    return base, expert


def extracted(command: Command, folder: Path, out: str, *settings: str) -> Path:
    outcome = command(
        f"models.base={folder / 'base'}",
        f"models.experts={{a: {folder / 'expert'}}}",
        *("task=rte", "evaluate=false", "tracking=none", "method=task_arithmetic", "method.lambda=1"),
        *("save.form=lora_svd", f"output={out}", *settings),
    )
    assert outcome.code == 0, outcome.err
    return Path(out)


def in_peft(loader: Any, base: Path, adapter: Path) -> Any:
    return peft.PeftModel.from_pretrained(loader.from_pretrained(base, dtype=torch.float32), adapter).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_of_full_rank_it_is_the_expert(kind: str, tmp_path: Path, mergelab_command: Command) -> None:
    build, loader = KINDS[kind]
    _, expert = trained(build, tmp_path)
    adapter = extracted(mergelab_command, tmp_path, "whole", "save.energy=1.0")
    expected = small.outputs(expert.eval(), input_ids=small.INPUTS)
    through = in_peft(loader, tmp_path / "base", adapter)
    torch.testing.assert_close(small.outputs(through, input_ids=small.INPUTS), expected, rtol=1e-4, atol=1e-5)
    alone = through.merge_and_unload()
    torch.testing.assert_close(small.outputs(alone, input_ids=small.INPUTS), expected, rtol=1e-4, atol=1e-5)
    own = open_model(on_base(tmp_path / "base", adapter, where="a"))
    stored = load_file(tmp_path / "expert" / "model.safetensors")
    for name, tensor in stored.items():
        torch.testing.assert_close(own.get(name), tensor, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")
    tied = build().config.tie_word_embeddings and kind != "a classifier"
    assert own.config.get("tie_word_embeddings", True) is True or not tied


def test_tied_embeddings_are_stored_whole_as_peft_adds_lora_of_both_ends_twice(
    tmp_path: Path, mergelab_command: Command
) -> None:
    _, expert = trained(small.gpt2, tmp_path)
    adapter = extracted(mergelab_command, tmp_path, "whole", "save.rank=4")
    tensors = load_file(adapter / "adapter_model.safetensors")
    ends = {name: tensor for name, tensor in tensors.items() if "wte" in name or "lm_head" in name}
    assert ends.keys() == {f"base_model.model.{name}.weight" for name in ("transformer.wte", "lm_head")}
    for tensor in ends.values():
        torch.testing.assert_close(tensor, expert.get_input_embeddings().weight.detach(), rtol=0, atol=1e-6)
    assert "lm_head" not in json.loads((adapter / "mergelab_sites.json").read_text())


def test_what_bfloat16_rounds_is_not_lost_in_the_difference(tmp_path: Path, mergelab_command: Command) -> None:
    _, expert = trained(small.llama, tmp_path, dtype=torch.bfloat16)
    adapter = extracted(mergelab_command, tmp_path, "half", "save.energy=1.0", "method.lambda=0.3")
    own = load_file(adapter / "adapter_model.safetensors")
    base = load_file(tmp_path / "base" / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    a, b = (own[f"base_model.model.{name}.lora_{factor}.weight"].double() for factor in "AB")
    change = 0.3 * (dict(expert.named_parameters())[f"{name}.weight"].double() - base[f"{name}.weight"].double())
    torch.testing.assert_close(b @ a, change, rtol=1e-5, atol=1e-7)


def test_a_parameter_that_no_module_of_its_own_has_is_refused(tmp_path: Path, mergelab_command: Command) -> None:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4
    )
    trained(lambda: transformers.ViTForImageClassification(config), tmp_path)
    outcome = mergelab_command(
        f"models.base={tmp_path / 'base'}",
        f"models.experts={{a: {tmp_path / 'expert'}}}",
        *("task=rte", "evaluate=false", "tracking=none", "method=task_arithmetic", "method.lambda=1"),
        *("save.form=lora_svd", "output=out", "save.rank=2"),
    )
    assert outcome.code == 2
    assert "save.form=dense can hold it" in outcome.err
    assert not Path("out").exists()
