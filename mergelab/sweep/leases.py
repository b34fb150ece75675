"""Leases: marks in a study's storage that a living process renews, and that another one watches.

Where the process runs cannot be known from its number or its host's name: both are given again in another container.
Times are not compared, as clocks differ: a lease is over once it has not changed while somebody watched it for long.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Hashable, Iterator

RENEW_S = 5.0
GRACE_S = 30.0  # several renewals may be late, on a busy machine or a slow disk


@contextlib.contextmanager
def renewing(renew: Callable[[int], object]) -> Iterator[None]:
    """Call ``renew`` with 1, 2, … from a thread while the block runs; a renewal that fails is followed by the next."""
    end = threading.Event()

    def run() -> None:
        count = 1
        while not end.wait(RENEW_S):
            with contextlib.suppress(Exception):
                renew(count)
            count += 1

    thread = threading.Thread(target=run, name="mergelab-lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join(RENEW_S)  # longer only where the storage hangs


class Watch:
    """Watches leases for a change; the first look at one begins its time."""

    def __init__(self) -> None:
        self._seen: dict[Hashable, tuple[object, float]] = {}

    def is_over(self, lease: Hashable, value: object) -> bool:
        """Return whether the value that a lease has now is the one that it had for ``GRACE_S`` seconds."""
        known, since = self._seen.get(lease, (None, 0.0))
        if lease not in self._seen or known != value:
            self._seen[lease] = value, time.monotonic()
            return False
        return time.monotonic() - since >= GRACE_S
