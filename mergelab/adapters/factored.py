"""The best change of a given rank or energy, of a product of factors or of a matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mergelab.adapters.changes import joined as joined
from mergelab.ops.blocks import blocks

_OVERSAMPLING, _ITERATIONS = 8, (2, 6, 18)  # of the randomised SVD
_CONVERGED = 2e-3  # of the squared error: what half an iteration gains at most once it has converged
_FLOAT32 = 1e-6  # of ‖ΔW‖²: what is rounding
_ROWS = 64  # whose squares are added up at a time
_SMALL = 4  # a matrix with fewer than this many times the wanted columns is decomposed exactly


@dataclass(frozen=True, eq=False)
class Fitted:
    """A change as factors.

    Attributes:
        left: (rows, r), float32.
        right: (r, columns), float32.
        energy: the share of ‖ΔW‖² that they keep, at most 1.
        whole: ‖ΔW‖².
    """

    left: Tensor
    right: Tensor
    energy: float
    whole: float


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
    fitted = _cut(u, values, vh, float(values.square().sum()), rank, energy)
    return _rounded(replace(fitted, left=ql @ fitted.left, right=fitted.right @ qr.T))


def of_matrix(change: Tensor, rank: int | None, energy: float | None) -> Fitted:
    """Fit a matrix: by a randomised SVD where the rank is far below its size, else by a whole one.

    The error ‖ΔW − LR‖ of the randomised one is within 1 % of the least possible.

    Args:
        change: (rows, columns), float32.
        rank, energy: as for `of_product`.
    """
    whole = sum(float(change[rows].double().square().sum()) for rows in blocks(len(change), _ROWS))
    if rank is not None and _SMALL * (rank + _OVERSAMPLING) < min(change.shape):
        for iterations in _ITERATIONS:
            if (found := _randomised(change, rank, iterations, whole)) is not None:
                return found
    u, values, vh = torch.linalg.svd(change.double(), full_matrices=False)
    return _rounded(_cut(u, values, vh, whole, rank, energy))


def _randomised(change: Tensor, rank: int, iterations: int, whole: float) -> Fitted | None:
    """Fit a matrix by a randomised SVD (Halko et al. 2011, arXiv:0909.4061) and half an iteration more.

    Returns:
        None where the last half iteration still lessened the error: it is not near the least one then.
    """
    if len(change) < change.shape[1]:  # torch finds its basis among the longer vectors, and so half an iteration on
        found = _randomised(change.T, rank, iterations, whole)
        return None if found is None else replace(found, left=found.right.T, right=found.left.T)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        _, before, v = torch.svd_lowrank(change, q=rank + _OVERSAMPLING, niter=iterations)
    q, r = torch.linalg.qr((change @ v).double())
    u, values, vh = torch.linalg.svd(r, full_matrices=False)
    kept = float(values[:rank].square().sum())
    gained = kept - float(before[:rank].double().square().sum())
    if gained > max(_CONVERGED * (whole - kept), _FLOAT32 * whole):
        return None
    fitted = _cut(u, values, vh, whole, rank, None)
    return _rounded(replace(fitted, left=q @ fitted.left, right=fitted.right @ v.T.double()))


def _rounded(fitted: Fitted) -> Fitted:
    return replace(fitted, left=fitted.left.float(), right=fitted.right.float())


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
    return Fitted(u[:, :rank] * root, root[:, None] * vh[:rank], share, whole)
