"""A base with an adapter as one model: its tensors are computed when they are read, and never all in memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from mergelab.adapters.changes import Change, LowRank, Replacement, apply_all
from mergelab.adapters.placing import Placement
from mergelab.errors import KeyMismatch
from mergelab.weights.align import RenamedSource
from mergelab.weights.checkpoint import Checkpoint
from mergelab.weights.conversion import ConvertedSource
from mergelab.weights.hashing import file_sha256, joint_sha256
from mergelab.weights.source import TensorSource


class AdaptedCheckpoint(Checkpoint):
    """A `TensorSource` over a base and an adapter.

    A changed tensor is computed in float32 and rounded once to the base's dtype. The last one stays in memory, since
    large tensors are merged part by part.

    Args:
        name: the model's name in error messages.
        folder: where its config and its tokenizer are.
        config: the parsed config.
        base: the base.
        placement: what the adapter changes in it.
        adapter_files: the files that the adapter's content depends on.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        config: dict[str, Any],
        base: Checkpoint,
        placement: Placement,
        adapter_files: Sequence[Path],
    ) -> None:
        self.name, self.folder, self.config = name, folder, config
        self.files = (*base.files, *adapter_files)
        self.standard = False
        self._base, self._placement, self._adapter_files = base, placement, tuple(adapter_files)
        self._source, self._apart = placement.source, placement.apart
        self._ties = {a: key for a, key in self._source.aliases().items() if a not in self._apart}
        self._last: tuple[str, Tensor] | None = None
        self._lock = Lock()

    @property
    def is_quantised(self) -> bool:
        """False: adapters of quantised bases are refused."""
        return False

    @property
    def dequantised_dtype(self) -> torch.dtype | None:
        """None, as it is not quantised."""
        return None

    def keys(self) -> list[str]:
        """List the tensors, one name per group of tied tensors: the base's in their order, then the adapter's own."""
        return [*self._source.keys(), *self._apart, *self._placement.new]

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of ``key``."""
        if (new := self._placement.new.get(self._held(key))) is not None:
            return tuple(new.values.shape)
        shape = tuple(self._source.shape(self._at(key)))
        for change in self.changes(key):
            after = change.shape(shape)
            assert after is not None  # checked when the adapter was placed
            shape = after
        return shape

    def dtype(self, key: str) -> torch.dtype:
        """Return the dtype of ``key``: the base's, for the adapter's own tensors as for those of the base."""
        if self._held(key) in self._placement.new:
            return self._own_dtype
        return self._source.dtype(self._at(key))

    def get(self, key: str) -> Tensor:
        """Read ``key`` of the base, changed by the adapter; it must not be written to."""
        held = self._held(key)
        if (new := self._placement.new.get(held)) is not None:
            return new.values.to(self._own_dtype)
        changes = self.changes(key)
        if not changes:
            return self._source.get(self._at(key))
        with self._lock:
            if self._last is None or self._last[0] != held:
                self._last = None  # release it before the next one is made
                self._last = (held, apply_all(changes, self._source.get(self._at(key))))
            return self._last[1]

    def prefetch(self, key: str) -> None:
        """Request that the base's data of ``key`` be read ahead in the background."""
        if self._held(key) not in self._placement.new:
            self._source.prefetch(self._at(key))

    def aliases(self) -> dict[str, str]:
        """Return the further names of tied tensors."""
        return dict(self._ties)

    def content_hash(self) -> str:
        """Return a SHA-256 of the content of the base's weights and of the adapter."""
        return joint_sha256([self._base.content_hash(), *(file_sha256(path) for path in self._adapter_files)])

    @property
    def _own_dtype(self) -> torch.dtype:
        """The dtype of the base's first floating-point tensor, which a head has beside it."""
        names = self._source.keys()
        kinds = (self._source.dtype(key) for key in names)
        return next((kind for kind in kinds if kind.is_floating_point), torch.float32)

    def changes(self, key: str) -> Sequence[Change]:
        """Return what the adapter changes in ``key`` of the base, in order."""
        return self._placement.changes.get(self._held(key), ())

    def _held(self, key: str) -> str:
        """Return the name under which ``key`` is held here."""
        return self._ties.get(key, key)

    def _at(self, key: str) -> str:
        """Return the name under which the base's data of ``key`` is read."""
        held = self._held(key)
        at = self._apart.get(held, held)
        if held in self._apart or held in self._known:
            return at
        raise KeyMismatch(f"{self.name}: has no tensor {key!r} in {self.folder}")

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(self._source.keys())


def changes_of(source: TensorSource, name: str) -> Sequence[Change] | None:
    """Return what an adapter changes in a tensor of an expert, whatever name the tensor has here.

    Returns:
        The changes of the base's tensor, none where it stays as it is; None where the expert is no adapter, or where
        its values are read otherwise than they are stored, as with rows in another order.
    """
    found: TensorSource | None = source
    stored: str | None = name
    while found is not None and stored is not None:
        if isinstance(found, AdaptedCheckpoint):
            return found.changes(stored)
        if isinstance(found, RenamedSource):
            stored, found = found.stored.get(stored), found.source
        elif isinstance(found, ConvertedSource):
            stored, found = found.renamed.get(stored), found.source
        else:
            found = getattr(found, "origin", None)
    return None


def low_rank_changes(source: TensorSource, name: str, base: TensorSource) -> list[LowRank] | None:
    """Return the low-rank changes of a tensor of an expert; None where it is no adapter, or changes more than these.

    A copy of the base's tensor, as PEFT stores it beside an adapted embedding, is no change.

    Args:
        source: the expert.
        name: the tensor, in the expert and in the base.
        base: the base that the expert is merged with.
    """
    own = changes_of(source, name)
    if own and isinstance(own[0], Replacement):
        whole, values = base.get(name), own[0].values
        if whole.shape == values.shape and torch.equal(values.to(whole.dtype), whole):
            own = own[1:]
    if own is None or not all(isinstance(change, LowRank) for change in own):
        return None
    return [change for change in own if isinstance(change, LowRank)]
