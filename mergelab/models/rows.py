"""Tensors with a row for each token, read in the rows of a merged vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mergelab.weights.source import traced

if TYPE_CHECKING:
    from mergelab.weights.source import TensorSource


@dataclass(frozen=True, eq=False)
class Reader:
    """A model under common names; the names it has; its row for each of the merged model's, or -1."""

    source: TensorSource
    names: set[str]
    rows: Tensor


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
        models: all models; the first one's rows come first.
        vocabulary: the tensors that have an entry (a "row") for each token, each with the dimension.
    """

    model: Reader
    models: tuple[Reader, ...]
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
        return torch.promote_types(own, self._holders(key)[0].source.dtype(key))

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
        if not self._is_complete:
            lacking = (rows < 0).nonzero().flatten()
            others = self._of_others(key, lacking).to(found.dtype)
            found.index_copy_(axis, lacking, others.movedim(0, axis))
        return found

    def _of_others(self, key: str, at: Tensor) -> Tensor:
        """Return the rows ``at``: the first model's, or where it has none the mean of the models that have the token.

        They lie in the first dimension. The mean is taken in float32 and rounded once, to the first model's dtype. A
        row that no model has is the mean of all the rows of the first one, as transformers makes new rows.
        """
        holders, axis = self._holders(key), self.vocabulary[key]
        first = holders[0]
        stored = first.source.get(key).movedim(axis, 0)
        wide = torch.promote_types(stored.dtype, torch.float32)
        total = torch.zeros((len(at), *stored.shape[1:]), dtype=wide)
        count = torch.zeros((len(at), *[1] * (stored.dim() - 1)), dtype=wide)
        for holder in sorted(holders, key=lambda each: each.source.name):  # the same sum in whichever order they come
            rows = holder.rows[at]
            total[rows >= 0] += holder.source.get(key).movedim(axis, 0).index_select(0, rows[rows >= 0]).to(wide)
            count[rows >= 0] += 1
        total /= count.clamp(min=1)
        nowhere = count.flatten() == 0
        if bool(nowhere.any()):
            total[nowhere] = stored.to(wide).mean(0)
        if first is self.models[0]:
            rows = first.rows[at]
            total[rows >= 0] = stored.index_select(0, rows[rows >= 0]).to(wide)
        return total.to(stored.dtype)

    def _holders(self, key: str) -> list[Reader]:
        return [model for model in self.models if key in model.names]

    @cached_property
    def _is_complete(self) -> bool:
        return bool((self.model.rows >= 0).all())

    @cached_property
    def _is_in_place(self) -> bool:
        return torch.equal(self.model.rows, torch.arange(len(self.model.rows)))
