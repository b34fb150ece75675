"""Minimise the entropy of the merged model's predictions on unlabelled examples of every expert's task.

Methods that learn what to merge differ in their parameters: how these become weights, and what a gradient of the
weights is for them. The examples of a step, the forward passes and the steps of Adam are here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mergelab.errors import ConfigError
from mergelab.estimation.examples import LABELS, Batch, ExpertExamples, Padding
from mergelab.estimation.forward import frozen, merged_parameters, requiring_gradients, size_of
from mergelab.ops.philox import stream_key, words
from mergelab.ops.threads import in_order, on_one_thread, thread_count

Progress = Callable[[str, float], None]
ExampleInputs = dict[str, Tensor]  # inputs of one example, without padding and without a batch dimension

MICRO_BATCH = 4  # examples that run at once on a CPU; results depend on it
GRADIENTS = 4  # micro-batches whose gradients are in memory at once


@dataclass(frozen=True)
class EntropyDescent:
    """Learns by gradient descent on the entropy of the merged model's predictions, with each expert's head.

    Memory: the models, one gradient of all merged parameters, and up to `GRADIENTS` that are being added to it.

    Attributes:
        method: the method that learns, for messages.
        tasks: the experts' modules and examples.
        batch: number of examples of each expert in a step.
        seed: of the examples' draw.
    """

    method: str
    tasks: Sequence[EntropyTask]
    batch: int
    seed: int

    def run(
        self,
        raw: Sequence[Tensor],
        write: Callable[[int], None],
        gradients_of: Callable[[Mapping[str, Tensor], int], Sequence[Tensor]],
        *,
        lr: float,
        steps: int,
        progress: Progress,
    ) -> None:
        """Take steps of Adam on Σ_t E H(p(·|x)), the sum over tasks of the mean entropy.

        Args:
            raw: what is learnt; overwritten.
            write: writes the merged weights that ``raw`` gives into the modules, with a number of threads.
            gradients_of: receives the gradients of merged tensors by common name, and a number of threads; returns the
                gradient of each tensor of ``raw``.
            lr: learning rate.
            steps: number of steps.
            progress: receives a message and the fraction of steps done.

        Raises:
            ConfigError: an expert's model does not predict classes.
        """
        adam = torch.optim.Adam(list(raw), lr=lr)
        device = next(self.tasks[0].module.parameters()).device
        threads = thread_count() if device.type == "cpu" else 1
        with ExitStack() as stack:
            for module in {id(task.module): task.module for task in self.tasks}.values():
                stack.enter_context(frozen(module))
            merged = [parameter for task in self.tasks for parameter in task.merged.values()]
            stack.enter_context(requiring_gradients(merged))
            stack.enter_context(on_one_thread(device))
            for step in range(steps):
                write(threads)
                entropy, gradients = self._gradients(step, threads)
                for each, gradient in zip(raw, gradients_of(gradients, threads), strict=True):
                    each.grad = gradient
                adam.step()
                progress(f"learning coefficients: entropy {entropy:.4f}", (step + 1) / steps)

    def targets(self) -> dict[str, list[nn.Parameter]]:
        """Return the modules' parameters that hold each merged tensor, by common name."""
        found: dict[str, dict[int, nn.Parameter]] = {}
        for task in self.tasks:
            for name, parameter in task.merged.items():
                found.setdefault(name, {})[id(parameter)] = parameter
        return {name: list(parameters.values()) for name, parameters in found.items()}

    def _gradients(self, step: int, threads: int) -> tuple[float, dict[str, Tensor]]:
        entropy, gradients = 0.0, dict[str, Tensor]()
        for task in self.tasks:
            for parameter, value in task.unmerged:
                parameter.detach().copy_(value)
            batches = list(task.micro_batches(self.batch, self.seed, step))
            entropy += self._add_entropy(task, batches, gradients, threads)
        return entropy, gradients

    def _add_entropy(
        self, task: EntropyTask, batches: Sequence[Batch], gradients: dict[str, Tensor], threads: int
    ) -> float:
        """Add the gradient of the examples' mean entropy to ``gradients``, batch by batch; return the entropy."""
        count = sum(size_of(batch) for batch in batches)
        parameters = list(task.merged.values())

        def run(batch: Batch) -> tuple[float, tuple[Tensor | None, ...]]:
            with torch.enable_grad():
                entropy = mean_entropy(task.module(**batch), task.expert, self.method) * (size_of(batch) / count)
            if not entropy.requires_grad:
                return entropy.item(), (None,) * len(parameters)
            return entropy.item(), torch.autograd.grad(entropy, parameters, allow_unused=True)

        total = 0.0
        for entropy, found in in_order(run, batches, threads=min(threads, GRADIENTS), ahead=1):
            total += entropy
            for name, gradient in zip(task.merged, found, strict=True):
                if gradient is not None:
                    gradients[name] = gradients[name].add_(gradient) if name in gradients else gradient.clone()
        return total


@dataclass(frozen=True)
class EntropyTask:
    """An expert's module, whose merged parameters are overwritten in each step, and its examples.

    Attributes:
        expert: its name.
        content: a digest of its merged tensors' values.
        module: the module to run; experts may share it.
        merged: the module's merged parameters, by common name.
        unmerged: the module's other parameters (the head), each with the expert's value.
        rows: the examples' inputs.
        pad_id: padding token of ``input_ids``.
        padding: how examples share a batch.
    """

    expert: str
    content: str
    module: nn.Module
    merged: Mapping[str, nn.Parameter]
    unmerged: Sequence[tuple[nn.Parameter, Tensor]]
    rows: Sequence[ExampleInputs]
    pad_id: int
    padding: Padding

    def micro_batches(self, batch: int, seed: int, step: int) -> Iterator[dict[str, Tensor]]:
        """Yield a step's examples as padded inputs, grouped by length."""
        drawn = [self.rows[at] for at in positions(len(self.rows), batch, seed, self.content, step)]
        device = next(self.module.parameters()).device
        drawn.sort(key=lambda row: max((len(value) for value in row.values() if value.dim()), default=0))
        size = MICRO_BATCH if device.type == "cpu" else batch
        for rows in _grouped(drawn, size, self.padding):
            yield {name: self._stacked(name, [row[name] for row in rows]).to(device) for name in rows[0]}

    def _stacked(self, name: str, values: list[Tensor]) -> Tensor:
        if not values[0].dim():
            return torch.stack(values)
        fill = float(self.pad_id) if name == "input_ids" else 0.0
        side = "left" if self.padding == "left" else "right"
        return nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill, padding_side=side)


def _grouped(rows: Sequence[ExampleInputs], size: int, padding: Padding) -> Iterator[Sequence[ExampleInputs]]:
    """Divide sorted examples into batches of up to ``size`` that can be padded so."""
    size = 1 if padding == "alone" else size

    def shape(row: ExampleInputs) -> list[torch.Size]:
        return [value.shape for value in row.values()] if padding == "equal" else []

    for _, group in groupby(rows, shape):
        together = list(group)
        for start in range(0, len(together), size):
            yield together[start : start + size]


def positions(count: int, batch: int, seed: int, content: str, step: int) -> list[int]:
    """Draw ``batch`` of an expert's ``count`` examples for a step without replacement; all when there are fewer."""
    permutation = np.argsort(words(stream_key(seed, "adamerging", content, str(step)), 0, count), kind="stable")
    return [int(at) for at in permutation[:batch]]


def entropy_task(expert: str, content: str, drawn: ExpertExamples) -> EntropyTask:
    """Collect an expert's examples and unmerged parameters, before another expert is loaded into the same module."""
    module = drawn.module()
    names = drawn.parameter_names
    merged = merged_parameters(module, names)
    ids = {id(parameter) for parameter in merged.values()}
    unmerged = [
        (parameter, parameter.detach().clone()) for parameter in module.parameters() if id(parameter) not in ids
    ]
    rows = [row for batch in drawn.batches() for row in _rows(batch)]
    pad_id = getattr(getattr(module, "config", None), "pad_token_id", None)
    pad_id = pad_id if isinstance(pad_id, int) else 0
    return EntropyTask(expert, content, module, merged, unmerged, rows, pad_id, drawn.padding_side)


def _rows(batch: Batch) -> Iterator[ExampleInputs]:
    """Split a batch into examples, without padding and labels."""
    inputs = {name: value.cpu() for name, value in batch.items() if name != LABELS}
    mask = inputs.get("attention_mask")
    for row in range(size_of(inputs)):
        if mask is None:
            yield {name: value[row] for name, value in inputs.items()}
            continue
        filled = mask[row].nonzero().flatten().tolist() or [0]
        tokens = slice(filled[0], filled[-1] + 1)
        padded = [name for name, value in inputs.items() if value.dim() > 1 and value.shape[1] == mask.shape[1]]
        yield {name: value[row, tokens] if name in padded else value[row] for name, value in inputs.items()}


def mean_entropy(output: Any, expert: str, method: str) -> Tensor:
    """Return the mean Shannon entropy of the predicted distributions softmax(``output.logits``), (b, C), as a scalar.

    Raises:
        ConfigError: the model does not predict two or more classes.
    """
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] < 2:
        what = "one score" if isinstance(logits, Tensor) and logits.shape[-1] == 1 else "no classes"
        raise ConfigError(f"{of_classes(method)}, and {expert}'s model has {what} as its output")
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()


def of_classes(method: str) -> str:
    """Return how messages about models without classes begin."""
    return f"method={method}: minimises the entropy of predicted classes"


def written_text(method: str) -> str:
    """Return why models that write text cannot be merged by a method that minimises entropy."""
    return f"{of_classes(method)}, and models that write text have none as their output"
