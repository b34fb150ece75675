"""Tensors with a row for each token, read in the rows of a merged vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mergelab.errors import KeyMismatch
from mergelab.weights.source import traced

if TYPE_CHECKING:
    from mergelab.weights.source import TensorSource


@dataclass(frozen=True, eq=False)
class Reader:
    """A model under common names; the names it has; its row for each of the merged model's, or -1."""

    source: TensorSource
    names: set[str]
    rows: Tensor


@dataclass(frozen=True, eq=False)
class RowPlan:
    """Where rows come from that a model lacks, in a merged vocabulary.

    Attributes:
        tokens: how many rows stand for tokens, or are there in a model without; the further ones are their mean.
        first: the model whose row serves first; None: the mean of the models that have one.
        zeros: whether a row that no model has is 0; else it is the mean of the first model's rows.
        chosen: by row, the model that it is taken of and the row there; None: it is 0.
    """

    tokens: int
    first: Reader | None
    zeros: bool = False
    chosen: Mapping[int, tuple[Reader, int] | None] = field(default_factory=dict)


def has_stored_rows(source: TensorSource, key: str) -> bool:
    """Return whether ``key`` has the rows that are stored, in their order, and not those of a merged vocabulary."""
    return not isinstance(traced(source, key)[0], RowSource)


def in_own_rows(source: TensorSource) -> TensorSource:
    """Return a model as it is read without a merged vocabulary."""
    inner = getattr(source, "source", None)
    return inner.source if isinstance(inner, RowSource) else source


@dataclass(frozen=True, eq=False)
class RowSource:
    """A source whose ``vocabulary`` tensors are read in the merged model's rows.

    Attributes:
        model: what is read.
        models: all models.
        plan: where the rows come from that it lacks.
        vocabulary: the tensors that have an entry (a "row") for each token, each with the dimension.
    """

    model: Reader
    models: tuple[Reader, ...]
    plan: RowPlan
    vocabulary: Mapping[str, int]
    _kept: dict[str, Tensor] = field(default_factory=dict)  # threads read one tensor again and again, for its parts
    _lock: Any = field(default_factory=Lock)

    @property
    def source(self) -> TensorSource:
        """What is read, in its own rows."""
        return self.model.source

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
        shape = self.source.shape(key)
        if (axis := self.vocabulary.get(key)) is None:
            return shape
        return (*shape[:axis], len(self.model.rows), *shape[axis + 1 :])

    def dtype(self, key: str) -> torch.dtype:
        """Return the dtype of ``key``: where rows of others are among its own, one that holds both exactly."""
        own = self.source.dtype(key)
        if key not in self.vocabulary or self._is_complete:
            return own
        holders = self._holders(key)
        first = self.plan.first if self.plan.first in holders else holders[0]
        return torch.promote_types(own, (first or holders[0]).source.dtype(key))

    def prefetch(self, key: str) -> None:
        """Let the data of ``key`` be fetched in the background."""
        self.source.prefetch(key)

    def read_from(self, key: str) -> tuple[TensorSource, str] | None:
        """Return where ``key`` is read, as for `mergelab.weights.source.traced`; None where it has other rows."""
        same = self.shape(key) == self.source.shape(key) and (key not in self.vocabulary or self._is_in_place)
        return (self.source, key) if same else None

    def get(self, key: str) -> Tensor:
        """Read ``key``; a tensor in other rows than stored is held until the next one is read."""
        if key not in self.vocabulary:
            return self.source.get(key)
        if self._is_in_place:
            return self.source.get(key).narrow(self.vocabulary[key], 0, len(self.model.rows))
        with self._lock:
            if key not in self._kept:
                self._kept.clear()
                self._kept[key] = self._read(key)
            return self._kept[key]

    def _read(self, key: str) -> Tensor:
        rows, axis = self.model.rows, self.vocabulary[key]
        found = self.source.get(key).index_select(axis, rows.clamp(min=0)).to(self.dtype(key))
        lacking = (rows[: self.plan.tokens] < 0).nonzero().flatten()
        if len(lacking):
            others = self._of_others(key, lacking).to(found.dtype)
            found.index_copy_(axis, lacking, others.movedim(0, axis))
        if further := len(rows) - self.plan.tokens:
            own = found.narrow(axis, 0, self.plan.tokens)
            mean = own.to(torch.promote_types(own.dtype, torch.float32)).mean(axis, keepdim=True)
            found.narrow(axis, self.plan.tokens, further).copy_(mean)
        return found

    def _of_others(self, key: str, at: Tensor) -> Tensor:
        """Return the rows ``at``, which this model lacks, as the plan says.

        They lie in the first dimension. A mean is taken in float32 and rounded once, to the first model's dtype.
        """
        holders, axis = self._holders(key), self.vocabulary[key]
        first = self.plan.first if self.plan.first in holders else None
        stored = (first or holders[0]).source.get(key).movedim(axis, 0)
        wide = torch.promote_types(stored.dtype, torch.float32)
        total = torch.zeros((len(at), *stored.shape[1:]), dtype=wide)
        count = torch.zeros((len(at), *[1] * (stored.dim() - 1)), dtype=wide)
        for holder in sorted(holders, key=lambda each: each.source.name):  # the same sum in whichever order they come
            rows = holder.rows[at]
            total[rows >= 0] += holder.source.get(key).movedim(axis, 0).index_select(0, rows[rows >= 0]).to(wide)
            count[rows >= 0] += 1
        total /= count.clamp(min=1)
        nowhere = count.flatten() == 0
        if bool(nowhere.any()) and not self.plan.zeros:
            total[nowhere] = stored.to(wide).mean(0)
        if first is not None:
            rows = first.rows[at]
            total[rows >= 0] = stored.index_select(0, rows[rows >= 0]).to(wide)
        for place, row in enumerate(at.tolist() if self.plan.chosen else ()):
            if row in self.plan.chosen:
                total[place] = self._chosen(key, self.plan.chosen[row], axis)
        return total.to(stored.dtype)

    def _chosen(self, key: str, taken: tuple[Reader, int] | None, axis: int) -> Tensor:
        """Return the row that a setting names."""
        if taken is None:
            return torch.zeros(())
        model, row = taken
        if key not in model.names:
            raise KeyMismatch(f"{model.source.name}: has no tensor {key}, of which a token's row is to be taken")
        return model.source.get(key).select(axis, row)

    def _holders(self, key: str) -> list[Reader]:
        return [model for model in self.models if key in model.names]

    @cached_property
    def _is_complete(self) -> bool:
        return bool((self.model.rows >= 0).all())

    @cached_property
    def _is_in_place(self) -> bool:
        return torch.equal(self.model.rows, torch.arange(len(self.model.rows)))
