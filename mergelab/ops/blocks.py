"""Working through large tensors in pieces that stay in a core's cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

# A temporary of this length stays in a core's cache, and an operation on it is long beside the call of it: two threads
# that compute on shorter ones wait for the interpreter more than they compute.
BLOCK = 131_072


def blocks(stop: int, size: int = BLOCK, start: int = 0) -> Iterator[slice]:
    """Cut ``range(start, stop)`` into slices of ``size``; the last may be shorter."""
    edges = [*range(start, stop, size), stop]
    return (slice(start, stop) for start, stop in pairwise(edges) if stop > start)


def working(tensor: Tensor) -> Tensor:
    """Return ``tensor`` in the dtype that elementwise arithmetic is done in: float64 for float64, else float32."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def blockwise(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Apply an elementwise function to tensors of one shape, block by block.

    Args:
        function: receives one flat block of each tensor, in float32 or float64, and returns a block.
        tensors: at least one, of one shape.

    Returns:
        A new tensor of that shape; float64 if any of ``tensors`` is, else float32.
    """
    first = tensors[0]
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    result = torch.empty(first.shape, dtype=dtype, device=first.device)
    flat = [tensor.reshape(-1) for tensor in tensors]
    into = result.view(-1)
    for part in blocks(first.numel()):
        into[part] = function(*(working(tensor[part]) for tensor in flat))
    return result


def largest(tensor: Tensor) -> float:
    """Return the largest magnitude; 0 of an empty tensor."""
    if not tensor.numel():
        return 0.0
    ends = torch.aminmax(tensor)
    return max(-float(ends.min), float(ends.max))


def all_finite(tensor: Tensor) -> bool:
    """Return whether a block is finite; False also where finite entries are too large to be added up."""
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    wide = tensor.float() if tensor.element_size() == 1 else tensor  # 8-bit floats cannot be added
    return math.isfinite(wide.sum(dtype=dtype).item())
