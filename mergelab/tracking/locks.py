"""One process at a time: locks for stores, whether files or servers."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mergelab.errors import TrackingError
from mergelab.tracking.secrets import without_password

_LOCK_S = 120.0  # longer than creating the tables takes on a slow disk


@contextmanager
def one_process(uri: str, file: Path | None) -> Iterator[None]:
    """Keep other processes out of the same block: all that use the store's file; of a server's store those here.

    Args:
        uri: the store's address.
        file: its file, whose folder is made; None for a server.

    Raises:
        TrackingError: another process has been in it for minutes.
        OSError: the lock cannot be made.
    """
    from filelock import FileLock, Timeout

    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = file.with_name(f".{file.name}.lock")
    else:
        name = hashlib.sha256(f"{Path.home()} {uri}".encode()).hexdigest()[:16]
        lock = Path(tempfile.gettempdir(), f"mergelab-{name}.lock")
    try:
        with FileLock(lock, timeout=_LOCK_S):
            yield
    except Timeout as error:
        raise TrackingError(f"cannot use the store {without_password(uri)}: another process holds {lock}") from error
