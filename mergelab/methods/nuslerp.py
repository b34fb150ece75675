"""NuSLERP: interpolate two experts, or two task vectors, along the arc between them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergelab.engine.method import merge_method
from mergelab.engine.parameters import NormalizedWeights
from mergelab.methods import MERGEKIT
from mergelab.methods.slerp import arc, cosine_of, interpolated
from mergelab.ops.blocks import BLOCK, blocks, blockwise, working
from mergelab.ops.spherical import check_spherical, origin
from mergelab.ops.task_vectors import factors


@merge_method(
    experts=(2, 2),
    check=check_spherical,
    family="averages",
    paper=MERGEKIT,
    use="slerp between two models by weights, also of task vectors or row by row",
)
def nuslerp(
    experts: Sequence[Tensor],
    *,
    base: Tensor | None = None,
    weights: NormalizedWeights = None,
    flatten: bool = True,
    row_wise: bool = False,
    task_vectors: bool | None = None,
) -> Tensor:
    """Interpolate between two experts, or two task vectors, along the arc between them, by their weights.

    sin((1−t)Ω)/sinΩ·a + sin(tΩ)/sinΩ·b with t = w_b / (w_a + w_b), Ω the angle between a and b; where they are
    collinear (sin²Ω ≤ 1e-12) or one is zero, (1−t)·a + t·b. On task vectors, a = θ_a − θ0 and b = θ_b − θ0, and the
    result is added to θ0. As mergekit's documentation describes it (Goddard et al. 2024, arXiv:2403.13257). Dot
    products and norms are accumulated in float64.

    Departures from mergekit: weights that add up to 0 are an error (mergekit: t = 0.5). ``row_wise`` follows mergekit's
    documentation; its code exchanges rows and columns. mergekit computes in float32, where angles below about 3e-4
    count as 0.

    Args:
        experts: two tensors of one shape, any float dtype; whole tensors, not parts.
        base: parameter of the pretrained model, of the experts' shape.
        weights: per expert, any sign; default 1. A negative weight extrapolates along the arc.
        flatten: whether each tensor is one vector.
        row_wise: without ``flatten``, whether each row W[i, :] is a vector, not each column W[:, j].
        task_vectors: whether to interpolate task vectors, not weights; None: when there is a base.

    Returns:
        Tensor of that shape, float32 (float64 for float64 inputs).

    Raises:
        ConfigError: the weights cancel, or there is no base for the task vectors.
    """
    of_a, of_b = factors(weights, len(experts))
    t = of_b / (of_a + of_b)
    start = origin(base, task_vectors)
    ends = experts if start is None else [blockwise(torch.sub, expert, start) for expert in experts]
    a, b = ends
    merged = interpolated(a, b, cosine_of(a, b), t) if flatten else _interpolated(a, b, t=t, row_wise=row_wise)
    return merged if start is None else merged + working(start)


def _interpolated(a: Tensor, b: Tensor, *, t: float, row_wise: bool) -> Tensor:
    """Interpolate the rows, or columns, of two tensors, each along its own arc."""
    dtype = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    result = torch.empty(a.shape, dtype=dtype, device=a.device)
    into, of_a, of_b = (_rows(tensor, row_wise) for tensor in (result, a, b))
    for part in blocks(len(into), max(1, BLOCK // into.shape[1])):
        x, y = working(of_a[part]), working(of_b[part])
        by_x, by_y = arc(_cosines(x.double(), y.double()), t)
        into[part] = by_x.to(x.dtype) * x + by_y.to(y.dtype) * y
    return result


def _rows(tensor: Tensor, row_wise: bool) -> Tensor:
    """View a tensor as a matrix whose rows are its rows (along the last axis) or its columns (along the first axis)."""
    if tensor.dim() < 2:
        return tensor.reshape(1, -1)
    return tensor.reshape(-1, tensor.shape[-1]) if row_wise else tensor.reshape(len(tensor), -1).T


def _cosines(x: Tensor, y: Tensor) -> Tensor:
    """Return the cosines between the rows of two float64 matrices, as a column; 1 where a row is zero."""
    lengths = x.norm(dim=1, keepdim=True) * y.norm(dim=1, keepdim=True)
    return torch.where(lengths > 0, (x * y).sum(dim=1, keepdim=True) / lengths, 1.0).clamp_(-1, 1)
