"""The best change of a given rank or energy, of a product of factors or of a matrix."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mergelab.adapters.changes import joined as joined
from mergelab.ops.blocks import blocks

_OVERSAMPLING, _ITERATIONS = 8, (2, 6, 18)  # of the randomised SVD
_CONVERGED = 2e-3  # of the squared error: what half an iteration gains at most once it has converged
_FLOAT32 = 1e-6  # of ‖ΔW‖²: what is rounding
_RELIABLE = 100  # an error of at least this many times the rounding is within 1 % of the least one
_ROWS = 64  # whose squares are added up at a time
_SMALL = 4  # a matrix with fewer than this many times the wanted columns is decomposed exactly
_FIRST = 16  # the rank up to which an energy is looked for first
_LARGEST = 3  # the most columns that are tried for an energy: the smaller side over this


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

    The error ‖ΔW − LR‖ of the randomised one is within 1 % of the least possible at its rank. For an energy its basis
    is doubled until it holds that share of ‖ΔW‖², which is known exactly; where this takes more than a third of the
    smaller side, a whole SVD is computed.

    Args:
        change: (rows, columns), float32.
        rank, energy: as for `of_product`.
    """
    if len(change) < change.shape[1]:  # torch finds its basis among the longer vectors, and so half an iteration on
        across = of_matrix(change.T, rank, energy)
        return replace(across, left=across.right.T, right=across.left.T)
    whole = sum(float(change[rows].double().square().sum()) for rows in blocks(len(change), _ROWS))
    for columns in _bases(min(change.shape), rank, energy):
        for iterations in _ITERATIONS:
            found, enough = _randomised(change, columns, iterations, whole, rank, energy)
            if found is not None:
                return found
            if not enough:
                break
    u, values, vh = torch.linalg.svd(change.double(), full_matrices=False)
    return _rounded(_cut(u, values, vh, whole, rank, energy))


def _bases(side: int, rank: int | None, energy: float | None) -> Iterator[int]:
    """Yield the numbers of columns that a randomised SVD is tried with; none where a whole one is as fast."""
    if rank is not None:
        if _SMALL * (rank + _OVERSAMPLING) < side:
            yield rank + _OVERSAMPLING
        return
    columns, most = _FIRST + _OVERSAMPLING, side // _LARGEST
    if energy is None or 1 - energy < _RELIABLE * _FLOAT32 or columns > most:
        return
    while columns < most:
        yield columns
        columns *= 2
    yield most


def _randomised(
    change: Tensor, columns: int, iterations: int, whole: float, rank: int | None, energy: float | None
) -> tuple[Fitted | None, bool]:
    """Fit a matrix by a randomised SVD (Halko et al. 2011, arXiv:0909.4061) and half an iteration more.

    Returns:
        None where the last half iteration still lessened the error: it is not near the least one then; or where the
        basis is too small for the energy, and then False.
    """
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        _, before, v = torch.svd_lowrank(change, q=columns, niter=iterations)
    q, r = torch.linalg.qr((change @ v).double())
    u, values, vh = torch.linalg.svd(r, full_matrices=False)
    wanted = _rank_of(values, whole, rank, energy)
    if wanted > columns - _OVERSAMPLING:
        return None, False
    kept = float(values[:wanted].square().sum())
    gained = kept - float(before[:wanted].double().square().sum())
    if gained > max(_CONVERGED * (whole - kept), _FLOAT32 * whole):
        return None, True
    fitted = _cut(u, values, vh, whole, wanted, None)
    return _rounded(replace(fitted, left=q @ fitted.left, right=fitted.right @ v.T.double())), True


def _rank_of(values: Tensor, whole: float, rank: int | None, energy: float | None) -> int:
    """Return the rank that is asked for: ``rank``, or the least that keeps the energy, one more than there are if none.

    Args:
        values: the leading singular values, float64.
        whole: ‖ΔW‖².
        rank, energy: as for `of_product`.
    """
    if rank is not None:
        return rank
    assert energy is not None
    wanted = torch.tensor(energy * whole * (1 - 1e-12), dtype=torch.float64)
    return int(torch.searchsorted(values.square().cumsum(0), wanted)) + 1


def _rounded(fitted: Fitted) -> Fitted:
    return replace(fitted, left=fitted.left.float(), right=fitted.right.float())


def _cut(u: Tensor, values: Tensor, vh: Tensor, whole: float, rank: int | None, energy: float | None) -> Fitted:
    """Keep the leading triplets: ``rank`` of them, or as many as the energy needs; σ is divided evenly."""
    squares = values.square()
    rank = max(1, min(_rank_of(values, whole, rank, energy), int((values > 0).sum())))
    root = values[:rank].sqrt()
    kept = float(squares[:rank].sum())
    share = 1.0 if whole == 0 or not math.isfinite(whole) else min(kept / whole, 1.0)
    return Fitted(u[:, :rank] * root, root[:, None] * vh[:rank], share, whole)
