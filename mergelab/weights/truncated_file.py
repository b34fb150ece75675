"""A mapped file that is cut short while it is read: one line, where the system would end the process without."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial

_END = b"\0"  # no signal has this number


@contextmanager
def reported() -> Iterator[None]:
    """Say which file was cut, and end the process with exit code 2, when mapped entries are no longer there.

    The thread that wants to read them cannot go on: it tries for ever, once Python has taken the signal, and Python
    itself would act on it in the main thread only, which may be waiting for that very thread. So a thread of its own
    waits for the signal. What was written so far is as a killed process leaves it.
    """
    if not hasattr(signal, "SIGBUS") or threading.current_thread() is not threading.main_thread():
        yield
        return
    receiver, sender = os.pipe()
    os.set_blocking(sender, False)
    before = signal.signal(signal.SIGBUS, lambda *_: None)
    woken = signal.set_wakeup_fd(sender, warn_on_full_buffer=False)
    _leave_children_alone()
    watcher = threading.Thread(target=_watch, args=(receiver,), name="bus errors", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(woken)
        signal.signal(signal.SIGBUS, before)
        os.write(sender, _END)  # to close it would not end the watcher while a child holds it open
        watcher.join()
        os.close(sender)
        os.close(receiver)


@cache
def _leave_children_alone() -> None:
    """Let forked processes end by the signal, as nobody watches there."""
    os.register_at_fork(after_in_child=partial(signal.signal, signal.SIGBUS, signal.SIG_DFL))


def _watch(receiver: int) -> None:
    while (number := os.read(receiver, 1)) != _END:
        if number[0] == signal.SIGBUS:
            checkpoint = sys.modules.get("mergelab.weights.checkpoint")
            line = None if checkpoint is None else checkpoint.changed_file()
            sys.stdout.flush()
            sys.stderr.write(f"error: {line or 'bus error: mapped memory is no longer there'}\n")
            sys.stderr.flush()
            os._exit(2)
