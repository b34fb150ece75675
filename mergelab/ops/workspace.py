"""Memory for merging block by block: allocated once for many blocks, and outside the allocator's pools for threads."""

from __future__ import annotations

import mmap
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import torch
from torch import Tensor

INTERMEDIATE = 5  # rows in addition to one for each expert


def mapped(count: int, dtype: torch.dtype) -> Tensor:
    """Return a new flat tensor in main memory that goes back to the system when the tensor is deleted."""
    size = count * dtype.itemsize
    if not size or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.empty(count, dtype=dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype, count=count)


@dataclass(frozen=True)
class Workspace:
    """Tensors of a block's length, for the experts' task vectors and for intermediates.

    Attributes:
        whole: (T, length) the task vectors in one piece, so that one operation works on all of them.
        vectors: each of them.
        start, signs, result, shares, spare: flat, for intermediates.
    """

    whole: Tensor
    vectors: list[Tensor]
    start: Tensor
    signs: Tensor
    result: Tensor
    shares: Tensor
    spare: Tensor

    @classmethod
    def of(cls, memory: Tensor) -> Workspace:
        """Divide a matrix of one row for each expert and `INTERMEDIATE` further ones."""
        vectors, others = memory[:-INTERMEDIATE], memory[-INTERMEDIATE:]
        return cls(vectors, list(vectors.unbind()), *others.unbind())


class WorkspaceMemory:
    """The memory of workspaces for blocks of up to ``length`` entries."""

    def __init__(self, experts: int, length: int, dtype: torch.dtype, device: torch.device) -> None:
        count = (experts + INTERMEDIATE) * length
        flat = mapped(count, dtype) if device.type == "cpu" else torch.empty(count, dtype=dtype, device=device)
        self._whole = flat.view(experts + INTERMEDIATE, length)
        self._workspaces: dict[int, Workspace] = {}  # to make one takes as long as an operation

    def workspace(self, length: int) -> Workspace:
        """Return the workspace for blocks of ``length`` entries; all of them share the memory."""
        if length not in self._workspaces:
            self._workspaces[length] = Workspace.of(self._whole[:, :length])
        return self._workspaces[length]


class WorkspacePool:
    """As many workspaces' memories as threads use at the same time; each is used again."""

    def __init__(self) -> None:
        self._free: dict[object, SimpleQueue[WorkspaceMemory]] = defaultdict(SimpleQueue)

    @contextmanager
    def take(self, experts: int, length: int, dtype: torch.dtype, device: torch.device) -> Iterator[WorkspaceMemory]:
        """Lend a memory; the arguments are those of `WorkspaceMemory`."""
        free = self._free[experts, length, dtype, device]
        try:
            memory = free.get_nowait()
        except Empty:
            memory = WorkspaceMemory(experts, length, dtype, device)
        try:
            yield memory
        finally:
            free.put(memory)
