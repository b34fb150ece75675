"""Files and folders that get their name when they are complete; what killed processes left of others is removed."""

from __future__ import annotations

import fcntl
import glob
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_SUFFIX = ".partial"
_UNFINISHED = re.compile(r"\..+\.tmp-[0-9a-f]{32}\.partial")


@contextmanager
def unfinished_folder(folder: Path, remains_of: str | None = None) -> Iterator[Path]:
    """Create a hidden sibling of ``folder`` and rename it to that at the end; see `hidden_folder`."""
    with hidden_folder(folder, remains_of) as partial:
        yield partial
        os.rename(partial, folder)


@contextmanager
def hidden_folder(folder: Path, remains_of: str | None = None) -> Iterator[Path]:
    """Create a hidden sibling of ``folder``, to be renamed within the block; on an error it is removed.

    The process that fills it holds a lock on it, which the system releases when the process ends in any way. So the
    next process can tell what a killed one left, in whichever container either runs, and removes it.

    Args:
        folder: the name that it gets, under which there is nothing yet, or an empty folder.
        remains_of: the name whose remains are removed, ``"*"`` for all in the same parent; default: ``folder``'s.

    Raises:
        OSError: the folder cannot be created.
    """
    _remove_remains(folder.parent, glob.escape(folder.name) if remains_of is None else remains_of)
    partial, descriptor = _created(folder, Path.mkdir)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(descriptor)


@contextmanager
def unfinished_file(file: Path) -> Iterator[Path]:
    """Create a hidden sibling of ``file`` that replaces it at the end, as `unfinished_folder` does.

    Raises:
        OSError: it cannot be created or renamed.
    """
    _remove_remains(file.parent, glob.escape(file.name))
    partial, descriptor = _created(file, Path.touch)
    try:
        yield partial
        os.replace(partial, file)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def _created(target: Path, create: Callable[[Path], None]) -> tuple[Path, int]:
    """Create a sibling with a new name and return it with the descriptor that holds its lock."""
    while True:
        partial = target.parent / f".{target.name}.tmp-{uuid.uuid4().hex}{_SUFFIX}"
        create(partial)
        with suppress(FileNotFoundError):  # another process took it for remains before it was locked
            descriptor = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)
            if _lock(descriptor, fcntl.LOCK_SH) and partial.exists():
                return partial, descriptor
            os.close(descriptor)


def _remove_remains(parent: Path, pattern: str) -> None:
    """Remove what no living process holds of the unfinished files and folders of a name."""
    for path in parent.glob(f".{pattern}.tmp-*{_SUFFIX}"):
        if _UNFINISHED.fullmatch(path.name) is None or path.is_symlink():
            continue
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                if _lock(descriptor, fcntl.LOCK_EX):
                    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
            finally:
                os.close(descriptor)


def _lock(descriptor: int, kind: int) -> bool:
    """Return whether the lock was granted; a file system without locks grants a holder's and refuses a remover's."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return kind == fcntl.LOCK_SH
    return True
