"""Tiny randomly initialised transformers of the kinds that are merged, in memory and in folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "mat", "law", "recipe"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGELAB_CACHE", str(tmp_path_factory.mktemp("cache")))


def _seeded(seed: int, make: Callable[[], nn.Module]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().eval()


def bert_config(**kwargs: Any) -> Any:
    from transformers import BertConfig

    sizes = {"vocab_size": len(WORDS), "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertConfig(**sizes, intermediate_size=16, max_position_embeddings=16, **kwargs)


@pytest.fixture(scope="session")
def bert() -> Callable[..., Any]:
    """A BERT with a classifier."""
    from transformers import BertForSequenceClassification

    return lambda seed=0, **kwargs: _seeded(seed, lambda: BertForSequenceClassification(bert_config(**kwargs)))


@pytest.fixture(scope="session")
def bert_base() -> Callable[..., Any]:
    """A BERT with the two pretraining heads."""
    from transformers import BertForPreTraining

    return lambda seed=0, **kwargs: _seeded(seed, lambda: BertForPreTraining(bert_config(**kwargs)))


def gpt2_config(**kwargs: Any) -> Any:
    from transformers import GPT2Config

    sizes = {"vocab_size": len(WORDS), "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16}
    return GPT2Config(**sizes, bos_token_id=2, eos_token_id=3, pad_token_id=0, **kwargs)


@pytest.fixture(scope="session")
def gpt2() -> Callable[..., Any]:
    """A GPT-2 whose output layer is its embedding."""
    from transformers import GPT2LMHeadModel

    return lambda seed=0, **kwargs: _seeded(seed, lambda: GPT2LMHeadModel(gpt2_config(**kwargs)))


@pytest.fixture(scope="session")
def gpt2_classifier() -> Callable[..., Any]:
    """A GPT-2 with a classification head."""
    from transformers import GPT2ForSequenceClassification

    return lambda seed=0, **kwargs: _seeded(seed, lambda: GPT2ForSequenceClassification(gpt2_config(**kwargs)))


@pytest.fixture(scope="session")
def t5() -> Callable[..., Any]:
    """A T5: three embeddings and the output layer are one tensor."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=len(WORDS), d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return lambda seed=0: _seeded(seed, lambda: T5ForConditionalGeneration(config))


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        eos_token="[SEP]",
        model_max_length=16,
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
    )


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Any) -> Callable[..., Path]:
    """Save a model with its tokenizer in Hugging Face layout."""

    def save(model: Any, name: str = "model", **kwargs: Any) -> Path:
        model.save_pretrained(tmp_path / name, **kwargs)
        tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture
def bin_folder(tmp_path: Path) -> Callable[..., Path]:
    """Save a model the old way: ``pytorch_model.bin``, tied tensors under each of their names."""

    def save(model: Any, name: str = "old", tensors: dict[str, Tensor] | None = None, **kwargs: Any) -> Path:
        folder = tmp_path / name
        model.config.save_pretrained(folder)
        torch.save(model.state_dict() if tensors is None else tensors, folder / "pytorch_model.bin", **kwargs)
        return folder

    return save
