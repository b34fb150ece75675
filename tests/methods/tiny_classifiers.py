"""Tiny classifiers of several architectures, and padded inputs, for statistics of gradients and activations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mergelab.estimation.examples import Batch

LENGTHS = ([9, 9, 7], [6, 5, 4], [2, 2], [1], [3, 3], [8, 2])


def classifier(kind: str, outputs: int = 2, *, scale: float = 3.0) -> nn.Module:
    """Make a model with random weights, large enough that its outputs differ between examples; float64."""
    import transformers as t

    small = {"vocab_size": 50, "num_labels": outputs}
    bert = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    made: dict[str, Any] = {
        "bert": lambda: t.BertForSequenceClassification(t.BertConfig(**small, **bert, max_position_embeddings=20)),
        "roberta": lambda: t.RobertaForSequenceClassification(
            t.RobertaConfig(**small, **bert, max_position_embeddings=24)
        ),
        "gpt2": lambda: t.GPT2ForSequenceClassification(
            t.GPT2Config(
                **small, n_embd=16, n_layer=2, n_head=2, n_positions=20, pad_token_id=0, eos_token_id=0, bos_token_id=0
            )
        ),
        "llama": lambda: t.LlamaForSequenceClassification(
            t.LlamaConfig(**small, **bert, num_key_value_heads=1, pad_token_id=0)
        ),
        "albert": lambda: t.AlbertForSequenceClassification(
            t.AlbertConfig(**small, **bert, embedding_size=8, max_position_embeddings=20)
        ),
        "t5": lambda: t.T5ForSequenceClassification(
            t.T5Config(
                **small,
                d_model=16,
                d_kv=8,
                d_ff=24,
                num_layers=2,
                num_heads=2,
                pad_token_id=0,
                eos_token_id=1,
                decoder_start_token_id=0,
            )
        ),
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module: nn.Module = made[kind]().eval().double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(scale) if parameter.dim() > 1 else parameter.add_(0.1)
    return module


def padded_batches(ends_with: int | None = None, padding: int = 0) -> Iterator[Batch]:
    """Examples of several lengths; ``padding`` more columns do not change what they say."""
    generator = torch.Generator().manual_seed(1)
    for lengths in LENGTHS:
        mask = (torch.arange(max(lengths) + padding) < torch.tensor(lengths)[:, None]).long()
        drawn = torch.randint(3, 50, (len(lengths), max(lengths)), generator=generator)
        ids = torch.nn.functional.pad(drawn, (0, padding)) * mask
        if ends_with is not None:
            ids[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = ends_with
        labels = torch.randint(0, 2, (len(lengths),), generator=generator)
        yield {"input_ids": ids, "attention_mask": mask, "labels": labels}


def single_examples(ends_with: int | None = None) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """The same examples one by one, without padding, each with its label."""
    for batch in padded_batches(ends_with):
        for row, mask in enumerate(batch["attention_mask"]):
            count = int(mask.sum())
            inputs = {name: batch[name][row : row + 1, :count] for name in ("input_ids", "attention_mask")}
            yield inputs, batch["labels"][row]


@dataclass
class Expert:
    """A module with the padded examples; counts how often it was asked for its module."""

    network: nn.Module
    key: str = "content"
    padding: int = 0
    ends_with: int | None = None
    count: int = sum(map(len, LENGTHS))
    asked: int = 0

    padding_side = "right"

    @property
    def parameter_names(self) -> Mapping[str, str]:
        return {name: name for name, _ in self.network.named_parameters()}

    def module(self) -> nn.Module:
        self.asked += 1
        return self.network

    def batches(self) -> Iterator[Batch]:
        return padded_batches(self.ends_with, self.padding)
