"""Tiny real classifiers of several architectures, tokenizers to go with them, and Parquet files in the hub's schema."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from mergelab.tasks.data import TaskData

WORDS = "the judge maybe admires a nurse who never calls openly while some tired farmers gladly follow kings".split()  # noqa: SIM905


def sentences(count: int, seed: int) -> list[str]:
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS, size=draw.integers(2, 25))) for _ in range(count)]


def classifier(kind: str, labels: int = 2) -> tuple[Any, Any]:
    """Build a tiny classifier with random weights that are large enough to matter, and a tokenizer for it."""
    import transformers as t

    size = {"vocab_size": 400, "num_labels": labels}
    tokenizer = byte_tokenizer() if kind in ("gpt2", "roberta") else word_tokenizer()
    configs: dict[str, Callable[[], Any]] = {
        "bert": lambda: t.BertConfig(**size, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
                                     intermediate_size=128, max_position_embeddings=96, initializer_range=0.3),
        "distilbert": lambda: t.DistilBertConfig(**size, dim=64, n_layers=2, n_heads=2, hidden_dim=128,
                                                 max_position_embeddings=96, initializer_range=0.3),
        "roberta": lambda: t.RobertaConfig(**size, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
                                           intermediate_size=128, max_position_embeddings=98, initializer_range=0.3,
                                           pad_token_id=1, type_vocab_size=1),
        "gpt2": lambda: t.GPT2Config(**size, n_embd=64, n_layer=2, n_head=2, n_positions=96, initializer_range=0.3),
    }  # fmt: skip
    torch.manual_seed(0)
    model = t.AutoModelForSequenceClassification.from_config(configs[kind]()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") and name != "classifier.bias":  # they start as zeros
                parameter.normal_(std=0.1)
    if kind == "roberta":
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(1)
    return model, tokenizer


def word_tokenizer() -> Any:
    """Build a BERT tokenizer of a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=96,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def byte_tokenizer() -> Any:
    """Build a GPT-2 tokenizer: bytes, no padding token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate([*letters, "<|endoftext|>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", model_max_length=96,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def plain_logits(model: Any, tokenizer: Any, data: TaskData, max_length: int = 96) -> np.ndarray[Any, Any]:
    """Do what a plain loop does: one example at a time, float32, nothing padded."""
    accepts_types = model.config.model_type not in ("distilbert", "roberta")
    model.eval()
    rows = []
    with torch.no_grad():
        for text in data.texts:
            inputs = tokenizer(*text, truncation=True, max_length=max_length, return_tensors="pt")
            if not accepts_types:
                inputs.pop("token_type_ids", None)
            rows.append(model(**inputs).logits[0].numpy())
    return np.stack(rows)


def write_parquet(
    path: Path, columns: Mapping[str, Sequence[Any]], class_names: Sequence[str] | None = None, label: str = "label"
) -> Path:
    """Write a file as ``datasets`` does, with the label's class names in the metadata where given."""
    table = pa.table(dict(columns))
    if class_names is not None:
        features: dict[str, Any] = {name: {"dtype": "string", "_type": "Value"} for name in columns}
        features[label] = {"names": list(class_names), "_type": "ClassLabel"}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return path


def rte_columns(labels: Sequence[Any]) -> dict[str, Sequence[Any]]:
    """Make rows of RTE with these labels."""
    count = len(labels)
    first, second = [f"first {i}" for i in range(count)], [f"second {i}" for i in range(count)]
    return {"sentence1": first, "sentence2": second, "label": list(labels), "idx": list(range(count))}
