"""One experiment: plan → locate and open → merge → evaluate → record → save."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelab.config import local_path
from mergelab.console.progress import gathered_warnings, progress_bar, say, say_where
from mergelab.console.tables import result_table
from mergelab.evaluation.results import RESULT, ExperimentResult, ModelResult, peak_memory_mb, write_result
from mergelab.experiment import described, messages, recording
from mergelab.experiment.cards import Cards
from mergelab.experiment.keeping import Write, check_push, keep, log, push, say_written
from mergelab.experiment.logged import Measured, measure_merged, with_logged
from mergelab.experiment.plan import Plan, plan_experiment, warn_if_mini
from mergelab.experiment.staged import made_stages, with_stages
from mergelab.tracking import names

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from mergelab.experiment.adapter_output import AdapterOutput
    from mergelab.experiment.locate import Source
    from mergelab.experiment.saving import Saving
    from mergelab.experiment.session import Session
    from mergelab.tracking import GridParent, Run, Tracker

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class FinishedExperiment:
    """An experiment that has run.

    Attributes:
        result: what was measured; None where nothing was.
        run: the id of its run; None where it is not tracked.
        experiment: the name of the MLflow experiment.
        folder: its own.
        output: where the merged model is; None where it was not asked for.
    """

    result: ExperimentResult | None
    run: str | None
    experiment: str
    folder: Path
    output: Path | None


def run_experiment(config: DictConfig) -> float | None:
    """Run the experiment that ``config`` composes and return its objective: what a sweep would select on.

    Raises:
        MergelabError: something in the configuration, the models or the data is not usable.
    """
    result = finish_experiment(config).result
    return None if result is None else result.objective


def finish_experiment(config: DictConfig, above: GridParent | None = None) -> FinishedExperiment:
    """Run the experiment that ``config`` composes, show and record its result, and return it.

    Args:
        config: the composed configuration.
        above: the run that its own is shown under; None: that of the grid, where it is a grid's job.

    Raises:
        MergelabError: something in the configuration, the models or the data is not usable.
    """
    plan = plan_experiment(config)
    from mergelab.tracking import open_tracking

    grid = _grid_folder()
    if plan.config.models.stages:
        with made_stages(plan, merge_stage) as (folders, stages_run):
            return finish_experiment(with_stages(plan, folders), None if grid else stages_run)
    tracker = open_tracking(plan.tracking)
    parent = tracker.grid_parent(grid) if grid else above
    source = _source(plan, parent)
    check_push(plan, source)
    if not grid:
        say(messages.announcement(plan, source))
    with (
        _open_run(tracker, plan, source, parent) as run,
        gathered_warnings(),
        progress_bar() as progress,
    ):
        result = None
        if plan.config.evaluate:
            result = _merge_and_evaluate(plan, source, tracker, run, progress)
        else:
            _merge_to_disk(plan, source, tracker, run, progress)
    if result is not None:
        write_result(result, _run_folder() / RESULT)
    if grid:
        say(messages.job_line(plan, result))
    else:
        if result is not None:
            result_table(result)
        if run.id:
            say(f"run {run.id}")
            view = None if result is None else recording.save_views(tracker, run.experiment, result)
            say_where(tracker, run.experiment, view)
    output = None if plan.config.output is None else local_path(plan.config.output, "output").absolute()
    return FinishedExperiment(result, run.id, run.experiment, _run_folder(), output)


def merge_stage(config: DictConfig, above: GridParent | None) -> str | None:
    """Merge a stage as ``config`` says, and return its run."""
    return finish_experiment(config, above).run


def decide_source(config: DictConfig) -> str | None:
    """Decide for the jobs of a grid where their models come from, and say so once; None where each makes its own."""
    plan = plan_experiment(config)
    return None if plan.config.models.stages else _source(plan, None)


def _source(plan: Plan, parent: GridParent | None) -> Source:
    """Return where models and data come from: what the grid has decided, or else what the plan says."""
    decided: Any = None if parent is None else parent.source
    source: Source = decided or plan.source
    if decided is None:
        warn_if_mini(plan.config.source, source)
    return source


def _open_run(tracker: Tracker, plan: Plan, source: Source, parent: GridParent | None) -> Run:
    task = names.labelled(plan.task_name, mini=source == "mini")
    return recording.open_run(
        tracker,
        "merge",
        plan,
        source,
        names.merge_run(task, messages.method_and_settings(plan)),
        experiment=parent.experiment if parent else None,
        parent=parent.id if parent else None,
        tags={names.RUN_FOLDER: _run_folder()},
    )


def _merge_and_evaluate(plan: Plan, source: Source, tracker: Tracker, run: Run, progress: Progress) -> ExperimentResult:
    """Open, evaluate the models that are merged, merge, evaluate the result, record and save it."""
    from mergelab.experiment.adapter_output import AdapterOutput, base_reference
    from mergelab.experiment.loaded import open_loaded
    from mergelab.experiment.merging import Merging
    from mergelab.experiment.saving import Saving
    from mergelab.experiment.selection import EvaluatorSelection

    loaded = open_loaded(plan, source, progress)
    evaluator, session = loaded.evaluator, loaded.session
    examples = loaded.calibration(plan, progress)
    selection = EvaluatorSelection(evaluator) if "selection" in plan.method.needs else None
    merging = Merging(plan.method, plan.parameters, session, plan.config.seed, progress, selection or examples)
    merging.check()
    adapter = None if plan.config.save.form == "dense" else AdapterOutput(merging, plan.config.save)
    model_tags = recording.record_models(run, session)
    recording.record_inputs(run, plan.resolved, evaluator.data.values())

    baselines = tuple(with_logged(Measured(model, session)) for model in loaded.baselines)
    for baseline in baselines:
        recording.record_baseline(tracker, run.experiment, plan, source, baseline, evaluator)

    backbones, seconds = merging.in_memory() if adapter is None else adapter.in_memory()
    run.set_tags(recording.calibration_tags(examples) | (selection.tags() if selection else {}))
    recording.log_coefficients(run, examples)

    label = f"{plan.method.name} of {len(session.located.experts)}"
    merged = measure_merged(evaluator, backbones, label, baselines, seconds)

    title = f"{plan.method.name} on {session.located.name}"
    result = ExperimentResult(title, evaluator.note, tuple(evaluator.data), (*baselines, merged))
    recording.record_result(run, result, evaluator, command=described.typed_command())
    cards = Cards(plan, session.located, run, tracker, model_tags, result, evaluator, opened=session.opened)
    saving = Saving(session, plan.config.save, cards)
    save: Write = partial(saving.save, backbones)
    in_grid = plan.tracking.log_model == "best" and _grid_folder() is not None
    aside = _run_folder() / names.MODEL if in_grid else None
    if adapter is None:
        keep(plan, tracker, run, save, written=partial(say_written, saving, cards), put_aside=aside)
    else:
        reference, revision = base_reference(plan, source, session.located)
        write = partial(adapter.write, reference=reference, revision=revision, documents=cards)
        save = partial(Saving(session, plan.config.save, replace(cards, whole=True)).save, backbones)
        keep(plan, tracker, run, write, whole=save, put_aside=aside)
    return result


def _merge_to_disk(plan: Plan, source: Source, tracker: Tracker, run: Run, progress: Progress) -> None:
    """Open the models and merge them into the output folder, without evaluating anything."""
    if plan.config.save.form == "module_average":
        return _average_modules(plan, tracker, run)
    from mergelab.experiment.calibration import Calibration
    from mergelab.experiment.locate import locate
    from mergelab.experiment.merging import Merging
    from mergelab.experiment.saving import Saving, merge_key
    from mergelab.experiment.session import open_session

    located = locate(plan.config.models, source, [task.name for task in plan.tasks if task.path], progress)
    session = open_session(located, plan.tasks, plan.config, module_names=bool(plan.method.needs))
    cards = Cards(plan, located, run, tracker, recording.record_models(run, session), opened=session.opened)
    recording.record_inputs(run, plan.resolved, ())

    needed = "data" in plan.method.needs
    examples = Calibration(session, plan.method.name, plan.data_dir, progress) if needed else None
    assert plan.config.output is not None
    folder = local_path(plan.config.output, "output")
    merging = Merging(plan.method, plan.parameters, session, plan.config.seed, progress, examples)
    merging.check()
    saving, whole = Saving(session, plan.config.save, cards), None
    if plan.config.save.form == "dense":
        seconds = merging.to_disk(saving, folder, merge_key(plan, session))
        say_written(saving, cards)
    else:
        from mergelab.experiment.adapter_output import AdapterOutput, base_reference

        adapter = AdapterOutput(merging, plan.config.save)
        seconds = adapter.write(folder, *base_reference(plan, source, located), cards)
        whole = partial(_save_whole, adapter, Saving(session, plan.config.save, replace(cards, whole=True)))

    run.set_tags(recording.calibration_tags(examples))
    recording.log_coefficients(run, examples)
    _record_written(plan, run, session, seconds)
    _keep_written(plan, tracker, run, folder, whole)


def _average_modules(plan: Plan, tracker: Tracker, run: Run) -> None:
    """Average adapters that are modules beside the base's weights into the output folder."""
    from mergelab.experiment.module_average import ModuleAverage

    average = ModuleAverage(plan.config.models)
    tags = average.tags() if run.id is not None else {}
    run.set_tags(tags)
    recording.record_inputs(run, plan.resolved, ())
    assert plan.config.output is not None
    folder = local_path(plan.config.output, "output")
    seconds = average.write(folder, plan.parameters, Cards(plan, None, run, tracker, tags))
    _record_written(plan, run, None, seconds)
    _keep_written(plan, tracker, run, folder, None)


def _save_whole(adapter: AdapterOutput, saving: Saving, folder: Path) -> None:
    """Write the base with an adapter in it."""
    backbones, _ = adapter.in_memory()
    saving.save(backbones, folder)


def _keep_written(plan: Plan, tracker: Tracker, run: Run, folder: Path, whole: Write | None) -> None:
    """Push and log what has been written, where that is asked for; MLflow logs ``whole`` in its place."""
    if plan.config.save.push_to_hub is not None:
        push(plan, folder)
    if run.id is None or plan.tracking.log_model == "none":
        return
    with tempfile.TemporaryDirectory() as temporary:
        if whole is not None:
            folder = Path(temporary) / names.MODEL
            whole(folder)
        log(plan, tracker, run, folder)


def _record_written(plan: Plan, run: Run, session: Session | None, seconds: float) -> None:
    """Record a merge that was written without being measured."""
    models = plan.config.models.name if session is None else session.located.name
    label = f"{plan.method.name} of {len(plan.config.models.experts)}"
    merged = ModelResult(label, "merged", {}, merge_seconds=seconds, peak_mb=peak_memory_mb())
    merged = with_logged(Measured(merged, session))
    result = ExperimentResult(f"{plan.method.name} on {models}", "", (), (merged,))
    recording.record_result(run, result, command=described.typed_command())


def _grid_folder() -> str | None:
    """Return the folder of the grid that this job belongs to; ``None`` for a single run."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    return str(Path(HydraConfig.get().runtime.cwd) / HydraConfig.get().sweep.dir)


def _run_folder() -> Path:
    from hydra.core.hydra_config import HydraConfig

    return Path(HydraConfig.get().runtime.output_dir)
