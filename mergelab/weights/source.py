"""Tensors by name, read when asked for: what alignment, methods and the writer take in place of a loaded model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mergelab.errors import KeyMismatch, ModelError, listed


class TensorSource(Protocol):
    """A model's tensors by name. A tied tensor is listed once; its other names, in ``aliases``, can be read too."""

    @property
    def name(self) -> str:
        """What errors call the model: a short name, a hub id or a path."""
        ...

    def keys(self) -> list[str]:
        """List the tensors in stored order, one name for each tied group."""
        ...

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of ``key`` without reading its data."""
        ...

    def dtype(self, key: str) -> torch.dtype:
        """Return the stored dtype of ``key`` without reading its data."""
        ...

    def get(self, key: str) -> Tensor:
        """Read ``key``, without a copy where the format allows; callers never write into the answer."""
        ...

    def aliases(self) -> dict[str, str]:
        """Return the further names of tied tensors, each with the key that holds it; none of them is in ``keys``."""
        ...

    def prefetch(self, key: str) -> None:
        """Let the data of ``key`` be fetched in the background, as it will be read soon."""
        ...


class WrappedSource:
    """What a source that changes another one's tensors leaves as it is: names, shapes, dtypes, ties."""

    source: TensorSource

    @property
    def name(self) -> str:
        """What errors call the model."""
        return self.source.name

    def keys(self) -> list[str]:
        """List the tensors, one name for each tied group."""
        return self.source.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of ``key``."""
        return self.source.shape(key)

    def dtype(self, key: str) -> torch.dtype:
        """Return the dtype that ``key`` is stored in."""
        return self.source.dtype(key)

    def aliases(self) -> dict[str, str]:
        """Return the further names of tied tensors."""
        return self.source.aliases()

    def prefetch(self, key: str) -> None:
        """Let the data of ``key`` be fetched in the background."""
        self.source.prefetch(key)


class TensorInfo(NamedTuple):
    """A tensor's name, shape and dtype, known before its data is."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class TensorPart(NamedTuple):
    """Consecutive entries of a flattened tensor, from ``start`` on."""

    name: str
    start: int
    entries: Tensor


@dataclass(frozen=True)
class DictSource:
    """Tensors that are in memory already: a state dict, of a module or made by hand."""

    name: str
    tensors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        if others := [key for key, value in self.tensors.items() if not isinstance(value, Tensor)]:
            raise ModelError(f"{self.name}: not a tensor: {listed(map(str, others))}")

    def keys(self) -> list[str]:
        """List the stored tensors, one name for each tied group."""
        return [key for key in self.tensors if key not in self._ties]

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of ``key``."""
        return tuple(self._at(key).shape)

    def dtype(self, key: str) -> torch.dtype:
        """Return the dtype of ``key``."""
        return self._at(key).dtype

    def get(self, key: str) -> Tensor:
        """Return the tensor itself, not a copy."""
        return self._at(key).detach()

    def aliases(self) -> dict[str, str]:
        """Return the further names of tied tensors."""
        return dict(self._ties)

    def prefetch(self, key: str) -> None:
        """Do nothing: it is in memory."""

    @cached_property
    def _ties(self) -> dict[str, str]:
        return tied_names(self.tensors)

    def _at(self, key: str) -> Tensor:
        try:
            return self.tensors[key]
        except KeyError:
            raise KeyMismatch(f"{self.name}: has no tensor {key!r}") from None


def tied_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return which names are the same memory as an earlier name: ``{alias: first name}``.

    Tensors that only share a storage (slices of one buffer, every tensor of a memory-mapped file) are not tied.
    """
    first: dict[tuple[object, ...], str] = {}
    ties: dict[str, str] = {}
    for name, tensor in tensors.items():
        if tensor.numel() == 0 or tensor.is_sparse or tensor.data_ptr() == 0:  # no memory, nothing to share
            continue
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if (holder := first.setdefault(place, name)) != name:
            ties[name] = holder
    return ties


def layout_of(source: TensorSource, names: Iterable[str] | None = None) -> list[TensorInfo]:
    """Describe ``names`` (default: every key) of ``source`` from its header alone."""
    keys = source.keys() if names is None else names
    return [TensorInfo(key, source.shape(key), source.dtype(key)) for key in keys]
