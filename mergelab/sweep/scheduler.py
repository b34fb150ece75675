"""A sweep's trials handed to a launcher: run, tried again where their process died, told to the study once."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelab.console.progress import say, warn
from mergelab.errors import MergelabError, SweepError
from mergelab.sweep.attempts import FORGIVEN, has_begun, measured_by, tries
from mergelab.sweep.launcher import end_workers, launch
from mergelab.sweep.plan import Sweep
from mergelab.sweep.study import ERROR, OUTCOME, Proposal, SweepStudy
from mergelab.sweep.trial import STUDY, TRIAL, Report, TrialFailure, TrialOutcome
from mergelab.tracking.values import one_line, without_password

if TYPE_CHECKING:
    from hydra.plugins.launcher import Launcher

    from mergelab.tracking import Tracker
    from mergelab.tracking.run import Status

_FEW_FAILURES = 3  # a sweep is not stopped for fewer
_POLL_S = 0.2  # how often to look whether another process has finished a trial


class Jobs:
    """Hands trials to the launcher and tells the study what came back."""

    def __init__(
        self, sweep: Sweep, study: SweepStudy, launcher: Launcher, parent: str | None, tracker: Tracker
    ) -> None:
        self.sweep, self.study, self.launcher, self.parent, self.tracker = sweep, study, launcher, parent, tracker
        self.folder = str(Path(sweep.config.hydra.sweep.dir).absolute())
        store = tracker.store.uri if tracker.store else None
        self.place = {
            "folder": str(sweep.config.hydra.runtime.cwd),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "tracking": store if store and without_password(store) == store else None,
        }
        self.interrupted: Callable[[], bool] = lambda: False
        self.suspects: set[int] = set()
        self.vain_launches = 0

    def run_all(self, interrupted: Callable[[], bool]) -> None:
        """Run what a dead process left behind, then what is missing to the total."""
        self.interrupted = interrupted
        self._settle([trial.number for trial in self.study.pending()])
        while not interrupted():
            batch = self._batch()
            if not batch:
                return
            self._run(batch)
            self._check_failures()

    def _batch(self) -> list[Proposal]:
        settings, study = self.sweep.settings, self.study
        waiting = []
        for trial in study.pending():
            if (count := tries(trial)) > settings.retries:
                self._give_up(trial.number, f"its process died {count} times")
            else:
                waiting.append(Proposal(trial.number, trial.params))
        if alone := [asked for asked in waiting if asked.number in self.suspects]:
            return alone[:1]
        if waiting:
            return waiting[: settings.n_jobs]
        count = min(settings.n_jobs, self.sweep.trials - study.count)
        return [study.ask(side_by_side=settings.n_jobs > 1) for _ in range(count)]

    def _run(self, batch: Sequence[Proposal]) -> None:
        numbers = [asked.number for asked in batch]
        jobs = [
            self._overrides(
                asked.params,
                subfolder=f"{asked.number}",
                number=asked.number,
                attempt=self.study.hand_out(asked.number),
            )
            for asked in batch
        ]
        try:
            returned = launch(self.launcher, jobs, batch[0].number)
        except (KeyboardInterrupt, SystemExit, MergelabError):
            self._forgive(numbers)
            raise
        except Exception as error:  # a launcher whose worker died answers nothing for the whole batch
            self._mind_failed_launch(numbers, error)
            returned = [None] * len(jobs)
        for number, found in zip(numbers, returned, strict=True):
            if isinstance(found, Exception):
                self._tell(number, TrialFailure(one_line(found)))
            elif found is not None:
                self._tell(number, found)
        self._settle([number for number, found in zip(numbers, returned, strict=True) if found is None])

    def _forgive(self, numbers: Sequence[int]) -> None:
        """End what was begun for a reason that is not the trials'."""
        end_workers()
        trials = self.study.trials
        for number in filter(lambda number: has_begun(trials[number]), numbers):
            self.study.note(number, FORGIVEN, int(trials[number].user_attrs.get(FORGIVEN, 0)) + 1)
        if self.tracker.enabled:
            with contextlib.suppress(MergelabError):
                self.tracker.reconcile()

    def _mind_failed_launch(self, numbers: Sequence[int], error: Exception) -> None:
        """Note whose worker may have died: each of these trials is tried again alone."""
        end_workers()
        trials = self.study.trials
        self.suspects |= {number for number in numbers if has_begun(trials[number])}
        self.vain_launches = 0 if self.suspects & set(numbers) else self.vain_launches + 1
        if self.vain_launches > self.sweep.settings.retries:
            self._forgive(numbers)
            raise SweepError(f"hydra/launcher: no job could be started: {one_line(error)}") from error
        warn(f"a worker died, or the launcher failed: {one_line(error)}")

    def _settle(self, numbers: Sequence[int]) -> None:
        """Wait for trials that other processes here still measure; take the results of those that have one."""
        announced: set[int] = set()
        for number in numbers:
            while (process := measured_by(trial := self.study.trials[number])) and not self.interrupted():
                if number not in announced:
                    say(f"trial {number}: process {process} measures it; waiting for that")
                    announced.add(number)
                time.sleep(_POLL_S)
            if (written := trial.user_attrs.get(OUTCOME)) is not None:
                self._end_run(number, "FINISHED")
                self._tell(number, TrialOutcome.read(written))

    def _give_up(self, number: int, error: str) -> None:
        self._end_run(number, "FAILED", error)
        self._tell(number, TrialFailure(error))

    def _end_run(self, number: int, status: Status, error: str | None = None) -> None:
        """Give the run of a trial its final status where its process could not."""
        for known in self.tracker.runs({STUDY: self.sweep.name, TRIAL: str(number), "mergelab.kind": "trial"}):
            if known.status != status and (run := self.tracker.reopened(known.id)):
                run.end(status, error)

    def _overrides(self, params: Mapping[str, Any], *, subfolder: str, **job: Any) -> list[str]:
        told = {"study": self.sweep.name, "parent": self.parent, "source": self.sweep.source, **self.place, **job}
        spelled = ",".join(f"{key}:{_quoted(value)}" for key, value in told.items())
        folders = [f"hydra.sweep.dir={_quoted(self.folder)}", f"hydra.sweep.subdir={_quoted(subfolder)}"]
        return [*self.sweep.space.overrides(params), *folders, f"++sweep.job={{{spelled}}}"]

    def _tell(self, number: int, found: TrialOutcome | TrialFailure) -> None:
        study = self.study
        if isinstance(found, TrialFailure):
            study.note(number, ERROR, found.error)
            study.tell(number, None)
            say(f"trial {number}: {self._point(number)}: failed: {found.error}", failure=True)
            return
        study.tell(number, found.values, pruned_at=found.pruned_at)
        names = [objective.name for objective in self.sweep.objectives]
        scores = ", ".join(f"{name} {value:.4f}" for name, value in zip(names, found.values, strict=True))
        best = study.best()
        if found.pruned_at is not None:
            what = f"pruned after {found.pruned_at} of {found.examples} examples, {scores}"
        else:
            what = f"select {scores}"
        mark = f" (best {best.values[0]:.4f}, trial {best.number})" if best and len(names) == 1 else ""
        times = f"merge {found.merge_seconds:.2f} s, evaluation {found.eval_seconds:.2f} s"
        say(f"trial {number}: {self._point(number)}: {what}{mark}, {times}")

    def _point(self, number: int) -> str:
        return point(self.study.trials[number].params)

    def _check_failures(self) -> None:
        trials = self.study.trials
        failed = [trial for trial in trials if trial.state.name == "FAIL"]
        rate = self.sweep.settings.max_failure_rate
        if len(failed) >= _FEW_FAILURES and len(failed) > rate * len(trials):
            raise SweepError(
                f"{len(failed)} of {len(trials)} trials failed, more than sweep.max_failure_rate={rate:g} allows; "
                f"the last: {failed[-1].user_attrs.get(ERROR)}"
            )

    def report(self) -> list[Report]:
        """Measure the winner (of several objectives: the best by the first) on the reporting examples."""
        best = self.study.best()
        if best is None:
            return []
        overrides = self._overrides(best.params, subfolder="report", number=best.number, stage="report")
        try:
            (found,) = launch(self.launcher, [overrides], self.sweep.trials)
        except (KeyboardInterrupt, SystemExit, MergelabError):
            raise
        except Exception as error:
            found = error
        if isinstance(found, Exception):
            raise SweepError(f"the winner, trial {best.number}, could not be measured: {one_line(found)}") from found
        return [found]


def point(params: Mapping[str, Any]) -> str:
    """Write a point of the space in short: the last part of each key with its value."""
    return " ".join(
        f"{key.removeprefix('method.')}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in params.items()
    )


def _quoted(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, int):
        return str(value)
    text = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'
