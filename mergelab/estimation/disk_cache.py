"""Cache statistics of data on disk by content, so that a sweep over coefficients computes each of them once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mergelab.cache import warn_of_cache
from mergelab.weights.unfinished import unfinished_file

Tensors = Mapping[str, Tensor]
Metadata = dict[str, str]


def disk_cached(
    folder: Path | None, key: Mapping[str, Any] | None, compute: Callable[[], tuple[Tensors, Metadata]]
) -> tuple[Tensors, Metadata]:
    """Return the result of ``compute``, tensors and their metadata, from the cache where it has them.

    Args:
        folder: the cache folder, whose files are memory-mapped when they are read; None: nothing is cached.
        key: everything that the result depends on, as JSON values; None: the result is not cached.
        compute: called when the cache does not have the result.
    """
    if folder is None or key is None:
        return compute()
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:40]
    file = folder / f"{name}.safetensors"
    if (cached := _read(file)) is not None:
        return cached
    tensors, metadata = compute()
    _write(file, tensors, metadata)
    return tensors, metadata


def _read(file: Path) -> tuple[Tensors, Metadata] | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}, dict(opened.metadata() or {})  # noqa: SIM118
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError) as error:
        warn_of_cache(file.parent, error)
        return None


def _write(file: Path, tensors: Tensors, metadata: Metadata) -> None:
    """Write a temporary file and rename it; where that fails, a `MergeWarning` says why."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with unfinished_file(file) as unfinished:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished, metadata=metadata)
    except (OSError, SafetensorError) as error:
        warn_of_cache(file.parent, error)
