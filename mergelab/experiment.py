"""One experiment: load → merge → evaluate → record."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelab import console, recording
from mergelab.config import ExperimentConfig, check
from mergelab.errors import ConfigError
from mergelab.models.source import LocatedModels, Source, locate
from mergelab.models.source import decide_source as _decide
from mergelab.results import RESULT, ExperimentResult, peak_memory_mb, write_result

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from torch import Tensor

    from mergelab.calibration import Calibration
    from mergelab.measuring import Bench
    from mergelab.methods.registry import MergeMethod
    from mergelab.session import Session
    from mergelab.tasks.data import TaskData
    from mergelab.tasks.spec import TaskSpec
    from mergelab.tracking import Run, Tracker, TrackingConfig

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Plan:
    """An experiment whose every setting has been checked; nothing is loaded yet."""

    config: ExperimentConfig
    resolved: Mapping[str, Any]
    method: MergeMethod
    parameters: Any
    task_name: str
    tasks: tuple[TaskSpec, ...]
    data_dir: str | None
    limit: int | None
    tracking: TrackingConfig

    @property
    def source(self) -> Source:
        """Decide where models and data come from."""
        names = [task.name for task in self.tasks]
        local = self.data_dir is not None or not (self.config.evaluate or self.method.needs)
        return _decide(self.config.source, self.config.models, names, data_is_local=local)


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
        _warn_if_mini(plan, source)
    mini = "mini/" if source == "mini" else ""
    if not sweep:
        console.say(_announcement(plan, mini))
    experiment = parent.experiment if parent else (plan.tracking.experiment or f"{mini}{plan.task_name}")
    with (
        tracker.start_run(
            f"{mini}{plan.task_name} {_told(plan)}",
            experiment=experiment,
            params=plan.resolved,
            tags=_tags(plan, source),
            parent=parent.id if parent else None,
        ) as run,
        console.gathered_warnings(),
        console.progress() as progress,
    ):
        result = _execute(plan, source, tracker, run, progress)
    if result is not None:
        write_result(result, _run_folder() / RESULT)
    if sweep:
        console.say(_job_line(plan, result))
    else:
        if result is not None:
            console.result_table(result)
        if run.id:
            console.say(f"run {run.id}")
            console.say_where(tracker, run.experiment)
    return None if result is None else result.objective


def decide_source(config: DictConfig) -> str:
    """Decide for a whole grid where its models come from, and say so once."""
    plan = plan_experiment(config)
    source = plan.source
    _warn_if_mini(plan, source)
    return source


def plan_experiment(config: DictConfig) -> Plan:
    """Check every setting of ``config``, the method's and the tasks' included, without loading anything.

    Raises:
        ConfigError, DataError: a key, a value or a combination is not usable.
    """
    from omegaconf import OmegaConf

    from mergelab.methods.registry import check_capabilities, method_from_config, resolve_weights
    from mergelab.tasks.spec import tasks_from_config
    from mergelab.tracking import tracking_config

    own = OmegaConf.masked_copy(config, [str(key) for key in config if key not in ("hydra", "experiment")])
    if missing := sorted(OmegaConf.missing_keys(own)):
        raise ConfigError("; ".join(f"{key}: needs a value" for key in missing))
    resolved: Any = OmegaConf.to_container(own, resolve=True)
    checked = check(ExperimentConfig, resolved)
    method, parameters = method_from_config(checked.method)
    check_capabilities(method, has_base=checked.models.base is not None, experts=len(checked.models.experts))
    if method.several and checked.models.head in ("average", "base"):
        raise ConfigError(
            f"method={method.name}: makes one model for each expert, and models.head={checked.models.head} does not "
            "say which of them a task is measured with; models.head=per_task: its own expert's, "
            "models.head=expert:<name>: that one's"
        )
    if "selection" in method.needs and not (checked.evaluate and checked.eval.protocol != "full"):
        raise ConfigError(
            f"method={method.name}: chooses by scores, and with "
            f"{'evaluate=false' if not checked.evaluate else 'eval.protocol=full'} there are no examples that select; "
            "eval.protocol=holdout sets some apart (oracle: the reporting ones, and labelled so)"
        )
    weights = [expert.weight for expert in checked.models.experts.values()]
    resolve_weights(method, parameters, tuple(checked.models.experts), weights)
    suite = tasks_from_config(checked.task)
    if not checked.evaluate and checked.output is None:
        raise ConfigError("evaluate=false: nothing would be made; say where the merged model goes with output=<folder>")
    if checked.output is not None:
        check_output(checked.output)
    return Plan(
        checked,
        resolved,
        method,
        parameters,
        suite.name,
        suite.tasks,
        suite.data_dir,
        suite.limit,
        tracking_config(checked.tracking),
    )


def check_output(output: str) -> None:
    """Check, before any work is done, that a merged model can be written to ``output``.

    Raises:
        ConfigError: it is a file, a folder in use, or inside something that is no folder.
    """
    folder = Path(output).expanduser()
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise ConfigError(f"output={output}: {existing} is a file; a folder that does not exist yet is needed")
    if existing == folder and any(not _is_unfinished(path) for path in folder.iterdir()):
        raise ConfigError(f"output={output}: the folder is not empty; choose another one or remove it")
    if not os.access(existing, os.W_OK):
        raise ConfigError(f"output={output}: {existing} cannot be written to")


def _is_unfinished(path: Path) -> bool:
    """Tell what an interrupted merge of several tasks' models left, from which it goes on."""
    return path.name.startswith(".") and path.name.endswith(".partial")


def _execute(plan: Plan, source: Source, tracker: Tracker, run: Run, progress: Progress) -> ExperimentResult | None:
    """Load, measure the models that are merged, merge, measure the result, and record all of it."""
    from mergelab.measuring import Bench
    from mergelab.merging import Merging
    from mergelab.selection import BenchSelection
    from mergelab.session import Session

    located = locate(plan.config.models, source, [task.name for task in plan.tasks], progress)
    session = Session(located, plan.tasks, plan.config)
    if run.id:  # hashing the weights takes as long as reading them
        run.set_tags(recording.model_tags(located, session))
        run.log_dict(dict(plan.resolved), "config.yaml")
    examples = _calibration(plan, session, progress)
    if not plan.config.evaluate:
        seconds = _merge_to_disk(plan, session, run, progress, examples)
        run.set_tags(recording.calibration_tags(examples))
        recording.log_coefficients(run, examples)
        run.log_metrics({"time/merge_s": seconds, "memory/peak_mb": peak_memory_mb()})
        return None
    bench = Bench(plan.config, session, _load_data(plan, located), progress)
    for data in bench.data.values():
        recording.log_dataset(run, data)
    baselines = bench.baselines()
    if plan.config.eval.preflight:
        bench.preflight(baselines)
    for baseline in baselines:
        recording.record_baseline(tracker, run.experiment, baseline, bench, source)
    selection = BenchSelection(bench) if "selection" in plan.method.needs else None
    merging = Merging(plan.method, plan.parameters, session, progress, selection or examples)
    backbones, seconds = merging.in_memory()
    run.set_tags(recording.calibration_tags(examples) | (selection.tags() if selection else {}))
    recording.log_coefficients(run, examples)
    merged = bench.merged(backbones, f"{plan.method.name} of {len(located.experts)}", baselines)
    merged = replace(merged, merge_seconds=seconds, peak_mb=peak_memory_mb())
    result = ExperimentResult(
        f"{plan.method.name} on {located.name}", _note(plan, bench), tuple(bench.data), (*baselines, merged)
    )
    recording.record_result(run, result, bench)
    _keep(plan, session, backbones, run)
    return result


def _load_data(plan: Plan, located: LocatedModels) -> dict[str, TaskData]:
    from mergelab.tasks.data import load_data

    loaded = {}
    for task in plan.tasks:
        mini = located.mini_data.get(task.name)
        loaded[task.name] = load_data(
            task,
            data_dir=mini or plan.data_dir,
            origin="mini" if mini else None,
            limit=plan.limit,
            seed=plan.config.seed,
        )
    return loaded


def _calibration(plan: Plan, session: Session, progress: Progress) -> Calibration | None:
    """Offer training examples to a method that learns from them."""
    from mergelab.calibration import Calibration

    if "data" not in plan.method.needs:
        return None
    return Calibration(session, plan.method.name, plan.data_dir, progress)


def _merge_to_disk(plan: Plan, session: Session, run: Run, progress: Progress, examples: Calibration | None) -> float:
    """Merge into the output folder; answer the seconds that took."""
    from mergelab.merging import Merging
    from mergelab.tracking.grid import MODEL

    assert plan.config.output is not None
    folder = Path(plan.config.output).expanduser()
    seconds = Merging(plan.method, plan.parameters, session, progress, examples).to_disk(folder, str(plan.data_dir))
    if run.id and plan.tracking.log_model != "none":
        run.log_artifacts(folder, MODEL)
    return seconds


def _keep(plan: Plan, session: Session, backbones: Mapping[str, Mapping[str, Tensor]], run: Run) -> None:
    """Save the merged model where it was asked for: in a folder, or with the run."""
    from mergelab.saving import Saving
    from mergelab.tracking.grid import MODEL

    if plan.config.output is not None:
        Saving(session).save(backbones, Path(plan.config.output).expanduser())
    wanted = plan.tracking.log_model
    if run.id and wanted == "best" and _sweep_dir():
        Saving(session).save(backbones, _run_folder() / MODEL)  # the grid's end knows which one is logged
    elif run.id and wanted != "none":
        with tempfile.TemporaryDirectory() as folder:
            Saving(session).save(backbones, Path(folder) / MODEL)
            run.log_artifacts(Path(folder) / MODEL, MODEL)


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


def _warn_if_mini(plan: Plan, source: str) -> None:
    if source == "mini" and plan.config.source == "auto":
        console.warn(
            "The model hub cannot be reached and its cache does not have these models. This run uses mergelab's "
            "embedded miniature instead: small transformers trained here on generated text. Its scores are not GLUE "
            "scores. source=mini asks for it without this warning, source=hub makes it an error."
        )


def _note(plan: Plan, bench: Bench) -> str:
    """Say what was measured on, and how."""
    parts = []
    for name, data in bench.data.items():
        examples = bench.examples[name]
        label = f"mini/{name} (generated, not GLUE)" if data.origin == "mini" else name
        parts.append(f"{label}: {data.spec.primary} on {len(examples.report)} {data.split} examples")
    protocol = {
        "full": "whole split",
        "holdout": "other examples select than report",
        "oracle": "ORACLE: the same examples select and report",
    }[plan.config.eval.protocol]
    return "\n".join([*parts, f"protocol {plan.config.eval.protocol} ({protocol})"])


def _sweep_dir() -> str | None:
    """Answer the sweep folder of the grid that this job belongs to; ``None`` for a single run."""
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


def _told(plan: Plan) -> str:
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
