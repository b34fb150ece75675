"""Tiny models whose tokens differ: a BERT with added words, and Llamas with chat tokens and padding rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "##s", "on", "mat"]
IM_START, IM_END, FIM = "<|im_start|>", "<|im_end|>", "<|fim|>"


def bert(
    folder: Path,
    seed: int,
    added: Sequence[str] = (),
    *,
    masked: bool = False,
    reverse: bool = False,
    hidden: int = 16,
) -> Path:
    """Save a BERT classifier (or masked language model) with `WORDS`, in reverse order of the last, and added words."""
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertForSequenceClassification

    folder.mkdir(parents=True)
    words = WORDS[:5] + WORDS[5:][:: -1 if reverse else 1]
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in words))
    size = {"hidden_size": hidden, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 1}
    config = BertConfig(**size, vocab_size=len(WORDS), max_position_embeddings=len(WORDS))
    config.save_pretrained(folder)
    torch.manual_seed(seed)
    model = (BertForMaskedLM if masked else BertForSequenceClassification)(config)
    if masked:
        torch.nn.init.normal_(model.cls.predictions.bias)
    if added:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens(list(added))
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def llama(
    folder: Path,
    seed: int,
    added: Sequence[str] = (),
    *,
    rows: int = 264,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    eos: str | None = None,
) -> Path:
    """Save a Llama of 256 bytes, ``<|endoftext|>`` and special tokens, whose embedding has ``rows`` rows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = {letter: row for row, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab={**alphabet, "<|endoftext|>": 256}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", *added])
    eos = eos or "<|endoftext|>"
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos)
    whole.save_pretrained(folder)
    size = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(
        **size,
        num_key_value_heads=1,
        vocab_size=rows,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=whole.eos_token_id,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    if added:
        (folder / "chat_template.jinja").write_text(f"{''.join(added)}{{{{ messages }}}}")
    return folder


def without_tokenizer(folder: Path) -> Path:
    """Remove a model's tokenizer."""
    for file in folder.iterdir():
        if "token" in file.name or "vocab" in file.name:
            file.unlink()
    return folder


def config_of(folder: Path) -> dict[str, object]:
    """Read ``config.json``."""
    content: dict[str, object] = json.loads((folder / "config.json").read_text())
    return content
