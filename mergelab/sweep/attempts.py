"""Which process runs a trial: marks in the study's storage, so that no trial is run by two processes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergelab.sweep.leases import Watch, renewing
from mergelab.sweep.study import ATTEMPTS, RENEWED

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

# Attributes of a trial: which process began it last, and how many of its attempts do not count against it.
BEGUN, FORGIVEN = "mergelab:begun", "mergelab:forgiven"
DEATHS = "mergelab:sweep_deaths"  # how often the whole sweep died while the trial ran
_COUNT = "count"  # in the mark of the process: how often the trial was begun


class Superseded(Exception):
    """Another process has begun the trial since, or the trial has its result."""


@dataclass(frozen=True)
class Attempt:
    """A trial that this process has begun.

    Attributes:
        mark: identifies this attempt in the storage.
        again: the trial was begun before, so that there may be a run of it.
    """

    storage: BaseStorage
    trial_id: int
    mark: dict[str, Any]
    again: bool

    def check(self) -> None:
        """Check that no other process has begun the trial since.

        Raises:
            Superseded: one has, or the trial has its result.
        """
        trial = self.storage.get_trial(self.trial_id)
        if trial.state.is_finished() or trial.user_attrs.get(BEGUN) != self.mark:
            raise Superseded


@contextlib.contextmanager
def attempting(storage: BaseStorage, trial_id: int, attempt: int) -> Iterator[Attempt]:
    """Mark a trial as this process's while the block runs.

    A launcher may itself restart a job (Ray does when a worker dies): the attempt has the same number then, and the
    trial is the later process's.

    Raises:
        Superseded: a later attempt was begun, or the trial has its result.
    """
    from mergelab.tracking.processes import process_tags

    trial = storage.get_trial(trial_id)
    known = trial.user_attrs.get(BEGUN)
    if trial.state.is_finished() or (known and known["attempt"] > attempt):
        raise Superseded
    mark = {"attempt": attempt, _COUNT: known[_COUNT] + 1 if known else 1, "by": process_tags()}
    storage.set_trial_user_attr(trial_id, BEGUN, mark)
    begun = Attempt(storage, trial_id, mark, known is not None)
    try:
        with renewing(lambda renewals: storage.set_trial_user_attr(trial_id, RENEWED, [attempt, renewals])):
            yield begun
    finally:
        with contextlib.suppress(Superseded):
            begun.check()
            storage.set_trial_user_attr(trial_id, BEGUN, {**mark, "by": None})


def tries(trial: FrozenTrial) -> int:
    """Return how often a trial was begun, without the attempts that the user ended.

    An attempt that ended before it had begun, while the models were loaded, says nothing about the trial.
    """
    begun = trial.user_attrs.get(BEGUN)
    return int(begun[_COUNT] if begun else 0) - int(trial.user_attrs.get(FORGIVEN, 0))


def has_begun(trial: FrozenTrial) -> bool:
    """Return whether a process began the trial's last attempt."""
    begun = trial.user_attrs.get(BEGUN)
    return begun is not None and bool(begun["attempt"] == trial.user_attrs.get(ATTEMPTS))


def is_held(trial: FrozenTrial) -> bool:
    """Return whether the process that began the trial last has not let go of it: it lives, or it was killed."""
    return bool((trial.user_attrs.get(BEGUN) or {}).get("by"))


def forgive(storage: BaseStorage, trial: FrozenTrial) -> None:
    """Let the attempts so far of a trial that was begun not count against it."""
    storage.set_trial_user_attr(trial._trial_id, FORGIVEN, trial.user_attrs[BEGUN][_COUNT])


def release(storage: BaseStorage, trial: FrozenTrial) -> None:
    """Free a trial from the dead process that held it."""
    storage.set_trial_user_attr(trial._trial_id, BEGUN, {**trial.user_attrs[BEGUN], "by": None})


def measured_by(trial: FrozenTrial, watch: Watch, dead: Mapping[str, str]) -> str | None:
    """Name the living process, other than this one, that measures the trial; None where it lives no more.

    Args:
        trial: as it is in the storage now.
        watch: tells whether a process elsewhere still renews its lease on the trial.
        dead: the tags of a process that is known to live no more.
    """
    from mergelab.tracking import names
    from mergelab.tracking.processes import has_ended, is_here, process_tags

    by = (trial.user_attrs.get(BEGUN) or {}).get("by") or {}
    if not by or by == process_tags() or all(dead.get(name) == value for name, value in by.items()) or has_ended(by):
        return None
    if is_here(by):
        return str(by[names.PID])
    lease = [trial.user_attrs[BEGUN], trial.user_attrs.get(RENEWED)]
    return None if watch.is_over(trial.number, lease) else f"{by.get(names.PID)} on {by.get(names.HOST)}"
