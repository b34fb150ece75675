"""A sweep from its first trial to its report: what the Hydra sweeper does."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from mergelab.console.progress import say, say_where
from mergelab.console.tables import result_table
from mergelab.errors import SweepError
from mergelab.sweep.launcher import fit_launcher, mask_passwords
from mergelab.sweep.plan import Sweep, definition, named_sampler, plan_sweep
from mergelab.sweep.pruners import PRUNERS
from mergelab.sweep.samplers import named
from mergelab.sweep.scheduler import Jobs, point
from mergelab.sweep.space import described
from mergelab.sweep.storage import redacted, storage_errors
from mergelab.sweep.study import PARENT, SWEEPER, SweepStudy
from mergelab.sweep.trial import STUDY, Report, prunes

if TYPE_CHECKING:
    from hydra.plugins.launcher import Launcher
    from omegaconf import DictConfig
    from optuna.trial import FrozenTrial

    from mergelab.tracking import Run, Tracker

_MARK = "mergelab.sweep"


def run_sweep(
    node: Mapping[str, Any], config: DictConfig, launcher: Launcher, loader: Any, overrides: Sequence[str]
) -> None:
    """Run what is left of a sweep, then measure and show its winner.

    Args:
        node: the sweeper's settings.
        config: the composed configuration, Hydra's node included.
        launcher: what runs the jobs.
        loader: Hydra's configuration loader.
        overrides: those of the command line.

    Raises:
        MergelabError: a setting, the search space, the study or its storage is not usable, or too many trials failed.
        SystemExit: with 130 when the user interrupted it.
    """
    from omegaconf import OmegaConf

    from mergelab.tracking import open_tracking

    sweep = plan_sweep(node, config, loader, overrides)
    study = SweepStudy(
        sweep.url,
        sweep.name,
        sweep.space,
        sweep.settings,
        [objective.direction for objective in sweep.objectives],
        definition(sweep),
    )
    tracker = open_tracking(sweep.plan.tracking)
    folder = Path(config.hydra.sweep.dir).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(config, folder / "multirun.yaml")
    mask_passwords(folder)
    fit_launcher(launcher, sweep.settings.retries)
    _announce(sweep, study)
    with (
        storage_errors(sweep.url),
        _only_sweeper(study),
        _parent(sweep, study, tracker) as run,
        _patience() as interrupted,
    ):
        jobs = Jobs(sweep, study, launcher, run.id, tracker)
        jobs.run_all(interrupted)
        if interrupted():
            left = sweep.trials - study.count + len(study.pending())
            run.end("KILLED", "interrupted")
            say(f"interrupted with {left} trials to go: the same command goes on", failure=True)
            raise SystemExit(130)
        report = jobs.report()
        _finish(sweep, study, run, tracker, report, folder)


def _announce(sweep: Sweep, study: SweepStudy) -> None:
    plan, settings = sweep.plan, sweep.settings
    mini = "mini/" if sweep.source == "mini" else ""
    space = ", ".join(f"{key}={described(one)}" for key, one in sweep.space.distributions.items())
    wanted = ", ".join(f"{objective.name} ({objective.direction})" for objective in sweep.objectives)
    pruner = named(settings.pruner, "pruner", PRUNERS)[0]
    there = f", {study.count} of them there already" if study.count else ""
    lines = [
        f"sweep     {plan.method.name}: {space}",
        f"models    {mini + plan.task_name if mini else plan.config.models.name}: {len(plan.config.models.experts)} "
        f"experts, head {plan.config.models.head}",
        f"evaluate  {', '.join(mini + task.name for task in plan.tasks)}: protocol {plan.config.eval.protocol}, "
        f"selects {wanted}",
        f"trials    {sweep.trials} in all{there}; sampler {named_sampler(settings)}, "
        f"pruner {pruner if prunes(settings, plan) else 'none'}",
        f"study     {sweep.name} in {redacted(sweep.url)}",
        *_launcher_line(sweep),
    ]
    if pruner != "none" and not prunes(settings, plan):
        lines.append("          trials are not pruned: that takes one task and one objective")
    say("\n".join(lines))


def _launcher_line(sweep: Sweep) -> list[str]:
    launcher, together = sweep.config.hydra.runtime.choices.get("hydra/launcher"), sweep.settings.n_jobs
    if launcher == "basic":
        alone = "one after another in this process; hydra/launcher=joblib, ray or submitit_slurm starts them together"
        return [f"          {together} trials at a time are run {alone}"] if together > 1 else []
    hint = "; sweep.n_jobs=4 starts four together" if together == 1 else ""
    return [f"launcher  {launcher}, {together} trial{'s' * (together > 1)} at a time{hint}"]


# ------------------------------------------------------------------------------------------------- around the trials


@contextlib.contextmanager
def _only_sweeper(study: SweepStudy) -> Iterator[None]:
    """Keep a second process from adding trials to the same study."""
    from mergelab.tracking.processes import HOST, PID, has_ended, process_tags

    own = process_tags()
    other = study.study.user_attrs.get(SWEEPER)
    if other and other != own and not has_ended(other):
        raise SweepError(
            f"study {study.study.study_name}: process {other.get(PID)} on {other.get(HOST)} is sweeping it; "
            "wait for its end, or choose another sweep.study_name"
        )
    study.study.set_user_attr(SWEEPER, own)
    try:
        yield
    finally:
        study.study.set_user_attr(SWEEPER, None)


@contextlib.contextmanager
def _parent(sweep: Sweep, study: SweepStudy, tracker: Tracker) -> Iterator[Run]:
    """Open the sweep's run, or the one that it has, to go on under it."""
    from mergelab.tracking import SOURCE, experiment_name
    from mergelab.tracking.values import flatten

    plan, settings = sweep.plan, sweep.settings
    mini = sweep.source == "mini"
    experiment = experiment_name(plan.tracking, plan.task_name, mini=mini)
    params = {
        **{key: value for key, value in flatten(plan.resolved).items() if key not in sweep.space.distributions},
        "sampler": settings.sampler,
        "pruner": settings.pruner,
        "objective": ",".join(objective.name for objective in sweep.objectives),
        "space": {key: described(one) for key, one in sweep.space.distributions.items()},
    }
    # The study has the run's mark before there is a run: the process may die at any moment.
    if (mark := study.study.user_attrs.get(PARENT)) is None:
        mark = uuid4().hex
        study.study.set_user_attr(PARENT, mark)
    if known := tracker.runs({_MARK: mark}, experiment=experiment):
        run = tracker.resume_run(known[0].id)
        if not known[0].params:
            run.log_params(params)
    else:
        run = tracker.start_run(
            f"sweep: {'mini/' if mini else ''}{plan.task_name} {plan.method.name} {named_sampler(settings)}",
            experiment=experiment,
            tags={
                "mergelab.kind": "sweep",
                _MARK: mark,
                STUDY: sweep.name,
                SOURCE: sweep.source,
                "mergelab.seed": settings.seed,
            },
            params=params,
        )
    run.set_tags({"mergelab.n_trials": sweep.trials})
    with run:
        yield run


@contextlib.contextmanager
def _patience() -> Iterator[Callable[[], bool]]:
    """Let a first Ctrl-C end the sweep after the running trials, a second one at once."""
    came: list[int] = []

    def note(number: int, frame: Any) -> None:
        came.append(number)
        if len(came) > 1:
            raise KeyboardInterrupt
        say("interrupted: the sweep ends after the running trials; once more to end it at once", failure=True)

    try:
        before = signal.signal(signal.SIGINT, note)
    except ValueError:  # not in the main thread: whoever has that decides
        yield lambda: False
        return
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGINT, before)


def _finish(
    sweep: Sweep, study: SweepStudy, run: Run, tracker: Tracker, reports: Sequence[Report], folder: Path
) -> None:
    from mergelab.evaluation.results import RESULT, write_result
    from mergelab.experiment.recording import result_metrics
    from mergelab.sweep.artifacts import log_study
    from mergelab.tracking import PRIMARY

    best = study.best()
    if best is None:
        raise SweepError("no trial finished: there is nothing to report")
    log_study(run, study, [objective.name for objective in sweep.objectives])
    run.log_metrics({f"best/select_{o.name}": v for o, v in zip(sweep.objectives, best.values, strict=True)})
    run.set_tags({"mergelab.best_trial": best.number, **{f"best.{key}": value for key, value in best.params.items()}})
    for report in reports:
        run.log_metrics(result_metrics(report.result.merged))
        run.log_metrics({f"report/p_vs_{name}": p for name, p in report.against.items()})
        task = next(iter(report.result.merged.results.values()))
        several = len(report.result.tasks) > 1
        run.set_tags({PRIMARY: "report/average" if several else f"report/{task.primary}"})
        write_result(report.result, folder / RESULT)
        result_table(report.result)
    _say_end(sweep, study, best, reports)
    if run.id:
        say(f"parent run {run.id}")
        say_where(tracker, run.experiment)


def _say_end(sweep: Sweep, study: SweepStudy, best: FrozenTrial, reports: Sequence[Report]) -> None:
    states = [trial.state.name for trial in study.trials]
    counts = ", ".join(
        f"{states.count(state)} {word}"
        for state, word in (("COMPLETE", "complete"), ("PRUNED", "pruned"), ("FAIL", "failed"))
        if states.count(state)
    )
    values = ", ".join(f"{o.name} {v:.4f}" for o, v in zip(sweep.objectives, best.values, strict=True))
    say(f"{len(states)} trials: {counts}")
    by_first = f" by {sweep.objectives[0].name}" if len(sweep.objectives) > 1 else ""
    say(f"best{by_first}: trial {best.number}, {point(best.params)}: select {values}", result=True)
    if len(sweep.objectives) > 1:
        for trial in study.study.best_trials:
            named_values = ", ".join(f"{o.name} {v:.4f}" for o, v in zip(sweep.objectives, trial.values, strict=True))
            say(f"Pareto front: trial {trial.number}, {point(trial.params)}: select {named_values}", result=True)
    for report in reports:
        tests = ", ".join(f"{p:.3f} against {name.replace('_', ' ')}" for name, p in report.against.items())
        if tests:
            say(f"paired test of the winner on the reporting examples: p {tests}")
