"""Runs a sweep's trials on a launcher, retries those whose process died, and gives each one result."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelab.console.progress import say, warn
from mergelab.errors import MergelabError, SweepError
from mergelab.sweep.adaptive.finalists import next_finalists
from mergelab.sweep.adaptive.goals import goals_of
from mergelab.sweep.attempts import DEATHS, FORGIVEN, forgive, has_begun, is_held, measured_by, release, tries
from mergelab.sweep.budget import budget_of
from mergelab.sweep.launcher import end_workers, launch
from mergelab.sweep.leases import Watch
from mergelab.sweep.outcome import TrialFailure, TrialOutcome
from mergelab.sweep.plan import Sweep
from mergelab.sweep.study import ERROR, OUTCOME, Proposal, SweepStudy
from mergelab.tracking import interrupts, names
from mergelab.tracking.secrets import has_secret
from mergelab.tracking.values import one_line

if TYPE_CHECKING:
    from hydra.plugins.launcher import Launcher
    from optuna.trial import FrozenTrial

    from mergelab.sweep.estimate import Estimate
    from mergelab.sweep.sweeper import Sweeper
    from mergelab.sweep.winner import Report
    from mergelab.tracking import Tracker
    from mergelab.tracking.run import Status

_FEW_FAILURES = 3  # a sweep is not stopped for fewer
_MANY_DEATHS = 10  # of the whole sweep while the same trial ran: it is the trial that kills it
_POLL_S = 0.2  # how often to look whether another process has finished a trial


class Scheduler:
    """Starts a sweep's jobs in batches and stores what they return in the study."""

    def __init__(
        self, sweep: Sweep, study: SweepStudy, sweeper: Sweeper, launcher: Launcher, tracker: Tracker, run: str | None
    ) -> None:
        self.sweep, self.study, self.launcher, self.tracker = sweep, study, launcher, tracker
        self.sweeper, self.watch = sweeper, Watch()
        self.folder = str(Path(sweep.config.hydra.sweep.dir).absolute())
        store = tracker.store.uri if tracker.store else None
        self.job_settings = {
            "study": sweep.name,
            "parent": run,
            "source": sweep.source,
            "folder": str(sweep.config.hydra.runtime.cwd),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "tracking": store if store and not has_secret(store) else None,
        }
        self.budget = budget_of(sweep.settings.budget)
        self.reserved = 1 if sweep.settings.evaluation == "adaptive" else 0  # whole trials, for a finalist
        self.interrupted: Callable[[], bool] = lambda: False
        self.suspects: set[int] = set()  # trials that may have killed their worker: each is retried alone
        self.failed_launches = 0

    def run_all(self, interrupted: Callable[[], bool]) -> None:
        """Run the pending trials of a dead process, then new ones up to the total.

        Raises:
            TakenOver: another process sweeps the study now.
        """
        self.interrupted = interrupted
        self._collect([trial.number for trial in self.study.pending()])
        if not interrupted():
            self._forgive_deaths_of_the_sweep()
        while not interrupted():
            self.sweeper.check()
            interrupts.check()
            batch = self._next_batch()
            if not batch:
                return
            self._run(batch)
            self._check_failures()

    def _next_batch(self) -> list[Proposal]:
        settings, study = self.sweep.settings, self.study
        waiting = []
        for trial in study.pending():
            if (count := tries(trial)) > settings.retries:
                self._give_up(trial.number, f"its process died {count} times")
            else:
                waiting.append(Proposal(trial.number, trial.params))
        if alone := [proposal for proposal in waiting if proposal.number in self.suspects]:
            return alone[:1]
        if waiting:
            return waiting[: settings.n_jobs]
        known = study.count
        count = min(settings.n_jobs, self.sweep.trials - known)
        left = self.budget.left(self._outcomes(), self.reserved if known else 0)
        if count > 0 and left == 0:
            say(f"sweep.budget={settings.budget}: no more trials begin, after {known} of {self.sweep.trials}")
        count = count if left is None else min(count, left)
        return [study.ask(parallel=settings.n_jobs > 1, known=known) for _ in range(count)]

    def _outcomes(self) -> list[TrialOutcome]:
        return [TrialOutcome.read(stored) for stored in self.study.outcomes()]

    def _run(self, batch: Sequence[Proposal]) -> None:
        numbers = [proposal.number for proposal in batch]
        jobs = [
            self._overrides(
                proposal.params,
                subfolder=f"{proposal.number}",
                number=proposal.number,
                attempt=self.study.new_attempt(proposal.number),
            )
            for proposal in batch
        ]
        try:
            returned = launch(self.launcher, jobs, batch[0].number)
        except (KeyboardInterrupt, SystemExit, MergelabError):
            self._discount_attempts(numbers)
            raise
        except Exception as error:  # a launcher whose worker died returns nothing for the whole batch
            self._handle_failed_launch(numbers, error)
            returned = [None] * len(jobs)
        for number, result in zip(numbers, returned, strict=True):
            if isinstance(result, Exception):
                self._store(number, TrialFailure(one_line(result)))
            elif result is not None:
                self._store(number, result)
        self._collect([number for number, result in zip(numbers, returned, strict=True) if result is None])

    def _forgive_deaths_of_the_sweep(self) -> None:
        """Let attempts that ended with the whole sweep not count against their trials, unless that never ends."""
        for trial in self.study.pending():
            if not is_held(trial):
                continue
            deaths = int(trial.user_attrs.get(DEATHS, 0)) + 1
            self.study.set_attribute(trial.number, DEATHS, deaths)
            forgive(self.study.storage, trial)
            release(self.study.storage, trial)
            if deaths > 1:
                warn(f"trial {trial.number}: {point(trial.params)}: the sweep died {deaths} times while it ran")
            if deaths >= _MANY_DEATHS:
                self._give_up(trial.number, f"the sweep died {deaths} times while it was merged or measured")

    def _discount_attempts(self, numbers: Sequence[int]) -> None:
        """End attempts for a reason that is not the trials': these do not count against them."""
        end_workers()
        trials = self.study.trials
        for number in filter(lambda number: has_begun(trials[number]), numbers):
            self.study.set_attribute(number, FORGIVEN, int(trials[number].user_attrs.get(FORGIVEN, 0)) + 1)
        if self.tracker.enabled:
            with contextlib.suppress(MergelabError):
                self.tracker.reconcile()

    def _handle_failed_launch(self, numbers: Sequence[int], error: Exception) -> None:
        """Suspect the trials that had begun; give the sweep up where again and again none had."""
        end_workers()
        trials = self.study.trials
        begun = {number for number in numbers if has_begun(trials[number])}
        self.suspects |= begun
        if len(begun) > 1:  # any of them may have killed the worker: it counts once each is alone
            for number in begun:
                forgive(self.study.storage, trials[number])
        self.failed_launches = 0 if self.suspects & set(numbers) else self.failed_launches + 1
        if self.failed_launches > self.sweep.settings.retries:
            self._discount_attempts(numbers)
            raise SweepError(f"hydra/launcher: no job could be started: {one_line(error)}") from error
        warn(f"a worker died, or the launcher failed: {one_line(error)}")

    def _collect(self, numbers: Sequence[int]) -> None:
        """Wait for trials that other processes run; store the results of those that have one."""
        announced: set[int] = set()
        for number in numbers:  # the watch on all of them begins
            self._measured_by(self.study.trials[number])
        for number in numbers:
            while (process := self._measured_by(trial := self.study.trials[number])) and not self.interrupted():
                if number not in announced:
                    say(f"trial {number}: process {process} measures it; waiting for that")
                    announced.add(number)
                time.sleep(_POLL_S)
            if (stored := trial.user_attrs.get(OUTCOME)) is not None:
                self._end_run(number, "FINISHED")
                self._store(number, TrialOutcome.read(stored))

    def _measured_by(self, trial: FrozenTrial) -> str | None:
        return measured_by(trial, self.watch, self.sweeper.predecessor)

    def _give_up(self, number: int, error: str) -> None:
        self._end_run(number, "FAILED", error)
        self._store(number, TrialFailure(error))

    def _end_run(self, number: int, status: Status, error: str | None = None) -> None:
        """Give the run of a trial its final status where its process could not."""
        tags = {names.STUDY: self.sweep.name, names.TRIAL: str(number), names.KIND: "trial"}
        for known in self.tracker.runs(tags):
            if known.status != status and (run := self.tracker.reopened(known.id)):
                run.end(status, error)

    def _overrides(self, params: Mapping[str, Any], *, subfolder: str, **job: Any) -> list[str]:
        spelled = ",".join(f"{key}:{_quoted(value)}" for key, value in {**self.job_settings, **job}.items())
        folders = [f"hydra.sweep.dir={_quoted(self.folder)}", f"hydra.sweep.subdir={_quoted(subfolder)}"]
        return [*self.sweep.space.overrides(params), *folders, f"++sweep.job={{{spelled}}}"]

    def _store(self, number: int, result: TrialOutcome | TrialFailure) -> None:
        """Give a trial its result in the study, and say so."""
        study = self.study
        self.sweeper.check()
        if isinstance(result, TrialFailure):
            study.set_attribute(number, ERROR, result.error)
            study.tell(number, None)
            say(f"trial {number}: {self._point(number)}: failed: {result.error}", failure=True)
            return
        study.tell(number, result.values, estimated_of=None if result.pruned_at is None else result.examples)
        best, alone = study.best(), len(self.sweep.objectives) == 1
        mark = f" (best {best.values[0]:.4f}, trial {best.number})" if best and alone else ""
        times = f"merge {result.merge_seconds:.2f} s, evaluation {result.eval_seconds:.2f} s"
        say(f"trial {number}: {self._point(number)}: {self._scored(result)}{mark}, {times}")

    def _scored(self, result: TrialOutcome) -> str:
        """Say what a trial scores, or is estimated to."""
        if result.pruned_at is not None:
            compared = result.comparison(self.sweep.objectives[0].label, "the best")
            return f"{compared}; stopped{_estimate(result.estimate)}"
        named = zip(self.sweep.objectives, result.values, strict=True)
        return "select " + ", ".join(f"{objective.name} {value:.4f}" for objective, value in named)

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

    def measure_finalists(self) -> None:
        """Measure those of the stopped trials further that may be the best, until hardly any other one may be.

        Raises:
            SweepError: one could not be measured.
        """
        while not self.interrupted() and self.sweep.settings.evaluation == "adaptive":
            self.sweeper.check()
            left = self.budget.left(self._outcomes())
            count = min(self.sweep.settings.n_jobs, self.sweep.settings.n_jobs if left is None else left)
            numbers = next_finalists(self.study, goals_of(self.sweep.objectives, self.sweep.plan.tasks), count)
            if not numbers:
                return
            jobs = [
                self._overrides(self.study.trials[one].params, subfolder=f"{one}-whole", number=one, stage="whole")
                for one in numbers
            ]
            for number, found in zip(numbers, self._launched(jobs, numbers, "finalist"), strict=True):
                self.study.tell_later(number, asdict(found.outcome), found.measured)
                what = f"measured {'whole' if found.outcome.pruned_at is None else 'further'} as a finalist"
                say(f"trial {number}: {self._point(number)}: {what}: {self._scored(found.outcome)}")

    def _launched(self, jobs: Sequence[Sequence[str]], numbers: Sequence[int], what: str) -> list[Any]:
        """Run jobs that must succeed.

        Raises:
            SweepError: one failed.
        """
        try:
            found = launch(self.launcher, jobs, self.sweep.trials)
        except (KeyboardInterrupt, SystemExit, MergelabError):
            raise
        except Exception as error:
            found = [error]
        for number, one in zip(numbers, found, strict=False):
            if isinstance(one, Exception):
                raise SweepError(f"the {what}, trial {number}, could not be measured: {one_line(one)}") from one
        return found

    def report(self) -> list[Report]:
        """Evaluate the winner (of several objectives: the best by the first) on the reporting examples."""
        self.sweeper.check()
        best = self.study.best()
        if best is None:
            return []
        overrides = self._overrides(best.params, subfolder="report", number=best.number, stage="report")
        return self._launched([overrides], [best.number], "winner")


def _estimate(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    known = estimate.low is not None and estimate.high is not None
    return f", estimate {estimate.value:.4f}" + (f" [{estimate.low:.3f}, {estimate.high:.3f}]" if known else "")


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
