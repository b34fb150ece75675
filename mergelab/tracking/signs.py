"""Signs of life: open runs are tagged with the time again and again, so that others can close those of dead processes.

Clocks of machines may differ by minutes. A living process whose run was closed by mistake still gives it its own end.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from typing import Any

from mergelab.errors import TrackingError
from mergelab.tracking import names
from mergelab.tracking.store import mlflow_calls

log = logging.getLogger(__name__)

SIGN_S = 60.0
SILENCE_S = 600.0

_open: dict[str, Any] = {}  # the client of each open run
_lock = threading.Lock()
_thread: threading.Thread | None = None


def now_tag() -> dict[str, str]:
    """Return the tag of a sign of life that is given now."""
    return {names.ALIVE: f"{time.time():.3f}"}


def last_sign(tags: Mapping[str, str]) -> float | None:
    """Return when a run's process last gave a sign of life, in seconds since the epoch; None where it never does."""
    try:
        return float(tags[names.ALIVE])
    except (KeyError, ValueError):
        return None


def is_silent(tags: Mapping[str, str]) -> bool:
    """Return whether the last sign of life is older than a living process lets it become."""
    last = last_sign(tags)
    return last is not None and time.time() - last > SILENCE_S


def begin(client: Any, run_id: str) -> None:
    """Give signs of life for an open run."""
    global _thread
    with _lock:
        _open[run_id] = client
        if _thread is None or not _thread.is_alive():  # a forked process has none of its parent's threads
            _thread = threading.Thread(target=_give, name="mergelab-signs-of-life", daemon=True)
            _thread.start()


def end(run_id: str) -> None:
    """Give no more signs of life for a run."""
    with _lock:
        _open.pop(run_id, None)


def _give() -> None:
    while True:
        time.sleep(SIGN_S)
        with _lock:
            given = dict(_open)
        for run_id, client in given.items():
            try:
                with mlflow_calls(f"tag run {run_id}"):
                    for name, value in now_tag().items():
                        client.set_tag(run_id, name, value)
            except TrackingError as error:  # the run itself will meet it, or the store is back by then
                log.debug("%s", error)
