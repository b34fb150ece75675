"""What frameworks put around a model leaves no trace in its tensors' names."""

from __future__ import annotations

import itertools

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from mergelab.errors import KeyMismatch, ModelError
from mergelab.weights.checkpoint import open_checkpoint

MODELS = {
    "bert": lambda: BertForSequenceClassification(
        BertConfig(vocab_size=12, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
    ),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(vocab_size=12, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
    ),
    "tied llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=12,
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=8,
            tie_word_embeddings=True,
        )
    ),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=12, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, ffn_dim=8, word_embed_proj_dim=8
        )
    ),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=12, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    ),
}
AROUND = ("module.", "_orig_mod.", "base_model.model.", "model.", "_fsdp_wrapped_module.")


def _inside(name: str) -> str:
    """Wrap every layer, as FSDP, compilation by block and activation checkpoints do."""
    for number in ("0", "1"):
        name = name.replace(f".{number}.", f".{number}._fsdp_wrapped_module._checkpoint_wrapped_module._orig_mod.")
    return name


@pytest.fixture(params=MODELS)
def saved(request, tmp_path):
    torch.manual_seed(0)
    MODELS[request.param]().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def _rename(folder, rename):
    tensors = load_file(folder / "model.safetensors")
    save_file({rename(name): value for name, value in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return tensors


@pytest.mark.parametrize("around", ["", *AROUND, *map("".join, itertools.permutations(AROUND[:4], 2))])
def test_wrappers_around_a_model_and_in_it_leave_no_trace(saved, around) -> None:
    tensors = _rename(saved, lambda name: around + _inside(name))
    checkpoint = open_checkpoint(saved)
    assert {*checkpoint.keys(), *checkpoint.aliases()} >= tensors.keys()
    assert set(checkpoint.keys()) == tensors.keys()
    for name, value in tensors.items():
        assert torch.equal(checkpoint.get(name), value)
        assert checkpoint.shape(name) == value.shape


def test_a_part_that_is_wrapped_for_data_parallel_training_is_found(saved) -> None:
    names = list(load_file(saved / "model.safetensors"))
    first = names[-1].partition(".")[0]
    tensors = _rename(
        saved, lambda name: name.replace(f"{first}.", f"{first}.module.", 1) if name.startswith(first) else name
    )
    assert set(open_checkpoint(saved).keys()) == tensors.keys()


def test_a_model_without_wrappers_keeps_its_names_and_its_order(saved) -> None:
    checkpoint = open_checkpoint(saved)
    assert checkpoint.standard
    assert list(checkpoint.keys()) == list(load_file(saved / "model.safetensors"))


def test_what_peft_leaves_around_layers_goes_where_there_is_no_adapter(saved) -> None:
    tensors = _rename(saved, lambda name: "base_model.model." + name.replace(".weight", ".base_layer.weight"))
    assert set(open_checkpoint(saved).keys()) == tensors.keys()


@pytest.mark.parametrize(
    "part", ["lora_A.default.weight", "lora_embedding_B.default", "modules_to_save.default.weight", "ia3_l"]
)
def test_an_unmerged_adapter_is_refused(saved, part) -> None:
    tensors = load_file(saved / "model.safetensors")
    name = next(iter(tensors))
    tensors[f"base_model.model.{name.rpartition('.')[0]}.{part}"] = torch.ones(2, 2)
    save_file(tensors, saved / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"^expert: \S+ belongs to an adapter .*merge_and_unload") as error:
        open_checkpoint(saved, "expert")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) <= 400


def test_two_names_of_one_tensor_are_an_error(saved) -> None:
    tensors = load_file(saved / "model.safetensors")
    name = next(iter(tensors))
    save_file({**tensors, f"_orig_mod.{name}": tensors[name].clone()}, saved / "model.safetensors", {"format": "pt"})
    with pytest.raises(KeyMismatch, match="one tensor without their wrappers' names"):
        open_checkpoint(saved)
