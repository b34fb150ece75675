"""A sweep from its first trial to its report: what the Hydra sweeper does."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from mergelab.console.progress import say, say_where
from mergelab.console.tables import result_table
from mergelab.errors import SweepError
from mergelab.experiment.described import command
from mergelab.experiment.keeping import check_push
from mergelab.experiment.recording import open_run, record_result, save_views, tag_models
from mergelab.sweep.launcher import fit_launcher
from mergelab.sweep.objective import AVERAGE
from mergelab.sweep.plan import Sweep, definition, is_pruned, not_pruned, plan_sweep
from mergelab.sweep.pruners import pruner_name
from mergelab.sweep.samplers import sampler_name
from mergelab.sweep.scheduler import Scheduler, point
from mergelab.sweep.space import described
from mergelab.sweep.storage import redacted, storage_errors
from mergelab.sweep.study import PARENT, SweepStudy
from mergelab.sweep.sweeper import TakenOver, only_sweeper
from mergelab.tracking import names
from mergelab.tracking.secrets import without_password
from mergelab.tracking.views import SHOWN_OF_MERGES, trials

if TYPE_CHECKING:
    from hydra.plugins.launcher import Launcher
    from omegaconf import DictConfig
    from optuna.trial import FrozenTrial

    from mergelab.sweep.winner import Report
    from mergelab.tracking import Run, Tracker


@dataclass(frozen=True)
class FinishedSweep:
    """A sweep that has run.

    Attributes:
        study: its trials.
        objectives: what they were judged by.
        reports: on the winners, for each objective one.
        run: the id of the sweep's run; None where it is not tracked.
        experiment: the name of the MLflow experiment.
        folder: its own.
    """

    study: SweepStudy
    objectives: tuple[str, ...]
    reports: tuple[Report, ...]
    run: str | None
    experiment: str
    folder: Path


def run_sweep(
    node: Mapping[str, Any], config: DictConfig, launcher: Launcher, loader: Any, overrides: Sequence[str]
) -> FinishedSweep:
    """Run the remaining trials of a sweep, then evaluate, show and return its winner.

    Args:
        node: the sweeper's settings.
        config: the composed configuration, Hydra's node included.
        launcher: runs the jobs.
        loader: Hydra's configuration loader.
        overrides: those of the command line.

    Raises:
        MergelabError: a setting, the search space, the study or its storage is not usable, or too many trials failed.
        SystemExit: with 130 when the user interrupted it.
    """
    from omegaconf import OmegaConf

    from mergelab.tracking import open_tracking
    from mergelab.tracking.store import locate

    sweep = plan_sweep(node, config, loader, overrides)
    check_push(sweep.plan, sweep.source)
    if sweep.plan.tracking.enabled:
        locate(sweep.plan.tracking)  # refuses an address that cannot be used before there is a study
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
    (folder / "multirun.yaml").write_text(without_password(OmegaConf.to_yaml(config)), encoding="utf-8")
    fit_launcher(launcher, sweep.settings.retries)
    _announce(sweep, study)
    with (
        storage_errors(sweep.url),
        only_sweeper(study, sweep.url) as sweeper,
        _parent(sweep, study, tracker, folder) as run,
        _graceful_interrupts() as interrupted,
    ):
        scheduler = Scheduler(sweep, study, sweeper, launcher, tracker, run.id)
        with _left_if_taken_over(run):
            scheduler.run_all(interrupted)
            scheduler.measure_finalists()
            reports = [] if interrupted() else scheduler.report()
        if interrupted():
            remaining = sweep.trials - study.count + len(study.pending())
            run.end("KILLED", "interrupted")
            say(f"interrupted with {remaining} trials to go: the same command goes on", failure=True)
            raise SystemExit(130)
        _finish(sweep, study, run, tracker, reports, folder)
    objectives = tuple(objective.name for objective in sweep.objectives)
    return FinishedSweep(study, objectives, tuple(reports), run.id, run.experiment, folder)


def _announce(sweep: Sweep, study: SweepStudy) -> None:
    plan, settings = sweep.plan, sweep.settings
    mini = sweep.source == "mini"
    space = ", ".join(f"{key}={described(one)}" for key, one in sweep.space.distributions.items())
    wanted = ", ".join(f"{objective.name} ({objective.direction})" for objective in sweep.objectives)
    pruner, prunes = pruner_name(settings.pruner), is_pruned(settings, plan)
    measured = "adaptive evaluation" if settings.evaluation == "adaptive" else f"pruner {pruner if prunes else 'none'}"
    there = f", {study.count} of them there already" if study.count else ""
    models = names.labelled(plan.task_name, mini=True) if mini else plan.config.models.name
    tasks = ", ".join(names.labelled(task.name, mini=mini) for task in plan.tasks)
    lines = [
        f"sweep     {plan.method.name}: {space}",
        f"models    {models}: {len(plan.config.models.experts)} experts, head {plan.config.models.head}",
        f"evaluate  {tasks}: protocol {plan.config.eval.protocol}, selects {wanted}",
        f"trials    {sweep.trials} in all{there}; sampler {sampler_name(settings.sampler)}, {measured}",
        f"study     {sweep.name} in {redacted(sweep.url)}",
        *_launcher_line(sweep),
    ]
    if settings.evaluation == "pruned" and pruner != "none" and not prunes:
        lines.append(f"          trials are not pruned: {not_pruned(settings, plan)}")
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
def _parent(sweep: Sweep, study: SweepStudy, tracker: Tracker, folder: Path) -> Iterator[Run]:
    """Open the sweep's run, or the one that it has, to continue it."""
    plan, settings = sweep.plan, sweep.settings
    config = {
        **_without(plan.resolved, sweep.space.distributions),
        names.SAMPLER: settings.sampler,
        names.PRUNER: {"pruned": settings.pruner, "full": "none"}.get(str(settings.evaluation), settings.evaluation),
        names.OBJECTIVE: ",".join(objective.name for objective in sweep.objectives),
        names.SPACE: {key: described(one) for key, one in sweep.space.distributions.items()},
    }
    # The study has the run's mark before there is a run: the process may die at any moment.
    if (mark := study.study.user_attrs.get(PARENT)) is None:
        mark = uuid4().hex
        study.study.set_user_attr(PARENT, mark)
    task = names.labelled(plan.task_name, mini=sweep.source == "mini")
    run = open_run(
        tracker,
        "sweep",
        plan,
        sweep.source,
        names.sweep_run(task, plan.method.name, sampler_name(settings.sampler)),
        params=config,
        tags={names.SWEEP: mark, names.STUDY: sweep.name, names.SEED: settings.seed},
        resumed={names.SWEEP: mark},
    )
    run.set_tags({names.N_TRIALS: sweep.trials, names.RUN_FOLDER: folder})
    with run:
        if study.count:
            tracker.adopt(run, {names.STUDY: sweep.name})
        run.log_dict(config, names.CONFIG)
        yield run


@contextlib.contextmanager
def _left_if_taken_over(run: Run) -> Iterator[None]:
    """Leave the sweep's run to the process that has taken the sweep over, and has opened it again."""
    try:
        yield
    except TakenOver:
        run.abandon()
        raise


def _without(config: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """Return a nested configuration without the dotted keys that trials vary."""
    found = {}
    for key, value in config.items():
        below = [name.removeprefix(f"{key}.") for name in keys if name.startswith(f"{key}.")]
        if key not in keys:
            found[key] = _without(value, below) if below and isinstance(value, Mapping) else value
    return found


@contextlib.contextmanager
def _graceful_interrupts() -> Iterator[Callable[[], bool]]:
    """Let a first Ctrl-C end the sweep after the running trials, a second one at once."""
    interrupts: list[int] = []

    def interrupt(number: int, frame: Any) -> None:
        interrupts.append(number)
        if len(interrupts) > 1:
            raise KeyboardInterrupt
        say("interrupted: the sweep ends after the running trials; once more to end it at once", failure=True)

    try:
        before = signal.signal(signal.SIGINT, interrupt)
    except ValueError:  # not in the main thread, which alone may set handlers
        yield lambda: False
        return
    try:
        yield lambda: bool(interrupts)
    finally:
        signal.signal(signal.SIGINT, before)


def _finish(
    sweep: Sweep, study: SweepStudy, run: Run, tracker: Tracker, reports: Sequence[Report], folder: Path
) -> None:
    """Record the study and the report on its winner with the sweep's run, and show them."""
    from mergelab.evaluation.results import RESULT, write_result
    from mergelab.sweep.artifacts import log_study

    best = study.best()
    if best is None:
        raise SweepError("no trial finished: there is nothing to report")
    log_study(run, study, [objective.name for objective in sweep.objectives])
    values = zip(sweep.objectives, best.values, strict=True)
    run.log_metrics({names.best_of_trials(objective.name): value for objective, value in values})
    parameters = {names.best_parameter(key): value for key, value in best.params.items()}
    run.set_tags({names.BEST_TRIAL: best.number, **parameters})
    for report in reports:
        tag_models(run, report.model_tags, sweep.source)
        tracker.copy_datasets(run, report.run)
        record_result(run, report.result, command=command(sweep.overrides, multirun=True))
        write_result(report.result, folder / RESULT)
        result_table(report.result)
    _say_end(sweep, study, best, reports)
    if run.id:
        say(f"parent run {run.id}")
        say_where(tracker, run.experiment, _save_views(sweep, run, tracker, reports))


def _save_views(sweep: Sweep, run: Run, tracker: Tracker, reports: Sequence[Report]) -> str:
    """Save views of the sweep's trials, and of the experiment's merges; return the key of the former."""
    swept = [key for key in sweep.space.distributions if key not in SHOWN_OF_MERGES]
    for report in reports:
        save_views(tracker, run.experiment, report.result, swept)
    objective = sweep.objectives[0]
    metric = AVERAGE if objective.task is None else objective.metric
    task = objective.task if len(sweep.plan.tasks) > 1 else None
    view = trials(
        str(run.id),
        run.name,
        names.estimate_metric(metric, task),
        minimized=objective.direction == "minimize",
        swept=list(sweep.space.distributions),
    )
    tracker.save_views(run.experiment, [view])
    return view.key


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
        for trial in study.as_measured().best_trials:
            named_values = ", ".join(f"{o.name} {v:.4f}" for o, v in zip(sweep.objectives, trial.values, strict=True))
            say(f"Pareto front: trial {trial.number}, {point(trial.params)}: select {named_values}", result=True)
    for report in reports:
        tests = ", ".join(f"{p:.3f} against {name.replace('_', ' ')}" for name, p in report.against.items())
        if tests:
            say(f"paired test of the winner on the reporting examples: p {tests}")
