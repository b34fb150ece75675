"""Tiny models that write tokens, alone or behind an encoder, and padded texts for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mergelab.estimation.examples import LABELS, Batch

VOCABULARY = 30
# Lengths of what is read and of what is written, by batch: in some as long as each other, once both are padded.
READ = ([7, 5, 2], [4, 4], [1, 3])
WRITTEN = ([3, 7, 4], [2, 3], [3, 1])
COUNT = sum(map(len, READ))


def writer(kind: str, seed: int = 0, *, scale: float = 3.0) -> nn.Module:
    """Make a model with random weights, large enough that what it writes depends on what it reads."""
    import transformers as t

    small = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    bert = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
    gpt2 = {"n_embd": 12, "n_layer": 2, "n_head": 2, "n_positions": 20}
    t5 = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
    made: dict[str, Any] = {
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(**small, **gpt2)),
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**small, **bert, num_key_value_heads=1)),
        "t5": lambda: t.T5ForConditionalGeneration(t.T5Config(**small, **t5)),
        "bert2gpt2": lambda: t.EncoderDecoderModel(
            t.EncoderDecoderConfig.from_encoder_decoder_configs(
                t.BertConfig(**small, **bert, max_position_embeddings=20), t.GPT2Config(**small, **gpt2)
            )
        ),
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module: nn.Module = made[kind]().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(scale) if parameter.dim() > 1 else parameter.add_(0.1)
    return module


def is_pair(kind: str) -> bool:
    """Return whether models of the kind read with an encoder."""
    return kind in ("t5", "bert2gpt2")


def padded_texts(kind: str, padding: int = 0) -> Iterator[Batch]:
    """Texts of several lengths; ``padding`` more columns do not change what they say."""
    generator = torch.Generator().manual_seed(3)

    def drawn(lengths: list[int]) -> tuple[Tensor, Tensor]:
        mask = (torch.arange(max(lengths) + padding) < torch.tensor(lengths)[:, None]).long()
        ids = torch.randint(3, VOCABULARY, (len(lengths), max(lengths)), generator=generator)
        return nn.functional.pad(ids, (0, padding)) * mask, mask

    for read, written in zip(READ, WRITTEN, strict=True):
        ids, mask = drawn(read)
        if is_pair(kind):
            own, own_mask = drawn(written)
            labels = own.masked_fill(own_mask == 0, -100)
            shifted = nn.functional.pad(own, (1, -1), value=1) * own_mask
            pair = {"decoder_input_ids": shifted, "decoder_attention_mask": own_mask}
            yield {"input_ids": ids, "attention_mask": mask, **pair, LABELS: labels}
        else:
            following = nn.functional.pad(ids, (-1, 1)).masked_fill(nn.functional.pad(mask, (-1, 1)) == 0, -100)
            yield {"input_ids": ids, "attention_mask": mask, LABELS: following}


def single_texts(kind: str) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """The same texts one by one without padding, each with its labels."""
    for batch in padded_texts(kind):
        for row in range(len(batch["input_ids"])):
            count = int(batch["attention_mask"][row].sum())
            inputs = {name: batch[name][row : row + 1, :count] for name in ("input_ids", "attention_mask")}
            if is_pair(kind):
                count = int(batch["decoder_attention_mask"][row].sum())
                names = ("decoder_input_ids", "decoder_attention_mask")
                inputs |= {name: batch[name][row : row + 1, :count] for name in names}
            yield inputs, batch[LABELS][row, :count]


@dataclass
class Writer:
    """A model with the padded texts."""

    network: nn.Module
    kind: str
    padding: int = 0
    key: str = ""
    count: int = COUNT

    padding_side = "right"

    @property
    def parameter_names(self) -> Mapping[str, str]:
        first: dict[int, str] = {}
        named = self.network.named_parameters(remove_duplicate=False)  # tied ones under each of their names
        return {name: first.setdefault(id(parameter), name) for name, parameter in named}

    def module(self) -> nn.Module:
        return self.network

    def batches(self) -> Iterator[Batch]:
        return padded_texts(self.kind, self.padding)
