"""Make the tiny GPT-2: its tokenizer, its model, and its training."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from mergelab.miniature.text.recipe import Base, LanguageModels
from mergelab.miniature.text.train import Loss, Training, shuffled_batches

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END = "<|endoftext|>"
_END = 0


def make_bpe(texts: Iterable[str], size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer, as GPT-2's, on ``texts``; the end-of-text token has id 0."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_bpe(tokenizer: Tokenizer, positions: int, folder: Path) -> None:
    """Write the files from which ``AutoTokenizer`` of transformers 4.57 and 5 loads ``tokenizer``."""
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))
    config = {
        "add_prefix_space": False,
        "bos_token": END,
        "clean_up_tokenization_spaces": False,
        "eos_token": END,
        "model_max_length": positions,
        "tokenizer_class": "GPT2Tokenizer",
        "unk_token": END,
    }
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8", newline="\n")


def make_gpt2(base: Base, numbers: LanguageModels, vocabulary: int) -> Any:
    """Make an untrained model, initialised from torch's global generator."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=numbers.positions,
        n_embd=base.hidden,
        n_layer=base.layers,
        n_head=base.heads,
        initializer_range=base.spread,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=_END,
        eos_token_id=_END,
    )
    return GPT2LMHeadModel(config)


def gpt2_training(
    model: Any, tokenizer: Tokenizer, texts: Sequence[str], *, batch: int, rate: float, seed: int, positions: int
) -> Training:
    """Plan one pass of ``model`` over ``texts``."""
    blocks = _blocks(tokenizer, texts, positions)
    return Training(model, _loss(blocks), shuffled_batches(len(blocks), batch, seed), rate)


def _blocks(tokenizer: Tokenizer, texts: Sequence[str], size: int) -> Tensor:
    """Pack ``texts`` into rows (n, size); a row starts with the start of a text, and an end token follows each text."""
    rows: list[list[int]] = [[]]
    for encoding in tokenizer.encode_batch(list(texts)):
        if len(rows[-1]) >= size:
            rows.append([])
        rows[-1] += [*encoding.ids, _END]
    return torch.tensor([row[:size] for row in rows if len(row) >= size])


def _loss(blocks: Tensor) -> Loss:
    def loss(model: Any, rows: list[int]) -> Tensor:
        ids = blocks[torch.tensor(rows)]
        logits = model(ids[:, :-1], use_cache=False).logits
        return functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    return loss
