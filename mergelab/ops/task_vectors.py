"""Task vectors and what is made of them: TIES' trim, elect and disjoint reduce; sums and means.

Each is a pure function of blocks in float32 or float64; those whose name ends in ``_`` or ``_into`` write into an
argument. Signs, comparisons and products with ±1 are exact, and sums go expert by expert, so that a value does not
depend on the block it is computed in. `mergelab.ops.ties_kernels` has faster forms of TIES.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from mergelab.ops.blocks import working
from mergelab.ops.workspace import mapped
from mergelab.weights.align import AlignedModels

MajoritySign = Literal["total", "frequency"]
Reduce = Literal["mean", "sum", "max"]
# Returns the T task vectors' entries in a slice of a flattened tensor: differences, or what a method makes of them
# first. They may be written into, and are overwritten by the next call.
Vectors = Callable[[slice], list[Tensor]]


def task_vectors(base: Tensor, experts: Sequence[Tensor]) -> list[Tensor]:
    """Return τ_t = θ_t − θ0 for each expert, in float32 (float64 where a tensor is float64)."""
    start = working(base)
    return [working(expert) - start for expert in experts]


def difference_into(out: Tensor, expert: Tensor, start: Tensor) -> Tensor:
    """Write a task vector, as `task_vectors` returns it, into ``out``.

    Args:
        out: float32, or float64 where a tensor is.
        expert: of any dtype.
        start: the base, float32 or float64.
    """
    if expert.dtype in (torch.float32, torch.float64):
        return torch.sub(expert, start, out=out)
    if out.dtype == start.dtype:
        return torch.sub(out.copy_(expert), start, out=out)  # widening does not round
    return torch.sub(expert.float(), start, out=out)


def open_task_vectors(models: AlignedModels, name: str, *, only: slice = slice(None)) -> Vectors:
    """Return access to the experts' task vectors in tensor ``name``, or to those of some of them, on the CPU."""
    assert models.base is not None
    base = models.base.get(name).reshape(-1)
    experts = [expert.get(name).reshape(-1) for expert in models.experts[only]]
    wide = [working(tensor[:0]).dtype for tensor in (base, *experts)]
    buffers = [torch.empty(0, dtype=torch.promote_types(wide[0], dtype)) for dtype in wide]

    def read(part: slice) -> list[Tensor]:
        start = base[part].cpu()
        length = len(start)
        if len(buffers[0]) < length:
            buffers[:] = [mapped(length, buffer.dtype) for buffer in buffers]
        widened, *vectors = (buffer[:length] for buffer in buffers)
        start = start if start.dtype == widened.dtype else widened.copy_(start)
        pairs = zip(vectors, experts, strict=True)
        return [difference_into(vector, expert[part].cpu(), start) for vector, expert in pairs]

    return read


def factors(
    weights: Sequence[float] | Mapping[str, float] | None, count: int, normalize: bool = False
) -> tuple[float, ...]:
    """Return one factor per expert: the resolved ``weights``, or ones; with ``normalize``, divided by their sum.

    Raises:
        ValueError: the weights are by name (only the engine knows names), or not ``count`` many.
    """
    given = (1.0,) * count if weights is None else weights
    if not isinstance(given, Sequence) or len(given) != count:
        raise ValueError(f"{count} weights are needed, in the experts' order")
    total = math.fsum(given) if normalize else 1.0
    return tuple(given) if total == 1 else tuple(weight / total for weight in given)


def of_each(number: float | Sequence[float], count: int) -> tuple[float, ...]:
    """Return one number per expert: those given, or the same for all.

    Raises:
        ValueError: there are not ``count`` of them.
    """
    numbers = tuple(number) if isinstance(number, Sequence) else (number,) * count
    if len(numbers) != count:
        raise ValueError(f"{count} numbers are needed, in the experts' order")
    return numbers


def scaled(tensor: Tensor, factor: float | Tensor) -> Tensor:
    """Multiply by ``factor``; return the tensor itself when that is the number 1."""
    return tensor if isinstance(factor, int | float) and factor == 1 else tensor * factor


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return Σ w_t x_t, product and sum each rounded (a fused multiply-add would differ between machines)."""
    total = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total += scaled(tensor, weight)
    return total


def mean(vectors: Sequence[Tensor]) -> Tensor:
    """Return the mean task vector, which is what tensors other than matrices get."""
    return weighted_sum(vectors, (1.0,) * len(vectors)).div_(len(vectors))


# ------------------------------------------------------------------------------------- trim, elect and disjoint reduce


def trim(task_vector: Tensor, bound: float | Tensor) -> Tensor:
    """Set entries whose magnitude is not above ``bound`` to zero; `just_below` makes a bound of a threshold."""
    return torch.where(task_vector.abs() > bound, task_vector, 0.0)


def trim_(task_vector: Tensor, threshold: float) -> Tensor:
    """Set entries of magnitude below ``threshold`` to zero, in place; those equal to it stay.

    One operation, where `trim` takes three and a new tensor.
    """
    if threshold <= 0:
        return task_vector
    return torch.hardshrink(task_vector, just_below(threshold, task_vector.dtype), out=task_vector)


@functools.lru_cache(maxsize=4096)
def just_below(threshold: float, dtype: torch.dtype) -> float:
    """Return the largest number of ``dtype`` under ``threshold``."""
    bound = torch.tensor(threshold, dtype=dtype)
    if bound.item() >= threshold:
        bound = torch.nextafter(bound, torch.tensor(-math.inf, dtype=dtype))
    return bound.item()


def elect(
    task_vectors: Sequence[Tensor],
    weights: Sequence[float | Tensor] | None = None,
    majority_sign: MajoritySign = "total",
) -> Tensor:
    """Return the sign (−1, 0 or 1) that has the larger total magnitude of w τ, or that more of the w τ have.

    Args:
        task_vectors: T blocks.
        weights: T factors that the task vectors are multiplied by before they vote; default 1.
        majority_sign: "total": sgn(Σ w τ); "frequency": sgn(Σ sgn(w τ)).
    """
    votes = _weighted(task_vectors, weights)
    if majority_sign == "frequency":
        votes = (vote.sign() for vote in votes)
    return functools.reduce(torch.add, votes).sign()


def resolve_zeros(signs: Tensor, sign: float | Tensor) -> Tensor:
    """Replace every 0 of elected signs by ``sign``."""
    return (signs + sign / 2).sign()


def disjoint_reduce(
    task_vectors: Sequence[Tensor],
    signs: Tensor,
    weights: Sequence[float | Tensor] | None = None,
    reduce: Reduce = "mean",
) -> Tensor:
    """Combine, at each entry, the task vectors whose sign there is the elected one.

    Args:
        task_vectors: T blocks.
        signs: elected signs in {−1, 0, 1}; where 0, nothing agrees.
        weights: T factors, none negative; default 1.
        reduce: mean: Σ w τ / Σ w over those that agree; sum: Σ w τ; max: the w τ of largest magnitude.

    Returns:
        A block; 0 where no task vector agrees.
    """
    agreeing = [torch.relu(vector * signs) for vector in task_vectors]  # magnitudes
    merged = functools.reduce(torch.maximum if reduce == "max" else torch.add, _weighted(agreeing, weights))
    if reduce == "mean":
        ones = (torch.gt(vector, 0, out=torch.empty_like(vector)) for vector in agreeing)  # 1 where it agrees, else 0
        shares = functools.reduce(torch.add, _weighted(ones, weights))
        merged = merged / shares.clamp_min(torch.finfo(shares.dtype).tiny)
    return merged * signs


def _weighted(tensors: Iterable[Tensor], weights: Sequence[float | Tensor] | None) -> Iterable[Tensor]:
    """Return the w_t x_t, each computed when it is needed, so that few are in memory."""
    if weights is None:
        return tensors
    return (scaled(tensor, weight) for tensor, weight in zip(tensors, weights, strict=True))
