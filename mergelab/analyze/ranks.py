"""Effective ranks of task vectors' matrices, from singular values in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergelab.ops.svd import TallMatrix, decompose, is_wide
from mergelab.ops.task_vectors import task_vectors
from mergelab.ops.threads import in_order
from mergelab.weights.align import AlignedModels
from mergelab.weights.source import TensorSource


@dataclass(frozen=True)
class MatrixRanks:
    """The ranks of one matrix of an expert's task vector; None where the expert leaves it as it is.

    Attributes:
        name: the tensor's.
        expert: the expert's index.
        size: the smaller of its rows and columns, which no rank exceeds.
        effective: as `effective_rank`.
        stable: as `stable_rank`.
    """

    name: str
    expert: int
    size: int
    effective: float | None
    stable: float | None


def effective_rank(singular: Tensor) -> float | None:
    """Return exp(−Σ p_i ln p_i) with p_i = σ_i / Σ σ_j (Roy & Vetterli 2007, "The effective rank", EUSIPCO).

    Args:
        singular: (r,) singular values, none negative, in any order.

    Returns:
        A number from 1 to r; None where all values are 0.
    """
    total = singular.sum()
    if total <= 0:
        return None
    shares = singular[singular > 0] / total
    return math.exp(float(-(shares * shares.log()).sum()))


def stable_rank(singular: Tensor) -> float | None:
    """Return ‖A‖_F² / ‖A‖_2² = Σ σ_i² / max σ_i² (Rudelson & Vershynin 2007, arXiv:math/0503442).

    Args:
        singular: (r,) singular values, none negative, in any order.

    Returns:
        A number from 1 to r; None where all values are 0.
    """
    largest = singular.max() if len(singular) else torch.tensor(0.0)
    return float((singular / largest).square().sum()) if largest > 0 else None


def matrix_ranks(models: AlignedModels, progress: Callable[[str, float], None]) -> list[MatrixRanks]:
    """Return the ranks of every matrix of every expert's task vector; other tensors have none.

    Memory is of the order of the square of a matrix's smaller side. The time is that of the decompositions, minutes for
    large models.
    """
    assert models.base is not None
    names = [name for name in models.names if len(models.base.shape(name)) == 2 and 0 not in models.base.shape(name)]
    targets = [(name, index) for name in names for index in range(len(models.experts))]
    found = []

    def ranks(target: tuple[str, int]) -> MatrixRanks:
        name, index = target
        assert models.base is not None
        matrix = _difference(models.base, models.experts[index], name)
        singular = _singular_values(matrix)
        return MatrixRanks(name, index, matrix.columns, effective_rank(singular), stable_rank(singular))

    for done, each in enumerate(in_order(ranks, targets), 1):
        found.append(each)
        progress("decomposing task vectors", done / len(targets))
    return found


def _difference(base: TensorSource, expert: TensorSource, name: str) -> TallMatrix:
    """View an expert's task vector in a matrix, or its transpose, as a tall matrix."""
    start, changed = base.get(name), expert.get(name)
    if is_wide(start.shape):
        start, changed = start.T, changed.T

    def read(part: slice) -> Tensor:
        return task_vectors(start[part], [changed[part]])[0].double()

    return TallMatrix(read, *start.shape)


def _singular_values(matrix: TallMatrix) -> Tensor:
    if not any(bool(matrix.read(part).any()) for part in matrix.parts()):
        return torch.zeros(0, dtype=torch.float64)
    return decompose(matrix).values


def mean_rank(ranks: Sequence[float | None]) -> float | None:
    """Return the mean of the ranks that there are; None where there are none."""
    known = [rank for rank in ranks if rank is not None]
    return math.fsum(known) / len(known) if known else None
