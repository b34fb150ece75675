"""Task heads: read with their output rows in a given order of labels, and averaged."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from mergelab.errors import KeyMismatch, ModelError, ShapeMismatch, listed
from mergelab.weights.agreement import dtype_and_shape
from mergelab.weights.align import check_finite

if TYPE_CHECKING:
    from torch import Tensor

    from mergelab.weights.source import TensorSource


@dataclass(frozen=True)
class Head:
    """A head's tensors with its output rows in the task's label order, and whose it is."""

    tensors: dict[str, Tensor]
    owner: str

    @cached_property
    def digest(self) -> str:
        """A hash of the tensors, in the order in which their outputs are."""
        found = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    @property
    def outputs(self) -> int:
        """The number of outputs."""
        return next(iter(self.tensors.values())).shape[0] if self.tensors else 0


def read_head(source: TensorSource, names: Sequence[str], order: Sequence[int] | None) -> Head:
    """Read a head and put its output rows into an order: row ``order[j]`` becomes row ``j``; None: as they stand.

    Raises:
        KeyMismatch: the source lacks one of the tensors. NonFinite: one holds NaN or infinity.
        ModelError: it cannot be told which layer makes the outputs.
    """
    tensors = {name: source.get(name) for name in names}
    for name, tensor in tensors.items():
        check_finite(source, name, tensor)
    if order is not None and list(order) != list(range(len(order))):
        index = torch.tensor(list(order))
        tensors |= {name: tensors[name].index_select(0, index) for name in output_names(source, names, len(order))}
    return Head(tensors, source.name)


def output_names(source: TensorSource, names: Iterable[str], outputs: int) -> frozenset[str]:
    """Find the tensors of a head that have a row for each output.

    Raises:
        ModelError: two layers have as many rows, as where a model is as wide as it has labels.
    """
    found = frozenset(name for name in names if source.shape(name)[:1] == (outputs,))
    if len(layers := sorted({name.rpartition(".")[0] for name in found})) > 1:
        raise ModelError(
            f"{source.name}: its labels are in another order, and both {listed(layers)} have {outputs} rows, so that "
            "it is not known which makes the outputs; give all models the same id2label order"
        )
    return found


@dataclass(frozen=True)
class ReorderedSource:
    """A source whose tensors ``names`` have their rows in another order: row ``order[j]`` is read as row ``j``."""

    source: TensorSource
    names: frozenset[str]
    order: tuple[int, ...]

    @property
    def name(self) -> str:
        """What errors call the model."""
        return self.source.name

    def keys(self) -> list[str]:
        """List the tensors."""
        return self.source.keys()

    def aliases(self) -> dict[str, str]:
        """Return the further names of tied tensors."""
        return self.source.aliases()

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of ``key``."""
        return self.source.shape(key)

    def dtype(self, key: str) -> torch.dtype:
        """Return the dtype of ``key``."""
        return self.source.dtype(key)

    def prefetch(self, key: str) -> None:
        """Let the data of ``key`` be fetched in the background."""
        self.source.prefetch(key)

    def get(self, key: str) -> Tensor:
        """Read ``key``."""
        tensor = self.source.get(key)
        return tensor.index_select(0, torch.tensor(self.order)) if key in self.names else tensor


def mean_head(heads: Sequence[Head], dtype: torch.dtype | None = None) -> Head:
    """Average heads tensor by tensor as `mean_tensor` does, rounded once to ``dtype`` (default: the first one's).

    Raises:
        KeyMismatch: they do not have the same tensors.
        ShapeMismatch: a tensor's shape differs, as between tasks with different numbers of labels.
    """
    first = heads[0]
    for other in heads[1:]:
        if other.tensors.keys() != first.tensors.keys():
            odd = sorted(other.tensors.keys() ^ first.tensors.keys())
            raise KeyMismatch(f"the heads of {first.owner} and {other.owner} differ in {listed(odd)}")
        for name, tensor in other.tensors.items():
            if tensor.shape != first.tensors[name].shape:
                raise ShapeMismatch(
                    f"the heads cannot be averaged: {name} is {tuple(first.tensors[name].shape)} in {first.owner} and "
                    f"{tuple(tensor.shape)} in {other.owner}; use models.head=per_task or models.head=expert:<name>"
                )
    return Head(
        {name: mean_tensor([head.tensors[name] for head in heads], dtype) for name in first.tensors},
        "mean of " + ", ".join(head.owner for head in heads),
    )


def mean_of(sources: Sequence[TensorSource], name: str, dtype: torch.dtype | None = None) -> Tensor:
    """Average a tensor over models as `mean_tensor` does; integers, which must be equal, are copied.

    Raises:
        KeyMismatch: a model lacks it. NonFinite: it holds NaN or infinity in one of them.
        ShapeMismatch: its shape differs, or it is floating point in one model and integer in another.
        ModelError: its integers differ.
    """
    tensors = [source.get(name) for source in sources]
    first = tensors[0]
    for source, tensor in zip(sources, tensors, strict=True):
        check_finite(source, name, tensor)
        if tensor.shape != first.shape or tensor.is_floating_point() != first.is_floating_point():
            own, other = (dtype_and_shape(one.shape, one.dtype) for one in (first, tensor))
            raise ShapeMismatch(
                f"{name} cannot be averaged: it is {own} in {sources[0].name} and {other} in {source.name}"
            )
        if not first.is_floating_point() and not torch.equal(tensor, first):
            raise ModelError(
                f"{name} holds integers, which are copied, and those of {sources[0].name} and {source.name} differ"
            )
    return mean_tensor(tensors, dtype) if first.is_floating_point() else first.clone()


def mean_tensor(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """Average tensors of one shape, rounded once to ``dtype`` (default: the first one's).

    Sums are float64 where a tensor is, else float32.
    """
    wide = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    total = tensors[0].to(wide, copy=True)
    for tensor in tensors[1:]:
        total += tensor.to(wide)
    return (total / len(tensors)).to(dtype or tensors[0].dtype)
