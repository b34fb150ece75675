"""Sums of low-rank changes, and the best change of a given rank or energy: in factors, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergelab.adapters.changes import LowRank

_OVERSAMPLING, _ITERATIONS = 16, 6  # of the randomised SVD
_SMALL = 4  # a matrix with fewer than this many times the wanted columns is decomposed exactly


@dataclass(frozen=True, eq=False)
class Fitted:
    """A change as factors.

    Attributes:
        left: (rows, r) float32.
        right: (r, columns) float32.
        energy: the share of ‖ΔW‖² that they keep, at most 1.
        whole: ‖ΔW‖².
    """

    left: Tensor
    right: Tensor
    energy: float
    whole: float


def joined(changes: Sequence[tuple[float, LowRank]]) -> tuple[Tensor, Tensor]:
    """Join a weighted sum of changes to one of rank Σr, exactly.

    Args:
        changes: each with its weight; all of one shape.

    Returns:
        (rows, Σr) and (Σr, columns), float64: Σ w_t s_t L_t R_t is their product.
    """
    left = torch.cat([change.left.double() * (weight * change.scale) for weight, change in changes], dim=1)
    return left, torch.cat([change.right.double() for _, change in changes])


def of_product(left: Tensor, right: Tensor, rank: int | None, energy: float | None) -> Fitted:
    """Fit a product of factors: two QR decompositions and the SVD of an (R, R) matrix; the product is never made.

    Args:
        left, right: (rows, R) and (R, columns), float64.
        rank: of the result; None: the least that keeps ``energy``.
        energy: the share of ‖ΔW‖² to keep.
    """
    ql, rl = torch.linalg.qr(left)
    qr, rr = torch.linalg.qr(right.T)
    u, values, vh = torch.linalg.svd(rl @ rr.T, full_matrices=False)
    return _cut(ql @ u, values, vh @ qr.T, float(values.square().sum()), rank, energy)


def of_matrix(change: Tensor, rank: int | None, energy: float | None) -> Fitted:
    """Fit a matrix: by a randomised SVD where the rank is far below its size, else by a whole one.

    Args:
        change: (rows, columns), float32.
        rank, energy: as for `of_product`.
    """
    whole = float(change.double().square().sum())
    if rank is not None and _SMALL * (rank + _OVERSAMPLING) < min(change.shape):
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            u, values, v = torch.svd_lowrank(change, q=rank + _OVERSAMPLING, niter=_ITERATIONS)
        return _cut(u.double(), values.double(), v.double().T, whole, rank, energy)
    u, values, vh = torch.linalg.svd(change.double(), full_matrices=False)
    return _cut(u, values, vh, whole, rank, energy)


def _cut(u: Tensor, values: Tensor, vh: Tensor, whole: float, rank: int | None, energy: float | None) -> Fitted:
    """Keep the leading triplets: ``rank`` of them, or as many as the energy needs; σ is divided evenly."""
    squares = values.square()
    if rank is None:
        assert energy is not None
        wanted = torch.tensor(energy * whole * (1 - 1e-12), dtype=torch.float64)
        rank = int(torch.searchsorted(squares.cumsum(0), wanted)) + 1
    rank = max(1, min(rank, int((values > 0).sum())))
    root = values[:rank].sqrt()
    kept = float(squares[:rank].sum())
    share = 1.0 if whole == 0 or not math.isfinite(whole) else min(kept / whole, 1.0)
    return Fitted((u[:, :rank] * root).float(), (root[:, None] * vh[:rank]).float(), share, whole)
