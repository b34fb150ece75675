"""A base with an adapter in memory: the base's tensors, which other models share, and what the adapter changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from threading import Lock

import torch
from torch import Tensor

from mergelab.adapters.changes import Change, apply_all
from mergelab.weights.source import DictSource, TensorSource


class HeldModel:
    """A `TensorSource` that computes what is changed whenever it is read, and holds nothing but the last such tensor.

    Args:
        name: the model's name in error messages.
        base: the base's tensors.
        tensors: tensors that are the model's own.
        changed: by name, what is changed in the base's tensor of that name.
    """

    def __init__(
        self, name: str, base: DictSource, tensors: Mapping[str, Tensor], changed: Mapping[str, Sequence[Change]]
    ) -> None:
        self.name = name
        self._base, self._own, self._changed = base, DictSource(name, tensors), changed
        self._last: tuple[str, Tensor] | None = None
        self._lock = Lock()

    def keys(self) -> list[str]:
        """List the tensors: the base's, and the model's own."""
        return list(dict.fromkeys([*self._base.keys(), *self._own.tensors]))

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of ``key``."""
        shape = self._at(key).shape(key)
        for change in self.changes(key):
            shape = change.shape(shape) or shape
        return shape

    def dtype(self, key: str) -> torch.dtype:
        """Return the dtype of ``key``."""
        return self._at(key).dtype(key)

    def get(self, key: str) -> Tensor:
        """Return ``key``; it must not be written to."""
        tensor = self._at(key).get(key)
        if key not in self._changed:
            return tensor
        with self._lock:
            if self._last is None or self._last[0] != key:
                self._last = None  # release it before the next one is made
                self._last = (key, apply_all(self._changed[key], tensor))
            return self._last[1]

    def aliases(self) -> dict[str, str]:
        """Return no names: tied tensors are held once."""
        return {}

    def prefetch(self, key: str) -> None:
        """Do nothing: the tensors are in memory."""

    def read_from(self, key: str) -> tuple[TensorSource, str] | None:
        """Return where ``key`` is held, as for `mergelab.weights.source.traced`; None where it is changed."""
        return None if key in self._changed else self.stored(key)

    def stored(self, key: str) -> tuple[TensorSource, str]:
        """Return where the base's tensor is read that is changed to ``key``, with its name there."""
        return self._at(key), key

    def changes(self, key: str) -> Sequence[Change]:
        """Return what is changed in ``key`` of the base, in order."""
        return self._changed.get(key, ())

    @property
    def tensors(self) -> list[Tensor]:
        """The dense tensors that are held, the base's among them."""
        return [*self._base.tensors.values(), *self._own.tensors.values()]

    @property
    def changed(self) -> Mapping[str, Sequence[Change]]:
        """What is changed, by the tensor's name."""
        return self._changed

    def _at(self, key: str) -> DictSource:
        return self._own if key in self._own.tensors else self._base
