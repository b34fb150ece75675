"""Examples that are given from Python, for methods that learn from data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mergelab.errors import ConfigError, DataError
from mergelab.estimation.examples import LABELS, Batch, Padding
from mergelab.estimation.forward import size_of
from mergelab.weights.conversion import load_weights
from mergelab.weights.module import copy_module, module_of
from mergelab.weights.pretrained import load_model

if TYPE_CHECKING:
    from mergelab.experiment.label_orders import Order
    from mergelab.experiment.opening import OpenedModels

_MASK = "attention_mask"


@dataclass(frozen=True)
class GivenOfExpert:
    """One expert and its examples; see `mergelab.estimation.examples.ExpertExamples`."""

    source: GivenExamples
    index: int
    given: Sequence[Batch]
    key: str = ""  # statistics are not cached

    @property
    def count(self) -> int:
        """How many examples there are."""
        return sum(map(size_of, self.given))

    @property
    def parameter_names(self) -> Mapping[str, str]:
        """The common name of each parameter that is merged."""
        aligned = self.source.opened.aligned
        return {**{name: name for name in aligned.names}, **aligned.aliases}

    @property
    def padding_side(self) -> Padding:
        """Where the batches are padded; ``equal`` where they are not."""
        masks = [batch[_MASK] for batch in self.given if _MASK in batch]
        if all(bool(mask.bool().all()) for mask in masks):
            return "equal"
        return "right" if all(bool(mask[:, 0].bool().all()) for mask in masks) else "left"

    def module(self) -> nn.Module:
        """Load the expert's own weights, its head among them, into the module that all experts share."""
        opened, expert = self.source.opened, self.source.opened.aligned.experts[self.index]
        heads = {name: expert.get(name) for name in opened.head_names if name in opened.aligned.names}
        return load_weights(self.source.shared, {**opened.expert_backbone(self.index), **heads}, untied=opened.untied)

    def batches(self) -> Iterator[Batch]:
        """Yield the batches as they were given, labels in the order of the shared module's outputs."""
        order = self.source.opened.label_orders[self.index]
        for batch in self.given:
            yield batch if order is None or LABELS not in batch else {**batch, LABELS: _in_order(batch[LABELS], order)}


@dataclass(frozen=True)
class GivenExamples:
    """Batches for each expert, as `mergelab.estimation.examples.ExampleSource`.

    Attributes:
        opened: the models.
        of_each: for each expert its batches: the keyword arguments of its module, as tensors with a row for each
            example; with ``labels`` for methods that need them.
        task: what a hub id or a folder is loaded for, as for a pipeline.
        method: the method's name, for messages.
    """

    opened: OpenedModels
    of_each: Sequence[Iterable[Batch]]
    task: str | None
    method: str
    folder: None = None

    def __post_init__(self) -> None:
        """Check that each expert has examples; see `mergelab.api` for the errors."""
        experts = self.opened.experts
        if isinstance(self.of_each, Mapping | str) or not isinstance(self.of_each, Sequence):
            raise ConfigError("examples: must be a list with an entry for each expert, which is a list of batches")
        if len(self.of_each) != len(experts):
            raise ConfigError(f"examples: there are {len(self.of_each)} entries for {len(experts)} experts")

    @cached_property
    def shared(self) -> nn.Module:
        """The module that runs one expert after the other: a copy of the last one, in float32."""
        last = self.opened.experts[-1]
        if (module := module_of(last.given)) is not None:
            return copy_module(module).float().eval()
        if last.folder is None:
            raise ConfigError(f"method={self.method}: runs the models, and {last.name} is a state dict; give modules")
        if self.task is None:
            raise ConfigError("merging hub ids or folders makes a pipeline: say which with task='text-classification'")
        loaded: nn.Module = load_model(last.folder, self.task, checkpoint=last.checkpoint, dtype=torch.float32)
        return loaded.eval()

    def of(self, expert: str, *, samples: int, seed: int, labelled: bool = False) -> GivenOfExpert:
        """Return the first ``samples`` examples of one expert.

        Raises:
            DataError: it has none, or they lack labels.
            ConfigError: a batch is no mapping of tensors with a row for each example.
        """
        index = [each.name for each in self.opened.aligned.experts].index(expert)
        where, found, left = f"examples[{index}]", [], samples
        for batch in self.of_each[index]:
            _check(batch, where)
            if labelled and LABELS not in batch:
                raise DataError(f"method={self.method}: needs labels, and a batch of {where} has none")
            if left <= 0:
                break
            taken = {name: value[:left] for name, value in batch.items() if labelled or name != LABELS or self._writes}
            found.append(taken)
            left -= size_of(taken)
        if not found:
            raise DataError(f"{where}: has no batches (an iterator can be read once; give a list)")
        return GivenOfExpert(self, index, found)

    def progress(self, message: str, done: float) -> None:
        """Show nothing."""

    def settle(self, coefficients: Mapping[str, Mapping[str, float]], /) -> None:
        """Take no note of what a method has learnt."""

    @property
    def _writes(self) -> bool:
        """Whether the model generates tokens: what it is to write is part of an example."""
        kind = self.opened.architecture
        return kind is None or not kind.is_classifier


def _check(batch: Any, where: str) -> None:
    if not isinstance(batch, Mapping) or not batch or not all(isinstance(value, Tensor) for value in batch.values()):
        raise ConfigError(f"{where}: a batch must be a mapping of the model's inputs to tensors, as of a tokenizer")
    if 0 in (sizes := {len(value) if value.dim() else 0 for value in batch.values()}) or len(sizes) > 1:
        raise ConfigError(f"{where}: the tensors of a batch must have one row for each example")


def _in_order(labels: Tensor, order: Order) -> Tensor:
    """Return labels as numbers of the shared outputs, of which the i-th is the expert's own ``order[i]``."""
    inverse = torch.empty(len(order), dtype=torch.int64)
    inverse[torch.tensor(order)] = torch.arange(len(order))
    return inverse.to(labels.device)[labels.long()]
