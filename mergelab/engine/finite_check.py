"""Check models' tensors for NaN and infinity when they are read, and remember the digests of their values."""

from __future__ import annotations

import math
from collections.abc import Iterable
from threading import Lock

from torch import Tensor

from mergelab.ops.blocks import all_finite, blocks, largest
from mergelab.weights.align import check_finite
from mergelab.weights.content import content_digest
from mergelab.weights.hashing import joint_sha256
from mergelab.weights.source import TensorSource, WrappedSource


class FiniteChecked(WrappedSource):
    """A source that checks each tensor for NaN and infinity when it is first read; safe to use from several threads."""

    def __init__(self, source: TensorSource) -> None:
        self.source = source
        self._checked: set[str] = set()
        self._digests: dict[str, str] = {}
        self._largest: dict[str, float] = {}
        self._locks: dict[str, Lock] = {}

    def get(self, key: str) -> Tensor:
        """Return ``key``; check it at the first read.

        Raises:
            NonFinite: it holds NaN or infinity.
        """
        tensor = self.source.get(key)
        if key not in self._checked:
            with self._locks.setdefault(key, Lock()):
                if key not in self._checked:
                    flat = tensor.reshape(-1)
                    if not all(all_finite(flat[part]) for part in blocks(flat.numel())):
                        check_finite(self.source, key, tensor)
                    self._checked.add(key)
        return tensor

    def read_from(self, key: str) -> tuple[TensorSource, str]:
        """Return where ``key`` is read, as for `mergelab.weights.source.traced`."""
        return self.source, key

    def largest(self, key: str) -> float:
        """Return the largest magnitude in ``key``, computed once."""
        if key not in self._largest:
            self._largest[key] = largest_of(self.get(key))
        return self._largest[key]

    def digest(self, key: str, tensor: Tensor | None = None) -> str:
        """Return `content_digest` of ``key``, computed once; of ``tensor`` where it is read already."""
        if key not in self._digests:
            with self._locks.setdefault(key, Lock()):
                if key not in self._digests:
                    self._digests[key] = content_digest(self.source.get(key) if tensor is None else tensor)
        return self._digests[key]


def largest_of(tensor: Tensor) -> float:
    """Return the largest magnitude in a tensor of any size and dtype; NaN where it holds NaN."""
    flat = tensor.reshape(-1)
    parts = (flat[part] for part in blocks(flat.numel()))
    found = [largest(part.float() if part.element_size() == 1 else part) for part in parts]
    return max(found, default=0.0) if not any(map(math.isnan, found)) else math.nan


def finite_checked(source: TensorSource) -> FiniteChecked:
    """Wrap a source in `FiniteChecked`, unless it is one: its checks are not repeated."""
    return source if isinstance(source, FiniteChecked) else FiniteChecked(source)


def digest_of(source: TensorSource, names: Iterable[str]) -> str:
    """Return a digest of the values that a model has in all of these tensors."""
    checked = finite_checked(source)
    return joint_sha256([digest for name in sorted(names) for digest in (name, checked.digest(name))])
