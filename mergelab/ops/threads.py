"""Work on parts of tensors, divided among threads, its results in the order of the parts.

Torch and NumPy let other threads run while they compute. Every operation runs on one thread of its own, so that no
result depends on how many there are.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TypeVar

import torch

from mergelab.ops.blocks import BLOCK, blocks

Part = TypeVar("Part")
Result = TypeVar("Result")

CHUNK = 32 * BLOCK  # entries of a tensor that one thread works through: 4 million


def thread_count() -> int:
    """Return how many threads to use: as many as torch does (``OMP_NUM_THREADS``, ``torch.set_num_threads``)."""
    return torch.get_num_threads()


@contextmanager
def pool(threads: int) -> Iterator[ThreadPoolExecutor | None]:
    """Give ``threads`` workers whose torch operations run on one thread each; None where one is enough.

    What has not been started when the caller leaves is dropped.
    """
    if threads <= 1:
        yield None
        return
    executor = ThreadPoolExecutor(threads, thread_name_prefix="merge", initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield executor
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(threads)  # a thread's own setting is also what later threads start with


def in_order(
    work: Callable[[Part], Result], parts: Iterable[Part], *, threads: int | None = None, ahead: int = 4
) -> Iterator[Result]:
    """Return ``work(part)`` for each part, in their order, computed by several threads.

    Args:
        work: called in any thread; must not depend on what it was called with before.
        parts: taken one by one, in the caller's thread.
        threads: default `thread_count`.
        ahead: how many results may wait for the one that comes before them, for each thread.
    """
    threads = thread_count() if threads is None else threads
    with pool(threads) as workers:
        if workers is None:
            yield from map(work, parts)
            return
        waiting: deque[Future[Result]] = deque()
        for part in parts:
            waiting.append(workers.submit(work, part))
            if len(waiting) >= threads * ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def chunks(sizes: Mapping[str, int]) -> Iterator[tuple[str, slice]]:
    """Divide tensors of these many entries into parts that one thread works through."""
    for name, size in sizes.items():
        for part in blocks(size, CHUNK):
            yield name, part


def return_memory() -> None:
    """Let the allocator give what is free back to the system, where it is one that can be asked to: glibc's.

    It keeps what threads have freed, for each of them apart, and how many they were in turn depends on the scheduling.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
