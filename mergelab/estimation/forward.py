"""Run an expert's module over batches, with the same bits for any number of threads.

As many batches run at once as there are threads, each on one thread. Their results are added in the order of the
batches; several threads add different parts of a result. Sums over a group of batches (`groups`) are computed first and
then added to the total, which also reduces rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice

import torch
from torch import Tensor, nn

from mergelab.estimation.examples import LABELS, Batch
from mergelab.weights.source import TensorSource

GROUP = 4  # batches that are summed before they are added to the total; results depend on it


def groups(batches: Iterable[Batch], size: int = GROUP) -> Iterator[list[Batch]]:
    """Yield lists of ``size`` consecutive batches; the last may be shorter."""
    remaining = iter(batches)
    while group := list(islice(remaining, size)):
        yield group


def split_labels(batch: Batch, device: torch.device) -> tuple[dict[str, Tensor], Tensor | None]:
    """Split a batch into the module's inputs and the labels (None without labels), both on ``device``."""
    inputs = {name: value.to(device) for name, value in batch.items() if name != LABELS}
    labels = batch.get(LABELS)
    return inputs, None if labels is None else labels.to(device)


def size_of(batch: Batch) -> int:
    """Return the number of examples of a batch."""
    return len(next(iter(batch.values())))


def merged_parameters(module: nn.Module, names: Mapping[str, str]) -> dict[str, nn.Parameter]:
    """Return a module's merged parameters by common name, from the common names by the module's own."""
    return {names[own]: parameter for own, parameter in module.named_parameters() if own in names}


@torch.no_grad()
def write_merged(module: nn.Module, names: Mapping[str, str], source: TensorSource) -> None:
    """Write a model's tensors into a module's merged parameters; the others (the head) stay."""
    for name, parameter in merged_parameters(module, names).items():
        parameter.copy_(source.get(name))


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Set ``requires_grad`` of all parameters to False, and restore it at the end."""
    before = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


@contextmanager
def requiring_gradients(frozen_tensors: Iterable[Tensor]) -> Iterator[None]:
    """Set ``requires_grad`` of frozen tensors to True, and back to False at the end."""
    tensors = list(frozen_tensors)
    try:
        for tensor in tensors:
            tensor.requires_grad_(True)
        yield
    finally:
        for tensor in tensors:
            tensor.requires_grad_(False)
