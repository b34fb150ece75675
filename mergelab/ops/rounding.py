"""Bound what rounding to the stored dtype does to the singular values of task vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mergelab.ops.blocks import blocks

ROWS = 2048  # rows in memory at once


def rounding_norm(experts: Sequence[Tensor]) -> float:
    """Return about the largest singular value of the rounding errors in a sum of task vectors.

    An expert that is θ0 plus a change of low rank, rounded to its dtype, differs from θ0 by that change and by rounding
    errors. These are independent and uniform within half a unit in the last place, at most ε·|θ|, and have all
    directions. The largest singular value of a matrix of independent errors of variances v is about
    max_i √Σ_j v_ij + max_j √Σ_i v_ij (Bandeira & van Handel 2016, arXiv:1408.6185); here v = (ε·θ)²/12, summed over
    experts. Singular values up to it cannot be told from rounding.

    Args:
        experts: T matrices of one shape in the dtypes that they are stored in.
    """
    rows, columns = experts[0].shape
    by_row = torch.zeros(rows, dtype=torch.float64)
    by_column = torch.zeros(columns, dtype=torch.float64)
    for expert in experts:
        unit = torch.finfo(expert.dtype).eps
        for part in blocks(rows, ROWS):
            squares = expert[part].double().square().cpu()
            by_row[part] += squares.sum(1) * unit**2
            by_column += squares.sum(0) * unit**2
    return (math.sqrt(float(by_row.max())) + math.sqrt(float(by_column.max()))) / math.sqrt(12)
