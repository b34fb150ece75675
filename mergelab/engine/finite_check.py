"""Models whose tensors are looked through for NaN and infinity."""

from __future__ import annotations

from threading import Lock

from torch import Tensor

from mergelab.ops.blocks import all_finite, blocks
from mergelab.weights.align import check_finite
from mergelab.weights.source import TensorSource, WrappedSource


class FiniteChecked(WrappedSource):
    """A source whose tensors are looked through for NaN and infinity when they are first read, by whichever thread."""

    def __init__(self, source: TensorSource) -> None:
        self.source = source
        self._seen: dict[str, bool] = {}
        self._locks: dict[str, Lock] = {}

    def get(self, key: str) -> Tensor:
        """Read ``key``, and look it through at the first time."""
        tensor = self.source.get(key)
        if key not in self._seen:
            with self._locks.setdefault(key, Lock()):
                if key not in self._seen:
                    flat = tensor.reshape(-1)
                    if not all(all_finite(flat[part]) for part in blocks(flat.numel())):
                        check_finite(self.source, key, tensor)
                    self._seen[key] = True
        return tensor


def finite_checked(source: TensorSource) -> FiniteChecked:
    """Return the source, with what is known of it where it has been looked through before."""
    return source if isinstance(source, FiniteChecked) else FiniteChecked(source)
