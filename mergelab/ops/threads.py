"""Divide work on parts of tensors among threads, with results in the order of the parts.

Torch and NumPy release the interpreter lock while they compute. Each operation runs on a single thread, so that no
result depends on the number of threads.
"""

from __future__ import annotations

import ctypes
import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TypeVar

import torch

from mergelab.ops.blocks import BLOCK, blocks

Part = TypeVar("Part")
Result = TypeVar("Result")

CHUNK = 32 * BLOCK  # entries of a tensor that one thread processes as one part: 4 million


def thread_count() -> int:
    """Return the number of threads to use: as many as the process may use cores.

    Torch's setting counts (``OMP_NUM_THREADS``, ``torch.set_num_threads``), and so do the process's affinity and its
    container's share of the processors, which torch does not know.
    """
    return min(torch.get_num_threads(), _usable_cores())


@functools.cache
def _usable_cores() -> int:
    from joblib import cpu_count

    return int(cpu_count())


@contextmanager
def pool(threads: int) -> Iterator[ThreadPoolExecutor | None]:
    """Open a pool of ``threads`` workers whose torch operations run on one thread each; None for a single thread.

    Work that has not started when the block ends is cancelled. Torch's setting for the calling thread stays as it is.
    """
    if threads <= 1:
        yield None
        return
    before = torch.get_num_threads()
    executor = ThreadPoolExecutor(threads, thread_name_prefix="merge", initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield executor
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(before)  # the workers' setting is also the default of later threads


@contextmanager
def on_one_thread(device: torch.device) -> Iterator[None]:
    """Run CPU operations of the calling thread on one thread, as in a `pool`; restore torch's setting at the end."""
    before = torch.get_num_threads()
    try:
        if device.type == "cpu":
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(before)


def in_order(
    work: Callable[[Part], Result], parts: Iterable[Part], *, threads: int | None = None, ahead: int = 4
) -> Iterator[Result]:
    """Yield ``work(part)`` for each part, in the order of the parts, computed by several threads.

    Args:
        work: called in any thread; must not depend on earlier calls.
        parts: read one by one, in the caller's thread.
        threads: number of threads; default: `thread_count`.
        ahead: per thread, how many results may be computed before they are needed.
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
    """Yield the parts of tensors that one thread processes at a time.

    Args:
        sizes: number of entries of each tensor, by name.

    Returns:
        Pairs of the tensor's name and a slice of the flattened tensor, `CHUNK` entries long or shorter.
    """
    for name, size in sizes.items():
        for part in blocks(size, CHUNK):
            yield name, part


def return_memory() -> None:
    """Return freed memory from the allocator to the system, where the allocator is glibc's.

    It retains memory that threads have freed, separately for each thread, in an amount that depends on the scheduling.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
