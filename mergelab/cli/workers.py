"""Processes that joblib keeps for the jobs of a grid or a sweep."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator

_LOOKS_S = 1.0  # seconds between two looks at whether the starter lives
_idle = threading.Event()
_starter: int | None = None


@contextlib.contextmanager
def ends_with_its_starter() -> Iterator[None]:
    """Have a worker end once the process that started it is gone and its job is done; for any other process, nothing.

    joblib ends its workers itself, but if the starter is killed, they wait for five minutes with all that they hold.
    """
    global _starter
    if not multiprocessing.current_process().name.startswith("LokyProcess"):
        yield
        return
    if _starter is None:
        _starter = os.getppid()
        threading.Thread(target=_watch, args=(_starter,), daemon=True).start()
    elif _starter != os.getppid():
        os._exit(1)  # a job that was still in the queue
    _idle.clear()
    try:
        yield
    finally:
        _idle.set()


def _watch(starter: int) -> None:
    while os.getppid() == starter:
        time.sleep(_LOOKS_S)
    _idle.wait()
    os._exit(1)
