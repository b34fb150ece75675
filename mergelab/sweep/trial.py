"""A sweep's job: one trial, measured on the examples that select; or at the end the winner, on those that report."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from mergelab.config import check
from mergelab.console.progress import gathered_warnings, progress_bar
from mergelab.engine.registry import check_parameters, get_method
from mergelab.evaluation.metrics import example_statistics, score, value_of_rows
from mergelab.evaluation.results import ExperimentResult, ModelResult, peak_memory_mb
from mergelab.evaluation.scoring import compare
from mergelab.experiment import recording
from mergelab.experiment.loaded import Backbones, LoadedModels, open_loaded
from mergelab.experiment.plan import Plan, plan_experiment
from mergelab.experiment.saving import Saving, keep
from mergelab.sweep.attempts import Attempt, Superseded, attempting
from mergelab.sweep.config import SweepConfig, TrialJob, sweep_config
from mergelab.sweep.launcher import open_study, open_tracker, worker_context
from mergelab.sweep.objective import objectives
from mergelab.sweep.plan import is_pruned
from mergelab.sweep.pruners import make_pruner
from mergelab.sweep.reporting import Pruned, ScoreReporter
from mergelab.sweep.storage import storage_url
from mergelab.sweep.study import OUTCOME
from mergelab.tracking import PRIMARY, experiment_name
from mergelab.tracking.values import one_line

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from optuna.study import Study

    from mergelab.engine.parameters import Parameters
    from mergelab.experiment.evaluator import Evaluator
    from mergelab.experiment.locate import Source
    from mergelab.tasks.spec import TaskSpec
    from mergelab.tracking import Run, Tracker

Array = np.ndarray[Any, Any]
TRIAL, STUDY = "mergelab.trial", "mergelab.study"


@dataclass(frozen=True)
class TrialOutcome:
    """What a trial found: its objectives' values on ``examples`` selecting examples, or on ``pruned_at`` of them."""

    values: tuple[float, ...]
    examples: int
    pruned_at: int | None
    merge_seconds: float
    eval_seconds: float
    run: str | None

    @classmethod
    def read(cls, written: Mapping[str, Any]) -> TrialOutcome:
        """Read what a trial left in the study's storage."""
        return cls(**{**written, "values": tuple(written["values"])})


@dataclass(frozen=True)
class TrialFailure:
    """Why a trial has no score."""

    error: str


class _Failed(Exception):
    """A trial that could not be merged or measured; others may be."""


@dataclass(frozen=True)
class Report:
    """The winner beside what it is compared with, measured on the reporting examples.

    ``against`` has, by name, the two-sided p-value of the paired test of the winner against each other model.
    """

    result: ExperimentResult
    against: Mapping[str, float]


def run_job(config: DictConfig) -> TrialOutcome | TrialFailure | Report | None:
    """Run the job that ``config``'s ``sweep.job`` names; None where another process has that trial by now.

    Raises:
        MergelabError: the models or the data cannot be used: there is no use in further trials.
    """
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    told: Any = OmegaConf.to_container(config.sweep.job)
    job = check(TrialJob, told, "sweep.job")
    with worker_context(job), gathered_warnings(), progress_bar() as progress:
        plan = plan_experiment(config)
        node: Any = OmegaConf.to_container(HydraConfig.get().sweeper, resolve=True)
        settings = sweep_config(node)
        tracker = open_tracker(plan.tracking, job)
        if job.stage == "report":
            run, _ = _open_run(tracker, plan, job, again=True)
            with run:
                return run_report(plan, job.source, tracker, run, progress)
        storage, study = open_study(storage_url(settings.storage, job.folder), job)
        trial_id = storage.get_trial_id_from_study_id_trial_number(study._study_id, job.number)
        # Before the trial has begun: a process that dies while it loads is not the trial's fault.
        loaded = open_loaded(plan, job.source, progress, keep=True, compiling=settings.compile)
        assert loaded.baselines  # an expert at chance makes every trial worthless
        try:
            with attempting(storage, trial_id, job.attempt) as attempt:
                run, logged = _open_run(tracker, plan, job, again=attempt.again)
                with run, _left_if_superseded(attempt, run):
                    if (known := storage.get_trial(trial_id).user_attrs.get(OUTCOME)) is not None:
                        return TrialOutcome.read(known)
                    outcome, scores = measure_trial(plan, settings, loaded, study, job, attempt, run, progress)
                    _record(run, plan, scores, outcome, logged)
                    storage.set_trial_user_attr(trial_id, OUTCOME, asdict(outcome))
                    return outcome
        except Superseded:
            return None
        except _Failed as failure:
            return TrialFailure(str(failure))


def _open_run(tracker: Tracker, plan: Plan, job: TrialJob, *, again: bool) -> tuple[Run, Collection[str]]:
    """Open the trial's run below the sweep's; ``again``: if there is one already, go on with that.

    Returns:
        The run, and the names of the metrics that it has: its process may have died after it had logged them.
    """
    mini = job.source == "mini"
    identity = {STUDY: job.study, TRIAL: str(job.number), "mergelab.kind": job.stage}
    experiment = experiment_name(plan.tracking, plan.task_name, mini=mini)
    if again and (known := tracker.runs(identity, experiment=experiment)):
        run = tracker.resume_run(known[0].id)
        if not known[0].params:  # its process died between the two
            run.log_params(plan.resolved)
        return run, known[0].metrics.keys()
    name = f"trial {job.number}" if job.stage == "trial" else f"report: trial {job.number}"
    run = tracker.start_run(
        f"{'mini/' if mini else ''}{plan.task_name} {plan.method.name} {name}",
        experiment=experiment,
        params=plan.resolved,
        tags={
            **identity,
            "mergelab.method": plan.method.name,
            "mergelab.source": job.source,
            "mergelab.seed": plan.config.seed,
            "mergelab.protocol": plan.config.eval.protocol,
            "mergelab.config_hash": recording.config_hash(plan.resolved),
        },
        parent=job.parent,
    )
    return run, ()


def measure_trial(
    plan: Plan,
    settings: SweepConfig,
    loaded: LoadedModels,
    study: Study,
    job: TrialJob,
    attempt: Attempt,
    run: Run,
    progress: Any,
) -> tuple[TrialOutcome, Mapping[str, Mapping[str, float]]]:
    """Merge and measure one point of the search space; answer the scores of each task too.

    Raises:
        Superseded: another process has the trial by now.
    """
    if run.id:
        run.log_dict(dict(plan.resolved), "config.yaml")
    loaded.session.average_heads_of([expert.name for expert in loaded.session.located.experts])
    with _failing():
        examples = loaded.calibration(plan, progress)
        backbones, seconds = loaded.merged(plan.method, plan.parameters, examples, progress, _weights(plan))
    run.set_tags({"mergelab.merge_path": loaded.path})
    started = time.perf_counter()
    evaluator, wanted = loaded.evaluator, objectives(settings.objective, settings.direction, plan.tasks)
    primary = {task.name: task.primary for task in plan.tasks}
    pruner = make_pruner(settings.pruner) if is_pruned(settings, plan) else None
    watched = _Watched(evaluator, backbones, f"{plan.method.name} (trial {job.number})")
    count = sum(len(examples.select) for examples in evaluator.examples.values())
    watch = ScoreReporter(
        pruner,
        study,
        job.number,
        np.full(count, np.nan),
        lambda: wanted[0].value(watched.scores(), primary),
    )
    pruned_at = None
    try:
        with _failing():
            watched.measure(watch)
        watch.finish()
    except Pruned:
        pruned_at = watch.done
    attempt.check()
    scores = watched.scores()
    values = tuple(objective.value(scores, primary) for objective in wanted)
    outcome = TrialOutcome(values, count, pruned_at, seconds, time.perf_counter() - started, run.id)
    return outcome, scores


@contextmanager
def _left_if_superseded(attempt: Attempt, run: Run) -> Iterator[None]:
    """Leave the run alone, however this process's attempt ended, where another one has the trial by now.

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
def _failing() -> Iterator[None]:
    """Turn what goes wrong with one point into that trial's failure."""
    try:
        yield
    except Pruned:
        raise
    except Exception as error:
        raise _Failed(one_line(error)) from error


def run_report(plan: Plan, source: Source, tracker: Tracker, run: Run, progress: Any) -> Report:
    """Measure the winner, the uniform soup and the paper's defaults on all examples, those that report included.

    The winner is saved where that was asked for.
    """
    loaded = open_loaded(plan, source, progress, keep=True)
    evaluator, experts = loaded.evaluator, len(loaded.session.located.experts)
    if run.id:
        run.set_tags(recording.model_tags(loaded.session.located, loaded.session))
    for data in evaluator.data.values():
        recording.log_dataset(run, data)
    for baseline in loaded.baselines:
        recording.record_baseline(tracker, run.experiment, baseline, evaluator, source)
    examples = loaded.calibration(plan, progress)
    own, uniform = _weights(plan), [1.0] * experts
    others: list[tuple[str, Any, Parameters]] = [
        (f"soup of {experts}", get_method("soup"), check_parameters(get_method("soup"), {}))
    ]
    has_defaults = not any(field.is_required() for field in plan.method.parameters.model_fields.values())
    if plan.method.name != "soup" and has_defaults:
        others.append((f"{plan.method.name}, defaults", plan.method, check_parameters(plan.method, {})))
    measured = [
        _reported(loaded, label, method, parameters, None if method.name == "soup" else examples, progress, uniform)
        for label, method, parameters in others
    ]
    winner = _reported(loaded, f"best {plan.method.name}", plan.method, plan.parameters, examples, progress, own)
    _save(plan, loaded, run, examples, progress)
    recording.log_coefficients(run, examples)
    title = f"sweep of {plan.method.name} on {loaded.session.located.name}"
    result = ExperimentResult(title, evaluator.note, tuple(evaluator.data), (*loaded.baselines, *measured, winner))
    against = _against(evaluator, winner, [m for m in loaded.baselines if m.role == "expert"], measured)
    recording.record_result(run, result, evaluator)
    run.log_metrics({f"report/p_vs_{name}": p for name, p in against.items() if name != "best_expert"})
    return Report(replace(result, models=tuple(replace(m, predictions={}) for m in result.models)), against)


def _reported(
    loaded: LoadedModels,
    label: str,
    method: Any,
    parameters: Parameters,
    examples: Any,
    progress: Any,
    weights: Sequence[float],
) -> ModelResult:
    backbones, seconds = loaded.merged(method, parameters, examples, progress, weights)
    found = loaded.evaluator.merged(backbones, label, loaded.baselines)
    return replace(found, merge_seconds=seconds, peak_mb=peak_memory_mb())


def _weights(plan: Plan) -> list[float]:
    return [expert.weight for expert in plan.config.models.experts.values()]


def _save(plan: Plan, loaded: LoadedModels, run: Run, examples: Any, progress: Any) -> None:
    """Write the winner where it was asked for: in a folder, or with the run."""
    if plan.config.output is None and (run.id is None or plan.tracking.log_model == "none"):
        return
    backbones, _ = loaded.merged(plan.method, plan.parameters, examples, progress, _weights(plan))
    keep(Saving(loaded.session), backbones, run, plan.config.output, log=plan.tracking.log_model != "none")


def _against(
    evaluator: Evaluator, winner: ModelResult, experts: Sequence[ModelResult], others: Sequence[ModelResult]
) -> dict[str, float]:
    """Test the winner against the best expert and against each other merge; of a suite nothing is tested."""
    if len(evaluator.data) > 1:
        return {}
    name, data = next(iter(evaluator.data.items()))
    tested = dict(zip(("soup", "defaults"), others, strict=False))
    found = {} if winner.p_value is None else {"best_expert": winner.p_value}
    for what, other in tested.items():
        own, theirs = winner.predictions[name].outputs, other.predictions[name].outputs
        found[what] = compare(data, own, theirs, evaluator.examples[name], evaluator.config.eval, evaluator.config.seed)
    return found


class _Watched:
    """One merged model's outputs on the selecting examples, as they come."""

    def __init__(self, evaluator: Evaluator, backbones: Backbones, label: str) -> None:
        self.evaluator, self.backbones, self.label = evaluator, backbones, label
        self._batches: dict[str, list[tuple[Array, Array]]] = {name: [] for name in evaluator.data}

    def measure(self, watch: ScoreReporter) -> None:
        """Predict task by task and tell ``watch`` of every batch."""
        first = 0
        for name, data in self.evaluator.data.items():
            select = self.evaluator.examples[name].select
            self.evaluator.session.predict(
                data,
                partial(self.backbones.__getitem__, name),
                self.evaluator.session.heads[name],
                self.label,
                progress=self.evaluator.progress,
                members=select,
                watch=partial(self._see, watch, name, first),
                seed=self.evaluator.config.seed,
            )
            first += len(select)

    def _see(self, watch: ScoreReporter, name: str, first: int, members: Array, outputs: Array) -> None:
        data, select = self.evaluator.data[name], self.evaluator.examples[name].select
        self._batches[name].append((members, outputs))
        watch.report(first + members, example_scores(data.spec, outputs, data.truth[select[members]]))

    def scores(self) -> dict[str, dict[str, float]]:
        """Score what has been predicted so far."""
        found = {}
        for name, batches in self._batches.items():
            if batches:
                data = self.evaluator.data[name]
                seen = self.evaluator.examples[name].select[np.concatenate([members for members, _ in batches])]
                outputs = np.concatenate([outputs for _, outputs in batches])
                found[name] = score(data.spec, outputs, data.truth[seen], parts=data.parts[seen])
        return found


def example_scores(spec: TaskSpec, outputs: Array, truth: Array) -> Array:
    """Score single examples (n,), the better the higher.

    Right or wrong for classification, the negative squared error for regression, the primary metric of each text
    alone for the others.
    """
    if spec.kind == "regression":
        return np.asarray(-((outputs[:, 0].astype(np.float64) - truth) ** 2))
    if spec.kind == "classification":
        return np.asarray(outputs.argmax(axis=1) == truth, dtype=np.float64)
    rows = example_statistics(spec, outputs, truth)[spec.primary]
    sign = -1.0 if spec.direction == "minimize" else 1.0
    return np.array([sign * value_of_rows(spec, spec.primary, row[None]) for row in rows])


def _record(
    run: Run,
    plan: Plan,
    scores: Mapping[str, Mapping[str, float]],
    outcome: TrialOutcome,
    logged: Collection[str],
) -> None:
    """Log what was measured, but for metrics that are ``logged``: MLflow would keep both values."""
    metrics: dict[str, float] = {}
    for name, values in scores.items():
        below = f"{name}/" if len(plan.tasks) > 1 else ""
        metrics |= {f"select/{below}{metric}": value for metric, value in values.items()}
    if len(plan.tasks) > 1:
        metrics["select/average"] = outcome.values[0]
    metrics |= {
        "select/examples": outcome.pruned_at or outcome.examples,
        "time/merge_s": outcome.merge_seconds,
        "time/eval_s": outcome.eval_seconds,
        "memory/peak_mb": peak_memory_mb(),
    }
    run.log_metrics({name: value for name, value in metrics.items() if name not in logged})
    tags: dict[str, Any] = {
        PRIMARY: "select/average" if len(plan.tasks) > 1 else f"select/{plan.tasks[0].primary}",
        "mergelab.task": ",".join(task.name for task in plan.tasks),
    }
    if outcome.pruned_at is not None:
        tags["mergelab.pruned"] = f"after {outcome.pruned_at} of {outcome.examples} examples"
    run.set_tags(tags)
