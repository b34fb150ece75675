"""Reduce whole tensors with float64 accuracy, to the same bits for any number of threads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import repeat

import torch
from torch import Tensor

from mergelab.errors import ShapeMismatch

# Below torch's grain size (32768 elements) no operation is split over threads, so the order of additions is fixed;
# two float64 blocks of this length fit into a core's second-level cache.
SUM_BLOCK = 16_384


def dot(a: Tensor, b: Tensor) -> float:
    """Return Σ a·b over all entries, products and sums in float64.

    The tensors are read block by block, so that no float64 copy of a whole tensor is made. Block sums are added exactly
    (``math.fsum``), so that the result does not depend on the number of threads.

    Args:
        a: any shape, any real dtype.
        b: as many entries as ``a``, on the same device.

    Raises:
        ShapeMismatch: the tensors have different shapes.
    """
    if a.shape != b.shape:
        raise ShapeMismatch(f"dot of tensors of different shapes: {list(a.shape)} and {list(b.shape)}")
    return _blockwise(a, b, lambda x, y: x.mul_(y))


def norm(a: Tensor) -> float:
    """Return the Euclidean norm of all entries of ``a``, accumulated in float64."""
    return math.sqrt(_blockwise(a, None, lambda x, _: x.mul_(x)))


def total(a: Tensor) -> float:
    """Return the sum of all entries of ``a``, accumulated in float64."""
    return _blockwise(a, None, lambda x, _: x)


def cosine(a: Tensor, b: Tensor) -> float:
    """Return the cosine between the flattened ``a`` and ``b``, in [-1, 1]; 0 when either is zero."""
    lengths = norm(a) * norm(b)
    if lengths == 0.0:
        return 0.0
    return max(-1.0, min(1.0, dot(a, b) / lengths))


def cast_like(values: Tensor, like: Tensor) -> Tensor:
    """Round ``values`` once, to nearest even, to the dtype of ``like``; return them unchanged when it is the same."""
    return values.to(like.dtype)


def _blockwise(a: Tensor, b: Tensor | None, terms: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Sum ``terms`` over blocks of ``a`` (and ``b``), copied into two float64 buffers."""
    if a.numel() == 0:
        return 0.0
    with torch.no_grad():
        x = torch.empty(SUM_BLOCK, dtype=torch.float64, device=a.device)
        y = torch.empty(SUM_BLOCK if b is not None else 0, dtype=torch.float64, device=a.device)
        sums = torch.empty(-(-a.numel() // SUM_BLOCK), dtype=torch.float64, device=a.device)
        others: Iterator[Tensor] | repeat[None] = repeat(None) if b is None else _blocks(b)
        for i, (p, q) in enumerate(zip(_blocks(a), others, strict=False)):
            n = p.numel()
            right = y if q is None else y[:n].copy_(q)
            torch.sum(terms(x[:n].copy_(p), right), dim=0, out=sums[i])
        try:
            return math.fsum(sums.tolist())
        except (ValueError, OverflowError):  # infinities of both signs, or a sum beyond float64
            return float(sums.sum())


def _blocks(a: Tensor) -> Iterator[Tensor]:
    return iter(torch.split(a.detach().reshape(-1), SUM_BLOCK))
