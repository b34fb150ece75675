"""Sets of models to merge, of real sizes: a random base, and experts that are the base plus a small normal change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class ModelSet:
    """How a set is made: its model, how many experts, and the dtype."""

    make: Callable[[], Any]
    experts: int
    dtype: torch.dtype


def _bert() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(num_labels=2))


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config())


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
        num_key_value_heads=4,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _llama_3b() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
        num_key_value_heads=8, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


SETS = {
    "bert-base": ModelSet(_bert, 5, torch.float32),  # 109.5 M parameters
    "gpt2": ModelSet(_gpt2, 2, torch.float32),  # 124 M
    "llama-1.1b": ModelSet(_llama, 2, torch.bfloat16),  # 1.1 G
    "llama-3.2-3b": ModelSet(_llama_3b, 2, torch.bfloat16),  # 3.2 G
}


def build(name: str, folder: Path, experts: int | None = None) -> list[Path]:
    """Make a set once; answer the models' folders, the base first."""
    wanted = SETS[name]
    count = wanted.experts if experts is None else experts
    folders = [folder / "base", *(folder / f"expert-{index}" for index in range(1, count + 1))]
    if all(any(made.glob("*.safetensors")) for made in folders):
        return folders
    torch.manual_seed(0)
    torch.set_default_dtype(wanted.dtype)
    try:
        model = wanted.make()
    finally:
        torch.set_default_dtype(torch.float32)
    start = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    for index, made in enumerate(folders):
        generator = torch.Generator().manual_seed(index)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.copy_(start[key])
                if index:
                    parameter += torch.randn(parameter.shape, generator=generator, dtype=wanted.dtype) * 0.002
        model.save_pretrained(made, max_shard_size="1GB")
        _tokenizer().save_pretrained(made)
    return folders


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
