"""One experiment: load → merge → evaluate → record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelab.console.progress import gathered_warnings, progress_bar, say, say_where
from mergelab.console.tables import result_table
from mergelab.evaluation.results import RESULT, ExperimentResult, peak_memory_mb, write_result
from mergelab.experiment import recording
from mergelab.experiment.locate import Source, locate
from mergelab.experiment.plan import Plan, plan_experiment, warn_if_mini

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from torch import Tensor

    from mergelab.experiment.session import Session
    from mergelab.tracking import Run, Tracker

Progress = Callable[[str, float], None]


def run_experiment(config: DictConfig) -> float | None:
    """Run the experiment that ``config`` composes and answer its objective: what a sweep would select on.

    Raises:
        MergelabError: something in the configuration, the models or the data is not usable.
    """
    plan = plan_experiment(config)
    from mergelab.tracking import open_tracking

    tracker = open_tracking(plan.tracking)
    sweep = _sweep_dir()
    parent = tracker.grid_parent(sweep) if sweep else None
    source: Any = parent.source if parent else None
    if source is None:
        source = plan.source
        warn_if_mini(plan, source)
    mini = "mini/" if source == "mini" else ""
    if not sweep:
        say(_announcement(plan, mini))
    experiment = parent.experiment if parent else (plan.tracking.experiment or f"{mini}{plan.task_name}")
    with (
        tracker.start_run(
            f"{mini}{plan.task_name} {_describe(plan)}",
            experiment=experiment,
            params=plan.resolved,
            tags=_tags(plan, source),
            parent=parent.id if parent else None,
        ) as run,
        gathered_warnings(),
        progress_bar() as progress,
    ):
        result = _execute(plan, source, tracker, run, progress)
    if result is not None:
        write_result(result, _run_folder() / RESULT)
    if sweep:
        say(_job_line(plan, result))
    else:
        if result is not None:
            result_table(result)
        if run.id:
            say(f"run {run.id}")
            say_where(tracker, run.experiment)
    return None if result is None else result.objective


def decide_source(config: DictConfig) -> str:
    """Decide for a whole grid where its models come from, and say so once."""
    plan = plan_experiment(config)
    source = plan.source
    warn_if_mini(plan, source)
    return source


def _execute(plan: Plan, source: Source, tracker: Tracker, run: Run, progress: Progress) -> ExperimentResult | None:
    """Load, measure the models that are merged, merge, measure the result, and record all of it."""
    from mergelab.experiment.loaded import open_loaded
    from mergelab.experiment.merging import Merging
    from mergelab.experiment.selection import EvaluatorSelection

    if not plan.config.evaluate:
        _merge_to_disk(plan, source, run, progress)
        return None
    loaded = open_loaded(plan, source, progress)
    evaluator, session = loaded.evaluator, loaded.session
    _record_inputs(plan, session, run)
    examples = loaded.calibration(plan, progress)
    for data in evaluator.data.values():
        recording.log_dataset(run, data)
    for baseline in loaded.baselines:
        recording.record_baseline(tracker, run.experiment, baseline, evaluator, source)
    selection = EvaluatorSelection(evaluator) if "selection" in plan.method.needs else None
    merging = Merging(plan.method, plan.parameters, session, plan.config.seed, progress, selection or examples)
    backbones, seconds = merging.in_memory()
    run.set_tags(recording.calibration_tags(examples) | (selection.tags() if selection else {}))
    recording.log_coefficients(run, examples)
    merged = evaluator.merged(backbones, f"{plan.method.name} of {len(session.located.experts)}", loaded.baselines)
    merged = replace(merged, merge_seconds=seconds, peak_mb=peak_memory_mb())
    result = ExperimentResult(
        f"{plan.method.name} on {session.located.name}",
        evaluator.note,
        tuple(evaluator.data),
        (*loaded.baselines, merged),
    )
    recording.record_result(run, result, evaluator)
    _keep(plan, session, backbones, run)
    return result


def _record_inputs(plan: Plan, session: Session, run: Run) -> None:
    if run.id:  # hashing the weights takes as long as reading them
        run.set_tags(recording.model_tags(session.located, session))
        run.log_dict(dict(plan.resolved), "config.yaml")


def _merge_to_disk(plan: Plan, source: Source, run: Run, progress: Progress) -> None:
    """Merge into the output folder, without measuring anything."""
    from mergelab.experiment.calibration import Calibration
    from mergelab.experiment.merging import Merging
    from mergelab.experiment.saving import Saving, merge_key
    from mergelab.experiment.session import open_session
    from mergelab.tracking.grid import MODEL

    located = locate(plan.config.models, source, [task.name for task in plan.tasks if task.path], progress)
    session = open_session(located, plan.tasks, plan.config)
    _record_inputs(plan, session, run)
    needed = "data" in plan.method.needs
    examples = Calibration(session, plan.method.name, plan.data_dir, progress) if needed else None
    assert plan.config.output is not None
    folder = Path(plan.config.output).expanduser()
    merging = Merging(plan.method, plan.parameters, session, plan.config.seed, progress, examples)
    seconds = merging.to_disk(Saving(session, plan.config.save), folder, merge_key(plan, session))
    if run.id and plan.tracking.log_model != "none":
        run.log_artifacts(folder, MODEL)
    run.set_tags(recording.calibration_tags(examples))
    recording.log_coefficients(run, examples)
    run.log_metrics({"time/merge_s": seconds, "memory/peak_mb": peak_memory_mb()})


def _keep(plan: Plan, session: Session, backbones: Mapping[str, Mapping[str, Tensor]], run: Run) -> None:
    """Save the merged model where it was asked for: in a folder, or with the run."""
    from mergelab.experiment.saving import Saving, keep
    from mergelab.tracking.grid import MODEL

    in_grid = run.id is not None and plan.tracking.log_model == "best" and _sweep_dir() is not None
    saving = Saving(session, plan.config.save)
    keep(saving, backbones, run, plan.config.output, log=plan.tracking.log_model != "none" and not in_grid)
    if in_grid:  # the grid's end knows which one is logged
        saving.save(backbones, _run_folder() / MODEL)


def _announcement(plan: Plan, mini: str) -> str:
    """Say in a few lines what is about to happen."""
    models, evaluation = plan.config.models, plan.config.eval
    settings = ", ".join(f"{key}={value}" for key, value in plan.parameters.by_key().items() if value is not None)
    lines = [
        f"merge     {plan.method.name}({settings})",
        f"models    {mini + plan.task_name if mini else models.name}: "
        f"{'base + ' if models.base else ''}{len(models.experts)} experts, head {models.head}",
    ]
    if plan.config.evaluate:
        tasks = ", ".join(f"{mini}{task.name}" for task in plan.tasks)
        lines.append(f"evaluate  {tasks}: protocol {evaluation.protocol}, {evaluation.dtype}")
    if plan.config.output:
        lines.append(f"save      {plan.config.output}")
    return "\n".join(lines)


def _sweep_dir() -> str | None:
    """Return the sweep folder of the grid that this job belongs to; ``None`` for a single run."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    return str(Path(HydraConfig.get().runtime.cwd) / HydraConfig.get().sweep.dir)


def _run_folder() -> Path:
    from hydra.core.hydra_config import HydraConfig

    return Path(HydraConfig.get().runtime.output_dir)


def _job_line(plan: Plan, result: ExperimentResult | None) -> str:
    from hydra.core.hydra_config import HydraConfig

    line = f"job {HydraConfig.get().job.num}: {plan.method.name} on {plan.task_name}"
    if result is None:
        return f"{line}: merged"
    merged = result.merged
    scores = ", ".join(f"{r.task} {r.primary} {r.score.value:.4f}" for r in merged.results.values())
    return f"{line}: {scores} (merge {merged.merge_seconds or 0:.2f} s, evaluation {merged.eval_seconds or 0:.2f} s)"


def _describe(plan: Plan) -> str:
    """Name the method and what the user set of its parameters: ``ties density=0.3``."""
    from hydra.core.hydra_config import HydraConfig

    told = [override.lstrip("+") for override in HydraConfig.get().overrides.task]
    settings = [text.removeprefix("method.") for text in told if text.startswith("method.")]
    return " ".join([plan.method.name, *(text for text in settings if not text.startswith("function="))])


def _tags(plan: Plan, source: str) -> dict[str, Any]:
    from mergelab.tracking.grid import RUN_FOLDER

    return {
        "mergelab.kind": "merge",
        RUN_FOLDER: _run_folder(),
        "mergelab.method": plan.method.name,
        "mergelab.source": source,
        "mergelab.seed": plan.config.seed,
        "mergelab.protocol": plan.config.eval.protocol,
        "mergelab.config_hash": recording.config_hash(plan.resolved),
    }
