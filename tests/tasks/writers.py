"""Tiny real models that write texts, with tokenizers to go with them, and examples for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mergelab.tasks.data import TaskData
from mergelab.tasks.loading import task_from_config
from mergelab.tasks.rows import read_rows
from mergelab.tasks.spec import TaskSpec
from tests.tasks.tiny import byte_tokenizer, sentences, word_tokenizer

KINDS = ("gpt2", "llama", "t5", "bert2bert")
CAUSAL = ("gpt2", "llama")


def writer(kind: str) -> tuple[Any, Any]:
    """Build a tiny model that writes, with random weights that are large enough to matter, and its tokenizer."""
    import transformers as t

    torch.manual_seed(0)
    made: dict[str, Callable[[], Any]] = {
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(
            vocab_size=257, n_embd=64, n_layer=2, n_head=2, n_positions=96, initializer_range=0.3,
            bos_token_id=256, eos_token_id=256)),
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(
            vocab_size=258, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=96, initializer_range=0.3, bos_token_id=257,
            eos_token_id=256, tie_word_embeddings=False)),
        "t5": lambda: t.T5ForConditionalGeneration(t.T5Config(
            vocab_size=40, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=0,
            pad_token_id=0, eos_token_id=3, initializer_factor=5.0)),
        "bert2bert": _bert2bert,
    }  # fmt: skip
    model = made[kind]().eval()
    if kind in ("t5", "bert2bert"):
        tokenizer = word_tokenizer()
        tokenizer.add_special_tokens({"eos_token": "[SEP]"})
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
        return model, tokenizer
    tokenizer = byte_tokenizer()
    if kind == "llama":
        _start_with(tokenizer, "<s>")
    return model, tokenizer


def _bert2bert() -> Any:
    import transformers as t

    size = {"vocab_size": 40, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 96, "max_position_embeddings": 96, "initializer_range": 0.3}  # fmt: skip
    config = t.EncoderDecoderConfig.from_encoder_decoder_configs(t.BertConfig(**size), t.BertConfig(**size))
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 2, 0, 3
    model = t.EncoderDecoderModel(config)
    model.generation_config.decoder_start_token_id = 2
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, 3
    return model


def _start_with(tokenizer: Any, token: str) -> None:
    """Let a tokenizer begin every text with a token."""
    from tokenizers import processors

    tokenizer.add_special_tokens({"bos_token": token})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, tokenizer.convert_tokens_to_ids(token))]
    )


def prompts(count: int = 12, **settings: Any) -> TaskData:
    """Make prompts of very different lengths, to be gone on from as ``settings`` say."""
    decoding = {"max_new_tokens": 12, **settings.pop("decoding", {})}
    texts = [text[: 2 + 5 * number] for number, text in enumerate(sentences(count, 0))]
    return given(texts, decoding=decoding, **settings)


def given(texts: Sequence[str], **settings: Any) -> TaskData:
    """Make the examples of a task that goes on from these prompts."""
    from mergelab.tasks.data import load_data

    node = {"name": "prompts", "version": 1, "kind": "prompts", "prompts": list(texts), **settings}
    return load_data(task_from_config(node))


def running_text(texts: Sequence[str], **settings: Any) -> TaskData:
    """Make the examples of a task of language modelling on these rows."""
    import pyarrow as pa

    spec = language_task(**settings)
    rows = read_rows(spec, pa.table({"text": list(texts)}), None, "the test")
    zeros = np.zeros(len(rows), dtype=np.int64)
    return TaskData(spec, tuple(rows.texts), rows.labels, rows.idx, zeros, "test", "folder", "", "")


def language_task(**settings: Any) -> TaskSpec:
    """Make a task of language modelling."""
    return task_from_config(
        {
            "name": "words", "version": 1, "kind": "language_modelling", "dataset": {"path": "none"},
            "splits": ["test"], "columns": ["text"], "metrics": ["word_perplexity", "token_perplexity"],
            "primary": "word_perplexity", **settings,
        }
    )  # fmt: skip


def generation_task(**settings: Any) -> TaskSpec:
    """Make a task of generation with references."""
    return task_from_config(
        {
            "name": "sums", "version": 1, "kind": "generation", "dataset": {"path": "none"}, "prompt": "{question}",
            "references": ["answer"], "metrics": ["exact_match"], "primary": "exact_match", **settings,
        }
    )  # fmt: skip


def save_writers(
    folder: Path, kind: str = "gpt2", names: Sequence[str] = ("base", "a", "b"), apart: float = 0.05, **settings: Any
) -> None:
    """Save a tiny model under the first name, and models near it under the others; ``settings`` are of generation."""
    for seed, name in enumerate(names):
        model, tokenizer = writer(kind)
        for key, value in settings.items():
            setattr(model.generation_config, key, value)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters() if seed else ():
                parameter.add_(apart * torch.randn_like(parameter))
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
