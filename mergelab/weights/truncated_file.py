"""Report a memory-mapped file that is truncated while it is read, where the system would kill the process silently."""

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
    """Name the truncated file and end the process with exit code 2 when mapped entries are missing from it (SIGBUS).

    The thread that reads the entries cannot continue: once Python handles the signal, it retries the read for ever.
    Python runs signal handlers only in the main thread, which may be waiting for that thread. So a separate thread
    waits for the signal. Files that were being written are left as a killed process leaves them.
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
        os.write(sender, _END)  # closing it would not end the watcher while a child process holds it open
        watcher.join()
        os.close(sender)
        os.close(receiver)


@cache
def _leave_children_alone() -> None:
    """Restore the signal's default action in forked processes, which have no watching thread."""
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
