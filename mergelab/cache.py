"""The folder for what can be made again, and what takes its place where it cannot be used."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
import warnings
from pathlib import Path

from mergelab.errors import MergeWarning

_replacements: list[Path] = []


def replace_cache(error: Exception) -> None:
    """Let a temporary folder take the cache's place, which turned out to be full or broken, and warn that it does."""
    why = str(getattr(error, "strerror", None) or error)
    _replacements.append(temporary_cache(str(cache_dir()), why))


def cache_dir() -> Path:
    """Return the folder for what can be made again: ``MERGELAB_CACHE``, else ``mergelab`` in the user's cache.

    Where that folder can neither be read nor made, it is a temporary one, and a `MergeWarning` says so.
    """
    if _replacements:
        return _replacements[-1]
    try:
        if folder := os.environ.get("MERGELAB_CACHE"):
            return _usable(Path(folder).expanduser().absolute())
        return _usable(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "mergelab")
    except RuntimeError:  # there is no home
        return temporary_cache("the user's home", "it cannot be determined")


@functools.cache
def _usable(folder: Path) -> Path:
    existing = next((each for each in (folder, *folder.parents) if os.path.lexists(each)), folder)
    if not existing.is_dir():
        return temporary_cache(str(folder), f"{existing} is no folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)  # only that shows whether it can be made
    except OSError as error:
        return temporary_cache(str(folder), f"{existing} cannot be written to: {error.strerror}")
    return folder


@functools.cache
def temporary_cache(folder: str, why: str) -> Path:
    """Make a folder that takes a cache's place until the process ends, and warn that it does."""
    made = Path(tempfile.mkdtemp(prefix="mergelab-cache-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    warnings.warn(
        f"the cache {folder} cannot be used ({why}); a temporary one serves this command, "
        "MERGELAB_CACHE=<folder> names another",
        MergeWarning,
        stacklevel=3,
    )
    return made


def warn_of_cache(folder: Path, error: Exception) -> None:
    """Warn that something could not be kept in the cache, or read from it, and that the work goes on without."""
    why = getattr(error, "strerror", None) or error
    warnings.warn(f"the cache {folder} cannot be used ({why}); the work goes on without it", MergeWarning, stacklevel=3)
