"""Workspaces for blocks: allocated once for many blocks, outside what the allocator keeps for each thread."""

from __future__ import annotations

import mmap
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import torch
from torch import Tensor

INTERMEDIATE = 5  # rows beside the experts'


def mapped(count: int, dtype: torch.dtype) -> Tensor:
    """Return a new flat tensor in main memory of its own, which goes back to the system when the tensor goes."""
    size = count * dtype.itemsize
    if not size or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.empty(count, dtype=dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype, count=count)


@dataclass(frozen=True)
class Workspace:
    """Views of a workspace's memory, cut to the length of a block.

    Attributes:
        whole: the experts' rows in one piece, so that one call works on all of them.
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
    def of(cls, room: Tensor) -> Workspace:
        """Divide a matrix of `INTERMEDIATE` rows and one for each expert."""
        vectors, others = room[:-INTERMEDIATE], room[-INTERMEDIATE:]
        return cls(vectors, list(vectors.unbind()), *others.unbind())


class WorkspaceMemory:
    """Memory for merging blocks of up to ``length`` entries: a row for each expert and each intermediate."""

    def __init__(self, experts: int, length: int, dtype: torch.dtype, device: torch.device) -> None:
        count = (experts + INTERMEDIATE) * length
        flat = mapped(count, dtype) if device.type == "cpu" else torch.empty(count, dtype=dtype, device=device)
        self._whole = flat.view(experts + INTERMEDIATE, length)
        self._rows: dict[int, Workspace] = {}  # to cut them takes as long as an operation

    def rows(self, length: int) -> Workspace:
        """Return the rows, cut to ``length``."""
        if length not in self._rows:
            self._rows[length] = Workspace.of(self._whole[:, :length])
        return self._rows[length]


class WorkspacePool:
    """As many rooms as there are threads that ask at the same time; each stays for the next who asks."""

    def __init__(self) -> None:
        self._free: dict[object, SimpleQueue[WorkspaceMemory]] = defaultdict(SimpleQueue)

    @contextmanager
    def take(self, experts: int, length: int, dtype: torch.dtype, device: torch.device) -> Iterator[WorkspaceMemory]:
        """Lend a room; the arguments are those of `WorkspaceMemory`."""
        free = self._free[experts, length, dtype, device]
        try:
            room = free.get_nowait()
        except Empty:
            room = WorkspaceMemory(experts, length, dtype, device)
        try:
            yield room
        finally:
            free.put(room)
