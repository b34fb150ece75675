"""Define sources of named tensors, read on demand: the input of alignment, methods and the writer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mergelab.errors import KeyMismatch, ModelError, listed


class TensorSource(Protocol):
    """A model's tensors by name; a tied tensor is listed once, and can also be read under its names in ``aliases``."""

    @property
    def name(self) -> str:
        """The model's name in error messages: a short name, a hub id or a path."""
        ...

    def keys(self) -> list[str]:
        """List the tensors in stored order, one name per group of tied tensors."""
        ...

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of ``key`` without reading its data."""
        ...

    def dtype(self, key: str) -> torch.dtype:
        """Return the stored dtype of ``key`` without reading its data."""
        ...

    def get(self, key: str) -> Tensor:
        """Return the tensor ``key``, without a copy where the format allows; callers must not write into it."""
        ...

    def aliases(self) -> dict[str, str]:
        """Return the further names of tied tensors, each with the key that holds it; ``keys`` has none of them."""
        ...

    def prefetch(self, key: str) -> None:
        """Request that the data of ``key`` be read ahead in the background."""
        ...


class WrappedSource:
    """Base of sources that change another source's values, with the same names, shapes, dtypes and ties."""

    source: TensorSource

    @property
    def name(self) -> str:
        """The model's name in error messages."""
        return self.source.name

    def keys(self) -> list[str]:
        """List the tensors, one name per group of tied tensors."""
        return self.source.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of ``key``."""
        return self.source.shape(key)

    def dtype(self, key: str) -> torch.dtype:
        """Return the stored dtype of ``key``."""
        return self.source.dtype(key)

    def aliases(self) -> dict[str, str]:
        """Return the further names of tied tensors."""
        return self.source.aliases()

    def prefetch(self, key: str) -> None:
        """Request that the data of ``key`` be read ahead in the background."""
        self.source.prefetch(key)


def traced(source: TensorSource, key: str) -> tuple[TensorSource, str]:
    """Follow sources that pass another one's tensor on as it is; return the last one, with the tensor's name there.

    Such a source has a method ``read_from``: it returns the other source and the name, or None for a tensor of its own.
    """
    while (step := getattr(source, "read_from", None)) is not None and (found := step(key)) is not None:
        source, key = found
    return source, key


class TensorInfo(NamedTuple):
    """A tensor's name, shape and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class TensorPart(NamedTuple):
    """Consecutive entries of a flattened tensor, starting at index ``start``."""

    name: str
    start: int
    entries: Tensor


@dataclass(frozen=True)
class DictSource:
    """A source of tensors in memory: a state dict.

    Attributes:
        name: what errors call it.
        tensors: by name.
        config: the model's configuration, where the tensors are those of a module that has one.
    """

    name: str
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if others := [key for key, value in self.tensors.items() if not isinstance(value, Tensor)]:
            raise ModelError(f"{self.name}: not a tensor: {listed(map(str, others))}")

    def keys(self) -> list[str]:
        """List the stored tensors, one name per group of tied tensors."""
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
        """Do nothing: the tensors are in memory."""

    @cached_property
    def _ties(self) -> dict[str, str]:
        return tied_names(self.tensors)

    def _at(self, key: str) -> Tensor:
        try:
            return self.tensors[key]
        except KeyError:
            raise KeyMismatch(f"{self.name}: has no tensor {key!r}") from None


def tied_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the names of tensors that are the same memory as an earlier one: ``{alias: first name}``.

    Tensors that share only a storage (slices of one buffer, the tensors of a memory-mapped file) are not tied.
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
    """List name, shape and dtype of ``names`` (default: every key) of ``source``, without reading data."""
    keys = source.keys() if names is None else names
    return [TensorInfo(key, source.shape(key), source.dtype(key)) for key in keys]
