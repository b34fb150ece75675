"""Batches of an evaluation side by side, in threads that use one core each.

An operation that is divided among cores waits for the slowest of them at its end. On a machine that others use too,
these waits are most of the time; a batch that one core computes by itself waits for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch

from mergelab.ops.threads import in_order, on_one_thread, thread_count

Batch = TypeVar("Batch")
Result = TypeVar("Result")

# Per thread, how many batches may be computed before they are asked for: what a stopped evaluation does in vain.
_AHEAD = 2


def side_by_side(
    work: Callable[[Batch], Result], batches: Iterable[Batch], device: torch.device, *, alone: bool = False
) -> Iterator[Result]:
    """Yield ``work(batch)`` for each batch, in the order of the batches, in inference mode.

    On a CPU as many batches are computed at once as the process may use cores (`mergelab.ops.threads.thread_count`),
    each operation on one core, so that no bit of a result depends on their number. Elsewhere one after the other.

    Args:
        work: called in any thread.
        batches: what it is called with.
        device: where it computes.
        alone: whether one batch may change what the next one needs, so that there is only one at a time.
    """
    threads = thread_count() if device.type == "cpu" and not alone else 1

    def compute(batch: Batch) -> Result:
        with torch.inference_mode():
            return work(batch)

    with on_one_thread(device):
        yield from in_order(compute, batches, threads=threads, ahead=_AHEAD)
