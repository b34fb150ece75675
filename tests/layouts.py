"""Tiny models that transformers stores in another layout than it computes with, or whose names it has changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor

_SIZE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
_ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 8}


def _text(kind: str, **more: Any) -> dict[str, Any]:
    return {**_SIZE, "model_type": kind, **more}


def _vision(kind: str) -> dict[str, Any]:
    return {**_VISION, "model_type": kind}


EXPERTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_SIZE, "num_local_experts": 3}),
    "qwen2-moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**_SIZE, **_ROUTED, "num_experts": 3, "shared_expert_intermediate_size": 8},
    ),
    "qwen3-moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**_SIZE, **_ROUTED, "num_experts": 3, "head_dim": 8}),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", {**_SIZE, "num_experts": 3, "num_experts_per_tok": 2}),
    "deepseek-v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            **_SIZE,
            **_ROUTED,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
        },
    ),
}
VISION: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llava": (
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {"vision_config": _vision("clip_vision_model"), "text_config": _text("llama"), "image_token_index": 39},
    ),
    "tied llava": (
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "vision_config": _vision("siglip_vision_model"),
            "text_config": _text("qwen2", tie_word_embeddings=True),
            "image_token_index": 39,
            "tie_word_embeddings": True,
        },
    ),
    "paligemma": (
        "PaliGemmaForConditionalGeneration",
        "PaliGemmaConfig",
        {
            "vision_config": _vision("siglip_vision_model"),
            "text_config": _text("gemma", head_dim=8),
            "image_token_index": 39,
            "projection_dim": 16,
        },
    ),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {
            "vision_config": _vision("siglip_vision_model"),
            "text_config": _text("gemma3_text", head_dim=8),
            "mm_tokens_per_image": 4,
            "image_token_index": 39,
        },
    ),
}
MODELS = EXPERTS | VISION


def build(name: str, seed: int) -> Any:
    """Build a model with random weights everywhere, in evaluation mode."""
    cls, config, settings = MODELS[name]
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = getattr(transformers, cls)(getattr(transformers, config)(**settings))
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape))
    return model.eval()


def in_files(model: Any, folder: Path) -> None:
    """Save a model as transformers does."""
    model.save_pretrained(folder)


def in_memory(model: Any, folder: Path) -> None:
    """Save a model with the tensors that it computes with, under their names in it; a tied one once."""
    model.save_pretrained(folder)
    first: dict[int, Tensor] = {}
    tensors = {}
    for name, tensor in model.state_dict().items():
        if first.setdefault(tensor.data_ptr(), tensor) is tensor:
            tensors[name] = tensor.clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


Layout = Callable[[Any, Path], None]


def tokenizer() -> Any:
    """Make a tokenizer of the models' forty tokens."""
    words = ["<pad>", "<s>", "</s>", *(f"w{number}" for number in range(3, 40))]
    made = Tokenizer(WordLevel({word: at for at, word in enumerate(words)}, unk_token="w3"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="w3"
    )
