"""One job of a sweep: a trial, evaluated on the selecting examples, or at the end the report on the winner."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mergelab.config import check
from mergelab.console.formats import for_a_page
from mergelab.console.progress import gathered_warnings, progress_bar
from mergelab.errors import SweepError
from mergelab.evaluation.results import ExperimentResult, ModelResult, peak_memory_mb
from mergelab.experiment import described, recording
from mergelab.experiment.loaded import LoadedModels, open_loaded
from mergelab.experiment.logged import Measured, with_logged
from mergelab.experiment.plan import Plan, plan_experiment
from mergelab.sweep.adaptive.finalists import Finalist
from mergelab.sweep.adaptive.history import MeasuredTrial
from mergelab.sweep.adaptive.reporter import AdaptiveReporter, adaptive_reporter
from mergelab.sweep.attempts import Attempt, Superseded, attempting
from mergelab.sweep.budget import budget_of
from mergelab.sweep.config import SweepConfig, TrialJob, sweep_config
from mergelab.sweep.estimate import Estimate, estimate_metrics, estimates
from mergelab.sweep.futility import Futility
from mergelab.sweep.launcher import open_study, open_tracker, worker_context
from mergelab.sweep.metric_reporter import PARTS, MetricReporter
from mergelab.sweep.objective import Objective, objectives
from mergelab.sweep.outcome import TrialFailure, TrialOutcome
from mergelab.sweep.plan import expert_weights, fitted, is_pruned
from mergelab.sweep.pruners import make_pruner
from mergelab.sweep.reporting import Pruned, ScoreReporter
from mergelab.sweep.selecting import SelectingEvaluation
from mergelab.sweep.storage import storage_url
from mergelab.sweep.study import MEASURED, OUTCOME
from mergelab.sweep.targets import is_mean_of_scores
from mergelab.sweep.winner import Report, report_winner
from mergelab.tracking import interrupts, names
from mergelab.tracking.values import one_line

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from optuna.study import Study

    from mergelab.evaluation.scoring import TaskResult
    from mergelab.experiment.calibration import Calibration
    from mergelab.tracking import Run, Tracker


Reporter = ScoreReporter | MetricReporter | AdaptiveReporter


class _Failed(Exception):
    """A trial that could not be merged or evaluated; others may be."""


def run_job(config: DictConfig) -> TrialOutcome | TrialFailure | Finalist | Report | None:
    """Run the job that ``config``'s ``sweep.job`` describes; None where another process has the trial now.

    Raises:
        MergelabError: the models or the data cannot be used, so that further trials are of no use.
    """
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    described: Any = OmegaConf.to_container(config.sweep.job)
    job = check(TrialJob, described, "sweep.job")
    with worker_context(job), gathered_warnings(), progress_bar() as progress:
        plan = plan_experiment(config)
        node: Any = OmegaConf.to_container(HydraConfig.get().sweeper, resolve=True)
        settings = fitted(sweep_config(node), plan)
        tracker = open_tracker(plan.tracking, job)
        if job.stage == "report":
            with _open_run(tracker, plan, job, {}, resume=True) as run:
                return report_winner(plan, job.source, tracker, run, progress)
        if job.stage == "whole":
            with _open_run(tracker, plan, job, {}, resume=True) as run:
                return _measure_further(plan, settings, job, run, progress)
        return _run_trial(plan, settings, job, tracker, progress)


def _run_trial(
    plan: Plan, settings: SweepConfig, job: TrialJob, tracker: Tracker, progress: Any
) -> TrialOutcome | TrialFailure | None:
    """Measure a trial and write its outcome to the study's storage, if it is still this process's."""
    storage, study = open_study(storage_url(settings.storage, job.folder), job)
    trial_id = storage.get_trial_id_from_study_id_trial_number(study._study_id, job.number)
    # Before the trial has begun: a process that dies while it loads is not the trial's fault.
    loaded = open_loaded(plan, job.source, progress, keep=True, compiling=settings.compile)
    assert loaded.baselines  # an expert at chance makes every trial worthless
    budget_of(settings.budget).check(sum(len(one.select) for one in loaded.evaluator.examples.values()))
    models = recording.model_tags(loaded.session) if tracker.enabled else {}
    try:
        with (
            attempting(storage, trial_id, job.attempt) as attempt,
            _open_run(tracker, plan, job, models, resume=attempt.again) as run,
            _abandoned_if_superseded(attempt, run),
        ):
            if (known := storage.get_trial(trial_id).user_attrs.get(OUTCOME)) is not None:
                return TrialOutcome.read(known)
            outcome = measure_trial(plan, settings, loaded, study, job, attempt, run, progress)
            storage.set_trial_user_attr(trial_id, OUTCOME, asdict(outcome))
            return outcome
    except Superseded:
        return None
    except _Failed as failure:
        return TrialFailure(str(failure))


def _open_run(tracker: Tracker, plan: Plan, job: TrialJob, tags: Mapping[str, str], *, resume: bool) -> Run:
    """Open the job's run below the sweep's; with ``resume`` the one that it has, if it has one."""
    from hydra.core.hydra_config import HydraConfig

    kind: names.Kind = "report" if job.stage == "report" else "trial"
    identity = {names.STUDY: job.study, names.TRIAL: str(job.number), names.KIND: kind}
    task = names.labelled(plan.task_name, mini=job.source == "mini")
    name = names.trial_run if kind == "trial" else names.report_run
    return recording.open_run(
        tracker,
        kind,
        plan,
        job.source,
        name(task, plan.method.name, job.number),
        parent=job.parent,
        tags={**identity, **tags, names.RUN_FOLDER: Path(HydraConfig.get().runtime.output_dir)},
        resumed=identity if resume else None,
    )


def measure_trial(
    plan: Plan,
    settings: SweepConfig,
    loaded: LoadedModels,
    study: Study,
    job: TrialJob,
    attempt: Attempt,
    run: Run,
    progress: Any,
) -> TrialOutcome:
    """Merge and evaluate one point of the search space, and record what was found.

    Raises:
        Superseded: another process has the trial now.
    """
    evaluator, session = loaded.evaluator, loaded.session
    recording.record_inputs(run, plan.resolved, evaluator.data.values())
    evaluation, seconds, examples = _merged(plan, loaded, job, progress)

    started = time.perf_counter()
    label, backbones = evaluation.label, evaluation.backbones
    wanted = objectives(settings.objective, settings.direction, plan.tasks)
    reporter = _reporter(plan, settings, loaded, study, job, evaluation)
    pruned_at = _evaluate(evaluation, reporter)
    attempt.check()
    results, evaluated = evaluation.results(whole=pruned_at is None), time.perf_counter() - started
    values, estimated = _scored(results, evaluation, reporter, pruned_at, plan, wanted)
    if isinstance(reporter, AdaptiveReporter):
        measured = MeasuredTrial(job.number, (), reporter.measured(), whole=pruned_at is None)
        attempt.storage.set_trial_user_attr(attempt.trial_id, MEASURED, measured.written())
    own = estimated.get(_key(wanted[0], plan))
    rival = None if reporter.rival is None or pruned_at is None else reporter.rival.number

    outcome = TrialOutcome(values, evaluation.count, pruned_at, seconds, evaluated, run.id, own, rival)
    merged = ModelResult(label, "merged", results, eval_seconds=evaluated, merge_seconds=seconds)
    merged = with_logged(Measured(replace(merged, peak_mb=peak_memory_mb()), session, backbones))
    merged = replace(merged, logged={**merged.logged, **estimate_metrics(merged.logged, estimated)})
    result = ExperimentResult(label, f"{evaluator.note}\ntrial: scores of the selecting examples", (), (merged,))
    tags = _tags(plan, outcome, wanted[0]) | {names.MERGE_PATH: loaded.path} | recording.calibration_tags(examples)
    tags[names.DESCRIPTION] = _description(merged.logged, tags.get(names.PRUNED))
    recording.record_result(run, result, tags=tags, recorded=run.recorded)
    return outcome


def _description(logged: Mapping[str, float], stopped: str | None) -> str:
    """Describe a trial in Markdown: whether it was stopped early, and its scores or their estimates."""
    prefix = names.estimate_metric("")
    found = [name for name in logged if name.startswith(prefix) and names.low(name) in logged]
    rows = [[name.removeprefix(prefix), f"{logged[name]:.4f}"] for name in found]
    columns, summary = ["metric", "score on all selecting examples"], "**complete**"
    if stopped is not None:
        columns, summary = ["metric", "estimate for all selecting examples", "95 % interval"], f"**stopped** {stopped}"
        for row, name in zip(rows, found, strict=True):
            row.append(f"[{logged[names.low(name)]:.3f}, {logged[names.high(name)]:.3f}]")
    table = for_a_page("markdown", columns, rows) if rows else ""
    return described.description(summary, table, "The run that this one is under has the sweep's command.")


def _merged(
    plan: Plan, loaded: LoadedModels, job: TrialJob, progress: Any
) -> tuple[SelectingEvaluation, float, Calibration | None]:
    """Merge the trial's point; return its evaluation, which is to run, the seconds, and what the method learnt from."""
    session = loaded.session
    session.heads.average_of([expert.name for expert in session.located.experts])
    with _failures_of_trial():
        examples = loaded.calibration(plan, progress)
        backbones, seconds = loaded.merged(plan.method, plan.parameters, examples, progress, expert_weights(plan))
    label = f"{plan.method.name} (trial {job.number})"
    return SelectingEvaluation(loaded.evaluator, backbones, label, plan.config.seed), seconds, examples


def _reporter(
    plan: Plan,
    settings: SweepConfig,
    loaded: LoadedModels,
    study: Study,
    job: TrialJob,
    evaluation: SelectingEvaluation,
) -> Reporter:
    """Create what takes the trial's scores, and ends it early."""
    wanted = objectives(settings.objective, settings.direction, plan.tasks)
    if settings.evaluation == "adaptive":
        return adaptive_reporter(study, job.number, wanted, loaded.evaluator, loaded.baselines, settings.seed)
    pruner: Any = make_pruner(settings.pruner) if is_pruned(settings, plan) else None
    first = wanted[0]
    means = len(plan.tasks) == 1 and is_mean_of_scores(plan.tasks[0], first.metric)
    if isinstance(pruner, Futility) and not means:
        selecting = {name: len(one.select) for name, one in loaded.evaluator.examples.items()}
        tasks = [(task, selecting[task.name]) for task in plan.tasks if selecting[task.name]]
        return MetricReporter(pruner, study, job.number, first, tasks, evaluation.statistics)
    unknown = np.full(evaluation.count, np.nan)
    return ScoreReporter(pruner, study, job.number, unknown, lambda: _values(evaluation.results(), plan, wanted)[0])


def _key(objective: Objective, plan: Plan) -> str:
    """Return what an objective is called among the estimates."""
    if objective.task is None:
        return objective.name
    return f"{objective.task}/{objective.metric}" if len(plan.tasks) > 1 else objective.metric


def _evaluate(evaluation: SelectingEvaluation, reporter: Reporter) -> int | None:
    """Evaluate all examples, or as many as the trial needs; return how many these are, None for all."""
    try:
        with _failures_of_trial():
            if isinstance(reporter, AdaptiveReporter):
                evaluation.run_in_rounds(reporter.report, reporter.rounds)
                return None
            if isinstance(reporter, MetricReporter):
                parts = PARTS if reporter.rival is not None else PARTS[-1:]
                evaluation.run(reporter.report, parts=parts, after_part=reporter.decide)
                reporter.finish()
                return None
            evaluation.run(reporter.report)
        reporter.finish(lambda: evaluation.statistics(next(iter(evaluation.evaluator.data)))[1])
        return None
    except Pruned:
        return reporter.done


def _estimates(evaluation: SelectingEvaluation, reporter: Reporter) -> dict[str, Estimate]:
    """Return the estimates of a trial that was stopped early, by metric."""
    if isinstance(reporter, MetricReporter) and len(evaluation.evaluator.data) > 1:
        return reporter.estimates()
    evaluator = evaluation.evaluator
    parts = {name: data.parts[evaluator.examples[name].select] for name, data in evaluator.data.items()}
    if isinstance(reporter, AdaptiveReporter):
        return reporter.estimates(parts)
    ((name, data),) = evaluator.data.items()
    best = None if reporter.rival is None else reporter.rival.statistics
    return estimates(data.spec, *evaluation.statistics(name), best, parts[name])


def _measure_further(plan: Plan, settings: SweepConfig, job: TrialJob, run: Run, progress: Any) -> Finalist:
    """Measure a stopped trial on more of the selecting examples, as long as it may be the best, and record its scores.

    Raises:
        SweepError: it cannot be merged or measured.
    """
    loaded = open_loaded(plan, job.source, progress, keep=True, compiling=settings.compile)
    _, study = open_study(storage_url(settings.storage, job.folder), job)
    wanted = objectives(settings.objective, settings.direction, plan.tasks)
    evaluator, stored = loaded.evaluator, study.get_trials(deepcopy=False)[job.number].user_attrs[OUTCOME]
    reporter = adaptive_reporter(study, job.number, wanted, evaluator, loaded.baselines, settings.seed, again=True)
    try:
        evaluation, seconds, _ = _merged(plan, loaded, job, progress)
        started = time.perf_counter()
        pruned_at = _evaluate(evaluation, reporter)
        measured = MeasuredTrial(job.number, (), reporter.measured(), whole=pruned_at is None)
        with _failures_of_trial():
            results = {
                name: evaluation.result_from(name, one.positions, one.statistics, whole=measured.whole)
                for name, one in measured.tasks.items()
            }
    except _Failed as failure:
        raise SweepError(f"trial {job.number}, to be measured further: {failure}") from failure
    evaluated = time.perf_counter() - started
    values, estimated = _scored(results, evaluation, reporter, pruned_at, plan, wanted)
    own = estimated.get(_key(wanted[0], plan))
    rival = None if reporter.rival is None or pruned_at is None else reporter.rival.number
    before = TrialOutcome.read(stored).measured
    outcome = TrialOutcome(values, evaluation.count, pruned_at, seconds, evaluated, run.id, own, rival, before)
    merged = ModelResult(evaluation.label, "merged", results, eval_seconds=evaluated, merge_seconds=seconds)
    logged = with_logged(Measured(merged, loaded.session, evaluation.backbones)).logged
    scores = {name: value for name, value in logged.items() if name.startswith(names.select_metric(""))}
    scores |= estimate_metrics(scores, estimated)
    run.log_metrics(scores, step=1)  # after the first estimates
    pruned = _tags(plan, outcome, wanted[0]).get(names.PRUNED)
    run.set_tags({names.PRUNED: pruned or "", names.DESCRIPTION: _description(scores, pruned)})
    return Finalist(outcome, measured.written())


def _scored(
    results: Mapping[str, TaskResult],
    evaluation: SelectingEvaluation,
    reporter: Reporter,
    pruned_at: int | None,
    plan: Plan,
    wanted: list[Objective],
) -> tuple[tuple[float, ...], dict[str, Estimate]]:
    """Return a trial's objectives, and where it was stopped early the estimates that they are from, by metric."""
    if pruned_at is None:
        return _values(results, plan, wanted), {}
    estimated = _estimates(evaluation, reporter)
    keys = [_key(one, plan) for one in wanted]
    return tuple(estimated[key].value if key in estimated else math.nan for key in keys), estimated


def _values(results: Mapping[str, TaskResult], plan: Plan, wanted: list[Objective]) -> tuple[float, ...]:
    """Compute the objectives from the tasks' scores."""
    scores = {name: result.select for name, result in results.items()}
    primary = {task.name: task.primary for task in plan.tasks}
    return tuple(objective.value(scores, primary) for objective in wanted)


def _tags(plan: Plan, outcome: TrialOutcome, objective: Objective) -> dict[str, str]:
    """Return the tags that say what a trial is judged by, the sweep's (first) objective, and whether it was pruned."""
    if objective.task is None:
        primary = names.SELECT_AVERAGE
    else:
        primary = names.select_metric(objective.metric, objective.task if len(plan.tasks) > 1 else None)
    tags = {names.PRIMARY: primary, names.DIRECTION: str(objective.direction)}
    if outcome.pruned_at is not None:
        compared = outcome.comparison(objective.label, f"trial {outcome.best}")
        tags[names.PRUNED] = f"after {outcome.pruned_at} of {outcome.examples} examples: {compared}"
    return tags


@contextmanager
def _abandoned_if_superseded(attempt: Attempt, run: Run) -> Iterator[None]:
    """Leave the run to the process that has the trial now, if another one has, however this attempt ended.

    Raises:
        Superseded: in place of what went wrong.
    """
    try:
        yield
    except Exception:
        try:
            attempt.check()
        except Superseded:
            run.abandon()
            raise
        raise


@contextmanager
def _failures_of_trial() -> Iterator[None]:
    """Turn what goes wrong at one point of the space into that trial's failure."""
    try:
        yield
    except Pruned:
        raise
    except Exception as error:
        interrupts.check()
        raise _Failed(one_line(error)) from error
