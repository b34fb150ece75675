"""SIGTERM while a run is open: unwind as Ctrl-C does, so that the run is closed as killed."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class Terminated(SystemExit):
    """SIGTERM came; ends the process with 143 once everything is unwound."""


_counting = threading.Lock()
_open_runs = 0
_installed = False
_terminated = False


def hold() -> None:
    """Note an opened run; the first one in the main thread makes SIGTERM raise ``Terminated``.

    A handler that somebody else installed (a cluster launcher's requeueing, say) is left alone.
    """
    global _open_runs, _installed
    with _counting:
        _open_runs += 1
    if _installed or threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)
        _installed = True


def release() -> None:
    """Note a closed run; the last one gives SIGTERM its default meaning back."""
    global _open_runs
    with _counting:
        _open_runs -= 1
    if _open_runs <= 0 and threading.current_thread() is threading.main_thread():
        _restore()


def terminated() -> bool:
    """Return whether SIGTERM has come while a run was open: the process is on its way out."""
    return _terminated


def check() -> None:
    """Raise ``Terminated`` again where SIGTERM came: libraries swallow what is raised while they are imported."""
    if _terminated:
        raise Terminated(128 + signal.SIGTERM)


def _restore() -> None:
    global _installed
    if _installed and signal.getsignal(signal.SIGTERM) is _terminate:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _installed = False


def _terminate(number: int, frame: FrameType | None) -> None:
    global _terminated
    _terminated = True
    _restore()  # a second SIGTERM ends the process at once
    raise Terminated(128 + number)
