"""Statistics that cost a pass over data, kept on disk by content: a sweep over coefficients computes none again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

Tensors = Mapping[str, Tensor]
Notes = dict[str, str]


def disk_cached(
    folder: Path | None, parts: Mapping[str, Any] | None, compute: Callable[[], tuple[Tensors, Notes]]
) -> tuple[Tensors, Notes]:
    """Return what ``compute`` does: tensors, and notes on them.

    Args:
        folder: where it is kept between runs, in a file that is mapped into memory when it is read; None: nowhere.
        parts: all that the result depends on, as JSON has it; None: it has no such name, and is not kept.
        compute: called where no file has the result.
    """
    if folder is None or parts is None:
        return compute()
    name = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:40]
    file = folder / f"{name}.safetensors"
    if (found := _read(file)) is not None:
        return found
    tensors, notes = compute()
    _write(file, tensors, notes)
    return tensors, notes


def _read(file: Path) -> tuple[Tensors, Notes] | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}, dict(opened.metadata() or {})  # noqa: SIM118
    except (OSError, SafetensorError):
        return None


def _write(file: Path, tensors: Tensors, notes: Notes) -> None:
    """Write beside the place and move there; a folder that cannot be written is no error."""
    from safetensors.torch import save_file

    unfinished = file.with_name(f".{file.stem}.{os.getpid()}")
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished, metadata=notes)
            os.replace(unfinished, file)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
