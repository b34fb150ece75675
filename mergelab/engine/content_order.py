"""Order experts by their values, so that sums over them do not depend on names, places or the order given."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mergelab.engine.finite_check import FiniteChecked, finite_checked
from mergelab.weights.naming import layer_of
from mergelab.weights.source import TensorSource


def content_order(experts: Sequence[TensorSource], names: Sequence[str]) -> list[int]:
    """Return the experts' positions, ordered by the digests of their values.

    The first tensor decides in which they differ. Tensors of layers come first, since whether heads are merged too
    depends on the caller; then small ones, so that hardly anything is read for this. Equal experts stay as given.

    Args:
        experts: the models.
        names: the tensors that are merged.
    """
    sources = [finite_checked(expert) for expert in experts]
    sizes = {name: torch.Size(experts[0].shape(name)).numel() for name in names}
    groups = [list(range(len(sources)))]
    for name in sorted(names, key=lambda name: (layer_of(name) is None, sizes[name], name)):
        if len(groups) == len(sources):
            break
        groups = [part for group in groups for part in _split(group, sources, name)]
    return [position for group in groups for position in group]


def _split(group: list[int], sources: Sequence[FiniteChecked], name: str) -> list[list[int]]:
    """Divide experts that were equal so far by their values in one more tensor."""
    if len(group) == 1:
        return [group]
    parts: dict[str, list[int]] = {}
    for position in group:
        parts.setdefault(sources[position].digest(name), []).append(position)
    return [parts[digest] for digest in sorted(parts)]
