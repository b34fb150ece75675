"""Statistics of task vectors, in blocks: norms, inner products, sign conflicts, overlap of the largest entries.

Two passes go through the models. The first one finds each expert's threshold, the second one adds up everything else.
No tensor of a task vector is ever whole in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mergelab.engine.finite_check import finite_checked
from mergelab.ops.blocks import BLOCK, blocks
from mergelab.ops.task_vectors import Vectors, open_task_vectors
from mergelab.ops.threads import chunks, in_order, return_memory
from mergelab.ops.thresholds import find_thresholds
from mergelab.weights.align import AlignedModels
from mergelab.weights.naming import depths, layer_of

SMALLEST = 1e-20  # a block's sum of squares below which float32 may have lost some of them
Progress = Callable[[str, float], None]
Array = NDArray[Any]


@dataclass(frozen=True)
class Sums:
    """Sums over the entries of some tensors, for T experts with task vectors τ_t.

    Attributes:
        entries: how many entries there are.
        products: (T, T) float64, Σ τ_s·τ_t.
        magnitudes: (T,) float64, Σ |τ_t|.
        conflicting: (T,) float64, Σ |τ_t| over the entries in conflict: one expert is above 0 and another below.
        changed: how many entries some expert changes.
        conflicts: how many entries are in conflict.
        shared: (T, T) int64, how many entries are among the largest of both experts; on the diagonal of the one.
        kept: how many entries are among the largest of some expert.
        kept_conflicts: how many of these are in conflict when smaller entries of other experts count as 0.
    """

    entries: int
    products: Array
    magnitudes: Array
    conflicting: Array
    changed: int
    conflicts: int
    shared: Array
    kept: int
    kept_conflicts: int

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    @classmethod
    def none(cls, experts: int) -> Sums:
        """Return the sums over no entries."""
        square, each = (experts, experts), (experts,)
        return cls(0, np.zeros(square), np.zeros(each), np.zeros(each), 0, 0, np.zeros(square, dtype=np.int64), 0, 0)

    @property
    def norms(self) -> list[float]:
        """‖τ_t‖ of each expert."""
        return [math.sqrt(square) for square in np.diagonal(self.products)]

    def cosine(self, one: int, other: int) -> float | None:
        """Return the cosine of the angle between two task vectors; None where one of them is 0."""
        square = self.products[one, one] * self.products[other, other]
        if square == 0:
            return None
        return float(np.clip(self.products[one, other] / math.sqrt(square), -1, 1))

    def overlap(self, one: int, other: int) -> float | None:
        """Return |A∩B| / |A∪B| of two experts' largest entries A and B; None where there are none."""
        both = int(self.shared[one, other])
        either = int(self.shared[one, one] + self.shared[other, other]) - both
        return both / either if either else None

    @property
    def conflict(self) -> float | None:
        """The share of the task vectors' magnitude in entries where experts disagree in sign; None of no change."""
        total = math.fsum(self.magnitudes)
        return math.fsum(self.conflicting) / total if total and len(self.magnitudes) > 1 else None

    def conflict_of(self, expert: int) -> float | None:
        """Return the share of one expert's magnitude in entries where experts disagree; None where it changes none."""
        total = float(self.magnitudes[expert])
        return float(self.conflicting[expert]) / total if total and len(self.magnitudes) > 1 else None

    @property
    def conflict_count(self) -> float | None:
        """The share of the changed entries where experts disagree in sign; None where nothing is changed."""
        return self.conflicts / self.changed if self.changed and len(self.magnitudes) > 1 else None

    @property
    def kept_conflict(self) -> float | None:
        """The share of the largest entries where the experts that have them among theirs disagree; None of none."""
        return self.kept_conflicts / self.kept if self.kept and len(self.magnitudes) > 1 else None


@dataclass(frozen=True)
class TensorSums:
    """A tensor's sums: its name, its shape, and the layer that it belongs to."""

    name: str
    shape: tuple[int, ...]
    layer: str
    sums: Sums


def task_vector_sums(
    models: AlignedModels, density: float, progress: Progress = lambda _message, _done: None
) -> list[TensorSums]:
    """Go through the models' task vectors and return each tensor's sums.

    The largest entries of an expert are those of at least its threshold, the ⌊density·n⌋-th largest magnitude of all
    its n entries, as for TIES (Yadav et al. 2023, arXiv:2306.01708) with ``scope=model``; entries that are 0 are none.

    Args:
        models: base and experts under common names, any float dtype; differences are float32, or float64 where a
            tensor is, and sums over more than a block are float64.
        density: fraction of entries, above 0 and at most 1.
        progress: called with a message and the fraction done.

    Raises:
        NonFinite: a tensor of a model holds NaN or infinity.
    """
    assert models.base is not None
    checked = replace(models, base=finite_checked(models.base), experts=tuple(map(finite_checked, models.experts)))
    base: Any = checked.base
    shapes = {name: tuple(base.shape(name)) for name in models.names}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    progress("looking for the largest entries", 0.0)
    thresholds = find_thresholds(partial(open_task_vectors, checked), sizes, density, "model", checked)
    return_memory()

    count, total, done = len(models.experts), max(1, sum(sizes.values())), 0
    found = {name: Sums.none(count) for name in sizes}

    def through(target: tuple[str, slice]) -> tuple[str, Sums]:
        name, chunk = target
        return name, _sums_of_chunk(open_task_vectors(checked, name), chunk, thresholds[name])

    for name, sums in in_order(through, chunks(sizes)):
        found[name] += sums
        done += sums.entries
        progress("comparing task vectors", done / total)
    layers = layer_labels(models.names)
    return [TensorSums(name, shapes[name], layers[name], found[name]) for name in sizes]


def layer_labels(names: Sequence[str]) -> dict[str, str]:
    """Name each tensor's layer: ``layer 3``, ``decoder layer 3`` beside an encoder, ``embeddings``, or ``other``."""
    layers, depth = {name: layer_of(name) for name in names}, depths(names)
    several = len({found[0] for found in layers.values() if found}) > 1
    labels = {}
    for name, found in layers.items():
        if found is None:
            labels[name] = "other" if depth[name] else "embeddings"
        else:
            stack, number = found
            labels[name] = f"{stack} layer {number}".strip() if several else f"layer {number}"
    return labels


def by_layer(tensors: Sequence[TensorSums]) -> dict[str, Sums]:
    """Add up the sums of each layer; embeddings first, then the layers by number, then other tensors."""
    found: dict[str, Sums] = {}
    for tensor in tensors:
        found[tensor.layer] = found[tensor.layer] + tensor.sums if tensor.layer in found else tensor.sums
    return {label: found[label] for label in sorted(found, key=_place)}


def _place(label: str) -> tuple[int, str, int]:
    if " " not in label and not label.startswith("layer"):
        return (0 if label == "embeddings" else 2), "", 0
    stack, _, number = label.rpartition(" ")
    return 1, stack, int(number)


def whole(tensors: Sequence[TensorSums], experts: int) -> Sums:
    """Add up all tensors' sums."""
    return sum((tensor.sums for tensor in tensors), Sums.none(experts))


def _sums_of_chunk(read: Vectors, chunk: slice, thresholds: Sequence[float]) -> Sums:
    total, count = Sums.none(len(thresholds)), len(thresholds)
    masks = np.empty((3, count, min(BLOCK, max(chunk.stop - chunk.start, 0))), dtype=np.bool_)  # used for every block
    for part in blocks(chunk.stop, BLOCK, chunk.start):
        total += _sums_of_block(read(part), thresholds, masks[:, :, : part.stop - part.start])
    return total


def _sums_of_block(vectors: list[torch.Tensor], thresholds: Sequence[float], masks: Array) -> Sums:
    """Return a block's sums.

    Args:
        vectors: T flat tensors, which are written into.
        thresholds: T.
        masks: (3, T, n) bool, to work in.
    """
    products, arrays = _products(vectors), [vector.numpy() for vector in vectors]
    above, below, kept = masks
    for index, array in enumerate(arrays):
        np.greater(array, 0, out=above[index])
        np.less(array, 0, out=below[index])
    some_above, some_below = above.any(axis=0), below.any(axis=0)
    changed, conflict = int(np.count_nonzero(some_above | some_below)), some_above & some_below
    conflicts = int(np.count_nonzero(conflict))
    magnitudes, conflicting = np.zeros(len(vectors)), np.zeros(len(vectors))
    inside = torch.from_numpy(conflict).to(vectors[0].dtype)
    for index, vector in enumerate(vectors):
        vector.abs_()
        magnitudes[index] = vector.sum()
        if conflicts:
            conflicting[index] = torch.dot(vector, inside.to(vector.dtype))
        _mark_largest(arrays[index], thresholds[index], kept[index])
    shared = _shared(kept, some_above)
    above &= kept
    below &= kept
    some_above, some_below = above.any(axis=0), below.any(axis=0)
    return Sums(
        entries=len(vectors[0]),
        products=products,
        magnitudes=magnitudes,
        conflicting=conflicting,
        changed=changed,
        conflicts=conflicts,
        shared=shared,
        kept=int(np.count_nonzero(some_above | some_below)),
        kept_conflicts=int(np.count_nonzero(some_above & some_below)),
    )


def _products(vectors: Sequence[torch.Tensor]) -> Array:
    """Return the inner products of a block's vectors; in float64 where squares leave float32's range."""
    products = _inner(vectors)
    odd = [not SMALLEST <= square < math.inf and bool(vectors[at].any()) for at, square in enumerate(np.diag(products))]
    return _inner([vector.double() for vector in vectors]) if any(odd) else products


def _inner(vectors: Sequence[torch.Tensor]) -> Array:
    found = np.zeros((len(vectors), len(vectors)))
    for one, left in enumerate(vectors):
        for other, right in enumerate(vectors[: one + 1]):
            dtype = torch.promote_types(left.dtype, right.dtype)
            found[one, other] = found[other, one] = torch.dot(left.to(dtype), right.to(dtype))
    return found


def _mark_largest(magnitudes: Array, threshold: float, out: Array) -> None:
    """Mark the entries of at least the threshold; those that are 0 never."""
    if threshold > 0:
        np.greater_equal(magnitudes, threshold, out=out)
    else:
        np.greater(magnitudes, 0, out=out)


def _shared(masks: Array, scratch: Array) -> Array:
    """Count the entries that are marked in each two of the masks (T, n); ``scratch`` (n,) is written into."""
    found = np.zeros((len(masks), len(masks)), dtype=np.int64)
    for one, left in enumerate(masks):
        found[one, one] = np.count_nonzero(left)
        for other in range(one):
            np.logical_and(left, masks[other], out=scratch)
            found[one, other] = found[other, one] = np.count_nonzero(scratch)
    return found
