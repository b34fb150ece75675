"""Which process sweeps a study: one at a time, and the next one at once when it is known to be dead."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any
from uuid import uuid4

from mergelab.console.progress import say
from mergelab.errors import SweepError
from mergelab.sweep.leases import GRACE_S, Watch, renewing
from mergelab.sweep.storage import one_process_at
from mergelab.sweep.study import RENEWED, SWEEPER, SweepStudy
from mergelab.tracking import names
from mergelab.tracking.processes import has_ended, is_here, process_tags

_LEASE = "lease"  # in the mark of the process: its identifier
_POLL_S = 0.2


class TakenOver(SweepError):
    """Another process sweeps the study now."""


class Sweeper:
    """This process's right to add trials to a study.

    Attributes:
        predecessor: the tags of the process that died while it had it; empty where there was none.
    """

    def __init__(self, study: SweepStudy, predecessor: Mapping[str, Any]) -> None:
        self.study, self.predecessor = study, predecessor
        self.mark = {**process_tags(), _LEASE: uuid4().hex}

    def check(self) -> None:
        """Check that no other process has taken the study over.

        Raises:
            TakenOver: one has, because this one gave no sign of life.
        """
        by = self.study.study.user_attrs.get(SWEEPER)
        if by != self.mark:
            raise TakenOver(
                f"study {self.study.study.study_name}: {_named(by)} sweeps it now, as this process had given no sign "
                f"of life for {GRACE_S:.0f} seconds; the trials so far are stored"
            )

    def _renew(self, count: int) -> None:
        self.check()
        self.study.study.set_user_attr(RENEWED, [self.mark[_LEASE], count])


@contextlib.contextmanager
def only_sweeper(study: SweepStudy, url: str) -> Iterator[Sweeper]:
    """Keep a second process from adding trials to the same study.

    Raises:
        SweepError: another process sweeps it.
    """
    sweeper = _begun(study, url)
    try:
        with renewing(sweeper._renew):
            yield sweeper
    finally:
        with contextlib.suppress(TakenOver):
            sweeper.check()
            study.study.set_user_attr(SWEEPER, None)


def _begun(study: SweepStudy, url: str) -> Sweeper:
    """Wait for the lease of a process that may be dead; return when it is this process's."""
    watch, announced = Watch(), False
    seen = study.study.user_attrs.get(RENEWED)
    while True:
        with one_process_at(url):
            other = study.study.user_attrs.get(SWEEPER)
            if not other or has_ended(other) or watch.is_over(SWEEPER, [other, seen]):
                sweeper = Sweeper(study, other or {})
                study.study.set_user_attr(SWEEPER, sweeper.mark)
                study.load()
                return sweeper
        if is_here(other) or study.study.user_attrs.get(RENEWED) != seen:
            raise SweepError(
                f"study {study.study.study_name}: {_named(other)} is sweeping it; wait for its end, or choose another "
                "sweep.study_name"
            )
        if not announced:
            say(f"{_named(other)} has not ended this sweep; waiting {GRACE_S:.0f} s for a sign of life from it")
            announced = True
        time.sleep(_POLL_S)


def _named(by: Mapping[str, Any] | None) -> str:
    return f"process {by.get(names.PID)} on {by.get(names.HOST)}" if by else "another process"
