"""A small module that runs toy models on a few examples, for methods that learn from data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from mergelab.estimation.examples import Batch
from mergelab.weights.align import AlignedModels, check_finite

NAMES = {
    "embed.weight": "embed",
    "layer.weight": "layer.weight",
    "layer.bias": "layer.bias",
    "gate": "gate",
    "head.weight": "head",
}


class ToyModule(nn.Module):
    """A classifier with an embedding, GPT-2's kind of linear layer, a scalar of its own, and a linear layer."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.embed, self.layer = nn.Embedding(300, 257), Conv1D(33, 17)
        self.head = nn.Linear(33, 3, bias=False)
        self.gate = nn.Parameter(torch.zeros(()))
        own = dict(self.named_parameters())
        with torch.no_grad():
            for name, tensor in tensors.items():
                own[name].copy_(tensor)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        words = self.embed(input_ids)[..., :255].unflatten(-1, (17, 15)).mean(-1)
        hidden = self.gate * torch.tanh(self.layer(words))
        mask = attention_mask[..., None].to(hidden.dtype)
        return SimpleNamespace(logits=self.head((hidden * mask).sum(1) / mask.sum(1)))


@dataclass(frozen=True)
class ToyExpert:
    """One expert of toy models, and examples with texts of their own for each expert."""

    models: AlignedModels
    expert: str
    count: int
    key: str = ""

    padding_side = "right"

    @property
    def parameter_names(self) -> Mapping[str, str]:
        return NAMES if "embed" in self.models.names else {}

    def module(self) -> nn.Module:
        (source,) = (expert for expert in self.models.experts if expert.name == self.expert)
        for name in self.models.names:
            check_finite(source, name, source.get(name))
        with torch.random.fork_rng():  # its layers draw their first weights
            return ToyModule({own: source.get(name) for own, name in self.parameter_names.items()})

    def batches(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(sum(map(ord, self.expert)))
        for start in range(0, self.count, 4):
            size, longest = min(4, self.count - start), 7 - start % 3
            lengths = torch.randint(1, longest + 1, (size, 1), generator=generator)
            mask = (torch.arange(longest) < lengths).long()
            ids = torch.randint(1, 300, (size, longest), generator=generator) * mask
            yield {
                "input_ids": ids,
                "attention_mask": mask,
                "labels": torch.randint(0, 3, (size,), generator=generator),
            }


@dataclass(frozen=True)
class ToyExamples:
    """Examples for every expert of toy models."""

    models: AlignedModels
    folder: Path | None = None

    def of(self, expert: str, *, samples: int, seed: int, labelled: bool = False) -> ToyExpert:
        return ToyExpert(self.models, expert, min(samples, 22))

    def score(self, experts: Sequence[str]) -> float:
        """Score an average of experts, so that some of them make it worse."""
        return sum(len(name) for name in experts) / len(experts) - 0.9 * ("apple" in experts)

    def progress(self, message: str, done: float) -> None:
        """Show nothing."""

    def settle(self, found: Any) -> None:
        """Take note of nothing."""
