"""One process at a time writes a folder, however its path is spelled and wherever the process runs."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mergelab.errors import ModelError


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold a lock on writing ``folder``; the system releases it when the process ends in any way.

    The lock is a file beside the folder that its path leads to, links resolved, so that processes in other containers
    and with other caches meet at it. It is removed at the end.

    Raises:
        ModelError: another process holds it. OSError: the folder's parent cannot be written to.
    """
    place = place_of(folder)
    lock = place.parent / f".{place.name}.lock"
    descriptor = _acquired(lock)
    if descriptor is None:
        raise ModelError(f"{folder}: another process is writing it; wait for that one or choose another folder")
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def place_of(folder: Path) -> Path:
    """Return where a folder is or will be: its own path, or what that leads to where it is a link or has no name."""
    return folder.resolve() if folder.is_symlink() or folder.name in ("", "..") else folder


def _acquired(lock: Path) -> int | None:
    """Return the descriptor of a lock's file, locked; None where another process holds it."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        if _is_at(descriptor, lock):
            return descriptor
        os.close(descriptor)  # its last holder has removed it since it was opened


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
