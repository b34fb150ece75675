"""The magnitudes below which TIES drops entries: the k-th largest of whole task vectors, read in blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, Protocol

import torch

from mergelab.ops.blocks import blocks
from mergelab.ops.kth_largest import Array, Open, kth_largest
from mergelab.ops.rank_index import Ranked, kth_of, rank_each, together
from mergelab.ops.task_vectors import Vectors, open_task_vectors
from mergelab.ops.threads import in_order
from mergelab.weights.align import AlignedModels

Scope = Literal["model", "tensor", "pooled"]
Thresholds = tuple[float, ...]  # one for each expert
HELD = 2_500_000_000  # entries of task vectors that are searched at once; a 40th of them, in bytes, is held meanwhile


class OpenVectors(Protocol):
    """Gives access to a tensor of the experts' task vectors, or of some of them."""

    def __call__(self, name: str, /, *, only: slice = slice(None)) -> Vectors:
        """Open tensor ``name`` of the experts in ``only``."""
        ...


def find_thresholds(
    open_vectors: OpenVectors,
    sizes: Mapping[str, int],
    density: float | Sequence[float] | None,
    scope: Scope,
    models: AlignedModels,
    memo: dict[str, Any] | None = None,
) -> dict[str, Thresholds]:
    """Return for each tensor the experts' thresholds: the k-th largest magnitudes, k = max(1, int(density · n)).

    Args:
        open_vectors: access to the task vectors of a tensor, as they are trimmed.
        sizes: the number of entries of each tensor.
        density: fraction of entries to keep, of all experts or of each; None: all.
        scope: what n counts: the entries of an expert's task vector over all tensors, those of one tensor, or those of
            all experts' task vectors together.
        models: base and experts.
        memo: keeps an index of the magnitudes, in which any density is looked up, from the second density on. The
            vectors must be the plain task vectors then.
    """
    if isinstance(density, Sequence):
        return _thresholds_of_each(open_vectors, sizes, density, scope, models)
    count = len(models.experts)
    if density is None or density >= 1:
        return dict.fromkeys(sizes, (0.0,) * count)
    # Ranks are compared across tensors, so all magnitudes are in one dtype.
    double = any(s.dtype(n) == torch.float64 for s in (models.base, *models.experts) if s is not None for n in sizes)
    dtype = torch.float64 if double else torch.float32
    if memo is not None and (memo.setdefault("density", density) != density or "ranked" in memo):
        return _looked_up(models, dtype, sizes, density, scope, memo)
    magnitudes = _magnitudes(open_vectors, dtype)
    if scope == "tensor":
        return {name: kth_largest(magnitudes, {name: size}, density, count) for name, size in sizes.items()}
    if scope == "pooled":
        return dict.fromkeys(sizes, kth_largest(magnitudes, sizes, density, count, pooled=True))
    found: list[float] = []
    for group in blocks(count, max(1, HELD // max(1, sum(sizes.values())))):
        some = _magnitudes(partial(open_vectors, only=group), dtype)
        found += kth_largest(some, sizes, density, group.stop - group.start)
    return dict.fromkeys(sizes, tuple(found))


def _thresholds_of_each(
    open_vectors: OpenVectors, sizes: Mapping[str, int], density: Sequence[float], scope: Scope, models: AlignedModels
) -> dict[str, Thresholds]:
    """Return the thresholds where every expert has its own density."""
    assert scope != "pooled"  # refused for every method that has such a scope

    def of_one(at: int) -> dict[str, Thresholds]:
        def open_one(name: str, /, *, only: slice = slice(None)) -> Vectors:
            return open_vectors(name, only=slice(at, at + 1))

        return find_thresholds(
            open_one, sizes, density[at], scope, replace(models, experts=models.experts[at : at + 1])
        )

    found = [of_one(at) for at in range(len(density))]
    return {name: tuple(each[name][0] for each in found) for name in sizes}


def _looked_up(
    models: AlignedModels,
    dtype: torch.dtype,
    sizes: Mapping[str, int],
    density: float,
    scope: Scope,
    memo: dict[str, Any],
) -> dict[str, Thresholds]:
    """Return thresholds from the index of the task vectors' magnitudes, which is made when it is first needed."""
    count = len(models.experts)
    if "ranked" not in memo:
        memo["ranked"] = rank_each(_magnitudes(partial(open_task_vectors, models), dtype), sizes, count)
    parts: dict[str, tuple[Ranked, ...]] = memo["ranked"]
    if scope == "tensor":
        found = in_order(lambda name: kth_of(parts[name], density), sizes)
        return dict(zip(sizes, found, strict=True))
    if "ranked models" not in memo:
        memo["ranked models"] = [together([parts[name][at] for name in sizes]) for at in range(count)]
    if scope == "pooled":
        return dict.fromkeys(sizes, kth_of(memo["ranked models"], density, pooled=True))
    each = in_order(lambda ranked: kth_of([ranked], density), memo["ranked models"])
    return dict.fromkeys(sizes, tuple(threshold for (threshold,) in each))


def _magnitudes(open_vectors: OpenVectors, dtype: torch.dtype) -> Open:
    def open_(name: str) -> Callable[[slice], list[Array]]:
        read = open_vectors(name)
        return lambda part: [vector.abs_().to(dtype).numpy() for vector in read(part)]

    return open_
