"""Check that models have the same tensor names, shapes and dtypes, and describe where they differ."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from mergelab.errors import KeyMismatch, ShapeMismatch, listed


def require_agreement(models: Sequence[tuple[str, Mapping[str, Tensor]]]) -> None:
    """Check that labelled dictionaries have the same keys, shapes and kinds of dtype (floating point or integer).

    Raises:
        KeyMismatch: lists what each dictionary lacks or has in addition.
        ShapeMismatch: lists tensors whose shapes differ, or that are floating point in one and integer in another.
    """
    if difference := key_differences([(label, model.keys()) for label, model in models]):
        raise KeyMismatch(f"tensor names differ: {difference}")
    (first, reference), *others = models
    clashes = [
        f"{key} is {dtype_and_shape(value.shape, value.dtype)} in {first} but "
        f"{dtype_and_shape(model[key].shape, model[key].dtype)} in {label}"
        for label, model in others
        for key, value in reference.items()
        if value.shape != model[key].shape or value.is_floating_point() != model[key].is_floating_point()
    ]
    if clashes:
        raise ShapeMismatch(joined(clashes))


def key_differences(models: Sequence[tuple[str, Collection[str]]]) -> str:
    """Describe which tensors each model lacks or has in addition; return an empty string when all have the same.

    A tensor that at least half of the models have counts as missing from the others. Any other counts as additional in
    the models that have it.

    Args:
        models: for each model, a label and the names of its tensors.
    """
    holders: dict[str, int] = {}
    for _, keys in models:
        for key in keys:
            holders[key] = holders.get(key, 0) + 1
    parts = []
    for label, keys in models:
        missing = [key for key, count in holders.items() if 2 * count >= len(models) and key not in keys]
        additional = [key for key in keys if 2 * holders[key] < len(models)]
        if missing:
            parts.append(f"{label} lacks {listed(missing)}")
        if additional:
            parts.append(f"{label} has {listed(additional)} in addition")
    return "; ".join(parts)


def dtype_and_shape(shape: Sequence[int], dtype: torch.dtype) -> str:
    """Return a tensor's dtype and shape as text: ``float32[2, 3]``."""
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"


def joined(clashes: Sequence[str], limit: int = 4) -> str:
    """Join the first ``limit`` of ``clashes`` with semicolons, and append how many more there are."""
    return "; ".join(clashes[:limit]) + (f"; and {len(clashes) - limit} more" if len(clashes) > limit else "")
