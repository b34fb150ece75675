"""One analysis: plan → locate and open → go through the task vectors → measure between models → record."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelab.analyze.plan import BASE, KEY, AnalysisPlan, plan_analysis
from mergelab.analyze.result import Analysis, rows, write_json, write_parquet
from mergelab.analyze.tables import print_analysis
from mergelab.console.progress import gathered_warnings, progress_bar, say, say_where
from mergelab.experiment import recording
from mergelab.experiment.plan import warn_if_mini
from mergelab.tracking import names

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from mergelab.analyze.measures import Sums
    from mergelab.analyze.paths import Path as MeasuredPath
    from mergelab.experiment.evaluator import Evaluator
    from mergelab.experiment.locate import Source
    from mergelab.experiment.session import Session
    from mergelab.tracking import Run, Tracker

Progress = Callable[[str, float], None]


def run_analysis(config: DictConfig) -> Analysis:
    """Run the analysis that ``config`` composes, print it, and record it in files and in a run of its own.

    Raises:
        MergelabError: something in the configuration, the models or the data is not usable.
    """
    from hydra.core.hydra_config import HydraConfig

    from mergelab.tracking import open_tracking

    analysis = plan_analysis(config)
    plan, folder = analysis.experiment, Path(HydraConfig.get().runtime.output_dir)
    tracker, source = open_tracking(plan.tracking), analysis.source
    warn_if_mini(plan.config.source, source)
    say(_announcement(analysis, source))
    with _open_run(tracker, analysis, source, folder) as run, gathered_warnings(), progress_bar() as progress:
        found = _analysed(analysis, source, run, progress)
        _write(found, folder, run)
        _record(found, run)
    print_analysis(found)
    say(f"page {folder / names.ANALYSIS_PAGE}", to_copy=True)
    if run.id:
        say(f"run {run.id}")
        say_where(tracker, run.experiment)
    return found


def _announcement(analysis: AnalysisPlan, source: str) -> str:
    plan, settings = analysis.experiment, analysis.settings
    mini = source == "mini"
    models = names.labelled(plan.task_name, mini=True) if mini else plan.config.models.name
    tasks = ", ".join(names.labelled(task.name, mini=mini) for task in plan.tasks)
    lines = [f"analyze   {models}: base + {len(plan.config.models.experts)} experts, density {settings.density:g}"]
    if settings.line is not None:
        lines.append(f"line      {' – '.join(settings.line)} on {tasks}, {settings.points} points")
    if settings.plane is not None:
        lines.append(f"plane     {' – '.join(settings.plane)} on {tasks}, {settings.points}² points")
    return "\n".join(lines)


def _open_run(tracker: Tracker, analysis: AnalysisPlan, source: Source, folder: Path) -> Run:
    plan = analysis.experiment
    mini = source == "mini"
    models = names.labelled(plan.task_name, mini=True) if mini else plan.config.models.name
    used = {key: value for key, value in plan.resolved.items() if key in ("models", "seed")}
    used |= {key: plan.resolved[key] for key in ("task", "eval") if analysis.measures}
    tags = {names.METHOD: None, names.RUN_FOLDER: folder}
    if not analysis.measures:
        tags |= {names.TASK: None, names.PROTOCOL: None}
    return recording.open_run(
        tracker,
        "analysis",
        plan,
        source,
        names.analysis_run(models),
        params=used | {KEY: analysis.settings.model_dump()},
        tags=tags,
    )


# ------------------------------------------------------------------------------------------------------- what it finds


def _analysed(analysis: AnalysisPlan, source: Source, run: Run, progress: Progress) -> Analysis:
    from mergelab.analyze.measures import task_vector_sums
    from mergelab.analyze.ranks import matrix_ranks

    plan, settings = analysis.experiment, analysis.settings
    evaluator, session = _opened(analysis, source, progress)
    recording.record_models(run, session)
    recording.record_inputs(run, plan.resolved, () if evaluator is None else evaluator.data.values())
    aligned, located = session.opened.aligned, session.located
    tensors = task_vector_sums(aligned, settings.density, progress)
    assert located.base is not None
    return Analysis(
        models=located.name,
        base=located.base.label,
        experts=tuple(expert.name for expert in located.experts),
        labels=tuple(expert.label for expert in located.experts),
        density=settings.density,
        note=_note(session, evaluator),
        tensors=tuple(tensors),
        ranks=tuple(matrix_ranks(aligned, progress)) if settings.rank else None,
        line=_line(analysis, evaluator),
        plane=_plane(analysis, evaluator, tensors),
    )


def _opened(analysis: AnalysisPlan, source: Source, progress: Progress) -> tuple[Evaluator | None, Session]:
    """Open the models, with the task's examples only where something is measured."""
    from mergelab.experiment.loaded import open_loaded
    from mergelab.experiment.locate import locate
    from mergelab.experiment.session import open_session

    plan = analysis.experiment
    if analysis.measures:
        loaded = open_loaded(plan, source, progress)
        return loaded.evaluator, loaded.session
    located = locate(plan.config.models, source, [task.name for task in plan.tasks if task.path], progress)
    return None, open_session(located, plan.tasks, plan.config)


def _note(session: Session, evaluator: Evaluator | None) -> str:
    """Say which tensors count, and what models are measured on."""
    opened, located = session.opened, session.located
    mini = "embedded miniature; " if located.source == "mini" else ""
    skipped = len(opened.head_names) + len(opened.passed_through)
    left_out = f"; {skipped} tensors of heads and others that are not merged are left out" if skipped else ""
    note = f"{mini}base {located.base.label if located.base else ''}; {len(opened.aligned.names)} tensors{left_out}"
    return note if evaluator is None else f"{note}\n{evaluator.note}"


def _line(analysis: AnalysisPlan, evaluator: Evaluator | None) -> MeasuredPath | None:
    from mergelab.analyze.paths import measure_line

    if evaluator is None or analysis.settings.line is None:
        return None
    return measure_line(evaluator, analysis.settings.line, analysis.settings.points)


def _plane(analysis: AnalysisPlan, evaluator: Evaluator | None, tensors: Any) -> MeasuredPath | None:
    from mergelab.analyze.measures import whole
    from mergelab.analyze.paths import measure_plane

    settings = analysis.settings
    if evaluator is None or settings.plane is None:
        return None
    experts = [expert.name for expert in evaluator.session.located.experts]
    sums = whole(tensors, len(experts))

    def inner(one: str, other: str) -> float:
        return 0.0 if BASE in (one, other) else float(sums.products[experts.index(one), experts.index(other)])

    products = [[inner(one, other) for other in settings.plane] for one in settings.plane]
    return measure_plane(evaluator, settings.plane, products, settings.points, settings.margin)


# ----------------------------------------------------------------------------------------------------- what it leaves


def _write(found: Analysis, folder: Path, run: Run) -> None:
    """Write the page, the picture and the figures into the run's folder, and log them."""
    from mergelab.analyze.page import write_page, write_picture

    write_json(found, folder / names.ANALYSIS_JSON)
    write_parquet(found, folder / names.ANALYSIS_TABLE)
    write_page(found, folder / names.ANALYSIS_PAGE, _command())
    write_picture(found, folder / names.ANALYSIS_PICTURE)
    for name in (names.ANALYSIS_JSON, names.ANALYSIS_TABLE, names.ANALYSIS_PAGE, names.ANALYSIS_PICTURE):
        run.log_artifact(folder / name, names.ANALYSIS)


def _command() -> str:
    """Return the command that makes the same analysis; what was typed is without passwords."""
    import shlex

    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from mergelab.tracking.secrets import without_password

    typed: Any = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    return without_password(" ".join(["python -m mergelab.analyze", *(shlex.quote(str(each)) for each in typed)]))


def _record(found: Analysis, run: Run) -> None:
    """Log the figures of the whole task vectors as metrics."""
    whole: Sums = found.whole
    metrics = {
        names.analysis_metric(*filter(None, (row["quantity"], row["expert"], row["other"]))): row["value"]
        for row in rows(found)
        if row["scope"] == "model" and row["value"] is not None
    }
    run.log_metrics(metrics)
    run.set_tags({names.NOTE: f"{found.note}; {whole.entries} entries"})
