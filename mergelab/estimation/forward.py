"""Running an expert's module over batches, so that the number of threads changes no bit.

As many batches run at once as there are threads, each on one thread; what they give is added up in their order, parts
of a result side by side. `groups` says how many batches are held at once. Sums over a group are made on their own and
then added to the whole, which also keeps rounding small.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice

import torch
from torch import Tensor, nn

from mergelab.estimation.examples import LABELS, Batch

GROUP = 4  # a part of the result: it says which batches are added up on their own


def groups(batches: Iterable[Batch], size: int = GROUP) -> Iterator[list[Batch]]:
    """Take ``size`` batches at a time."""
    waiting = iter(batches)
    while group := list(islice(waiting, size)):
        yield group


def split_labels(batch: Batch, device: torch.device) -> tuple[dict[str, Tensor], Tensor | None]:
    """Divide a batch into the module's inputs and the labels, both on ``device``."""
    inputs = {name: value.to(device) for name, value in batch.items() if name != LABELS}
    labels = batch.get(LABELS)
    return inputs, None if labels is None else labels.to(device)


def size_of(batch: Batch) -> int:
    """Return the number of examples."""
    return len(next(iter(batch.values())))


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Let no parameter ask for gradients, and put that back at the end."""
    before = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, asked in before:
            parameter.requires_grad_(asked)


@contextmanager
def on_one_thread(device: torch.device) -> Iterator[None]:
    """Let each operation of the calling thread run on one thread, as in `mergelab.ops.threads`."""
    before = torch.get_num_threads()
    try:
        if device.type == "cpu":
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(before)
