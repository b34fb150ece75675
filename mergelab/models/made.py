"""Model folders that are made in the cache, each named by all that its content depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mergelab.cache import cache_dir, temporary_cache
from mergelab.errors import ModelError
from mergelab.weights.checkpoint import CONFIG
from mergelab.weights.unfinished import unfinished_folder


def made(kind: str, parts: Mapping[str, Any], write: Callable[[Path], None]) -> Path:
    """Return the folder in the cache that ``parts`` name; the first time it is written.

    Where the cache cannot be written to, a temporary one takes its place, and a `MergeWarning` says so.

    Args:
        kind: the cache's folder for models that are made in this way.
        parts: everything that the content depends on.
        write: writes the model into an empty folder.

    Raises:
        ModelError: that one cannot be written to either.
    """
    try:
        return _made(cache_dir() / kind, parts, write)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or str(error)
    home = temporary_cache(str(cache_dir() / kind), why) / kind
    try:
        return _made(home, parts, write)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{home}: cannot be written: {getattr(error, 'strerror', None) or error}") from error


def _made(home: Path, parts: Mapping[str, Any], write: Callable[[Path], None]) -> Path:
    from filelock import FileLock

    folder = home / hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
    if (folder / CONFIG).is_file():
        return folder
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(home / f".{folder.name}.lock"):
        if not (folder / CONFIG).is_file():
            with unfinished_folder(folder, remains_of="*") as making:
                write(making)
    return folder
