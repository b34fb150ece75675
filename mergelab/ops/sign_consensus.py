"""Preparing passes of methods that trim task vectors or elect signs: statistics over whole models, read in blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from mergelab.errors import ConfigError, listed
from mergelab.ops.blocks import blocks, working
from mergelab.ops.kth_largest import Array, Open, kth_largest
from mergelab.ops.rank_index import Ranked, kth_of, rank_each, together
from mergelab.ops.task_vectors import MajoritySign, difference_into, elect, trim_
from mergelab.ops.threads import chunks, in_order
from mergelab.ops.workspace import mapped
from mergelab.weights.align import AlignedModels

Scope = Literal["model", "tensor", "pooled"]
TieBreak = Literal["majority", "positive", "zero"]
WeightsStage = Literal["reduce", "elect"]
# Answers the T task vectors' entries in a slice of a tensor: differences, or what a method makes of them first. They
# may be written into, and are overwritten by the next that are asked for.
Vectors = Callable[[slice], list[Tensor]]
HELD = 2_500_000_000  # entries of task vectors that are searched at once; a 40th of them, in bytes, is held meanwhile


class OpenVectors(Protocol):
    """Gives access to a tensor of the experts' task vectors, or of some of them."""

    def __call__(self, name: str, /, *, only: slice = slice(None)) -> Vectors:
        """Open tensor ``name`` of the experts in ``only``."""
        ...


@dataclass(frozen=True)
class Consensus:
    """What merging one tensor needs to know of the whole.

    Attributes:
        thresholds: per expert, the magnitude below which an entry is dropped.
        tie_sign: −1, 0 or 1: the sign of entries whose votes cancel.
    """

    thresholds: tuple[float, ...]
    tie_sign: float = 0.0


def open_task_vectors(models: AlignedModels, name: str, *, only: slice = slice(None)) -> Vectors:
    """Return access to the experts' task vectors in tensor ``name``, or to those of some of them, on the CPU."""
    assert models.base is not None
    base = models.base.get(name).reshape(-1)
    experts = [expert.get(name).reshape(-1) for expert in models.experts[only]]
    wide = [working(tensor[:0]).dtype for tensor in (base, *experts)]
    rows = [torch.empty(0, dtype=torch.promote_types(wide[0], dtype)) for dtype in wide]

    def read(part: slice) -> list[Tensor]:
        start = base[part].cpu()
        length = len(start)
        if len(rows[0]) < length:
            rows[:] = [mapped(length, row.dtype) for row in rows]
        room, *vectors = (row[:length] for row in rows)
        start = start if start.dtype == room.dtype else room.copy_(start)
        pairs = zip(vectors, experts, strict=True)
        return [difference_into(row, expert[part].cpu(), start) for row, expert in pairs]

    return read


def prepare_consensus(
    models: AlignedModels,
    open_vectors: OpenVectors,
    *,
    weights: Sequence[float],
    density: float | Sequence[float] | None,
    scope: Scope,
    majority_sign: MajoritySign,
    tie_break: TieBreak,
    weights_stage: WeightsStage,
    memo: dict[str, Any] | None = None,
) -> Mapping[str, Consensus]:
    """Find each tensor's trimming thresholds and the sign of its ties.

    Args:
        models: base and experts.
        open_vectors: access to the task vectors of a tensor, as they are trimmed and vote.
        weights: one factor per expert.
        density: fraction of entries to keep, of all experts or of each; None: no trimming.
        scope: what the fraction is of, and over what the majority is counted.
        majority_sign, tie_break, weights_stage: as for the method.
        memo: keeps the vectors' grouped magnitudes for the next time, where the vectors will be the same.

    Returns:
        One `Consensus` for every name in ``models.names``.
    """
    assert models.base is not None
    sizes = {name: _entries(models.base.shape(name)) for name in models.names}
    thresholds = find_thresholds(open_vectors, sizes, density, scope, models, memo)
    signs = dict.fromkeys(sizes, 1.0 if tie_break == "positive" else 0.0)
    if tie_break == "majority":
        votes = election_factors(weights, weights_stage)

        def count(place: tuple[str, slice]) -> tuple[str, int]:
            name, chunk = place
            return name, _surplus(open_vectors(name), chunk, thresholds[name], votes, majority_sign)

        surplus = dict.fromkeys(sizes, 0)
        for name, more in in_order(count, chunks(sizes)):
            surplus[name] += more
        whole = sum(surplus.values())
        signs = {name: sign_of(more if scope == "tensor" else whole) for name, more in surplus.items()}
    return {name: Consensus(thresholds[name], signs[name]) for name in sizes}


def find_thresholds(
    open_vectors: OpenVectors,
    sizes: Mapping[str, int],
    density: float | Sequence[float] | None,
    scope: Scope,
    models: AlignedModels,
    memo: dict[str, Any] | None = None,
) -> dict[str, tuple[float, ...]]:
    """Return for each tensor the experts' thresholds: the k-th largest magnitudes, k = max(1, int(density · n)).

    n counts the entries of an expert's task vector over all tensors, those of one tensor, or those of all experts.
    With ``memo`` the vectors must be the plain task vectors; when a second density is asked for, their magnitudes are
    grouped once and for all, and any density is looked up.
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
) -> dict[str, tuple[float, ...]]:
    """Return the thresholds where every expert has a density of its own."""

    def of_one(at: int) -> dict[str, tuple[float, ...]]:
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
) -> dict[str, tuple[float, ...]]:
    """Return thresholds from the task vectors' grouped magnitudes; these are made when they are first needed."""
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


def election_factors(weights: Sequence[float], weights_stage: WeightsStage) -> tuple[float, ...]:
    """Return the factors that task vectors are multiplied by before they vote."""
    return tuple(weights) if weights_stage == "elect" else (1.0,) * len(weights)


def check_weights(weights: Sequence[float]) -> None:
    """Raise `ConfigError` for weights that a weighted mean cannot take: negative ones, or none above 0."""
    if negative := [f"{weight:g}" for weight in weights if weight < 0]:
        raise ConfigError(
            f"method.weights: must be at least 0 for a mean over agreeing experts, not {listed(negative)} "
            "(task_arithmetic negates)"
        )
    if not any(weights):
        raise ConfigError("method.weights: at least one must be above 0")


def check_pooled(key: str, density: float | Sequence[float] | None, scope: Scope) -> None:
    """Raise `ConfigError` for a density of each expert where the fraction is of all experts' entries together."""
    if isinstance(density, Sequence) and scope == "pooled":
        raise ConfigError(f"method.{key}: must be one number for all experts where scope=pooled ranks them together")


def _entries(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()


def _magnitudes(open_vectors: OpenVectors, dtype: torch.dtype) -> Open:
    def open_(name: str) -> Callable[[slice], list[Array]]:
        read = open_vectors(name)
        return lambda part: [vector.abs_().to(dtype).numpy() for vector in read(part)]

    return open_


def _surplus(
    read: Vectors, chunk: slice, thresholds: Sequence[float], weights: Sequence[float], majority_sign: MajoritySign
) -> int:
    """Return how many more entries of a part of a tensor are elected positive than negative."""
    surplus = 0
    for part in blocks(chunk.stop, start=chunk.start):
        trimmed = [trim_(vector, threshold) for vector, threshold in zip(read(part), thresholds, strict=True)]
        surplus += int(elect(trimmed, weights, majority_sign).sum())  # exact: a block has fewer than 2^24 entries
    return surplus


def sign_of(count: int) -> float:
    """Return −1, 0 or 1."""
    return float((count > 0) - (count < 0))
