"""A fine-tuning in MLflow: a run for each expert, with its learning curve; one that was interrupted goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelab.experiment import recording
from mergelab.tracking import names
from mergelab.tracking.store import mlflow_calls
from mergelab.weights.companions import README

if TYPE_CHECKING:
    from mergelab.experiment.locate import LocatedModel, Source
    from mergelab.finetune.expert import Made
    from mergelab.finetune.plan import FinetunePlan, Member
    from mergelab.tracking import Run, Tracker

# What the Trainer calls the points of a learning curve.
_TRAINING = {name: names.training_metric(name) for name in ("loss", "learning_rate", "grad_norm")}
_HELD_OUT = "eval_"

Recorded = Mapping[str, int]


def is_open(tracker: Tracker, experiment: str, key: str) -> bool:
    """Return whether an expert has a run that did not come to its end."""
    known = tracker.runs({names.FINETUNING_KEY: key}, experiment=experiment)
    return bool(known) and known[0].status != "FINISHED"


def open_run(
    tracker: Tracker,
    experiment: str,
    key: str,
    plan: FinetunePlan,
    member: Member,
    source: Source,
    base: LocatedModel,
) -> tuple[Run, Recorded]:
    """Open an expert's run, or again the one that was interrupted.

    Returns:
        The run; and until which step it has each metric of the curve already.
    """
    known = tracker.runs({names.FINETUNING_KEY: key}, experiment=experiment)
    if known and known[0].status != "FINISHED":
        run = tracker.resume_run(known[0].id)
        return run, {name: _last_step(tracker, known[0].id, name) for name in run.recorded}
    task = names.labelled(plan.task.name, mini=source == "mini")
    revision = f"@{base.revision}" if base.revision and "@" not in base.label else ""
    tags = {
        names.KIND: "finetuning",
        names.TASK: plan.task.name,
        names.SOURCE: source,
        names.SEED: member.seed,
        names.FINETUNING_KEY: key,
        names.model("base"): f"{base.label}{revision}",
    }
    recipe = plan.recipe(source)
    params = {
        "task": {"name": plan.task.name},
        "base": base.label,
        "seed": member.seed,
        "shard": f"{member.shard + 1} of {member.shards}",
        "train": recipe["train"],
        **({} if recipe["lora"] is None else {"lora": recipe["lora"]}),
    }
    about = {names.CONFIG_HASH: recording.config_hash(plan.resolved)}
    name = names.finetuning_run(task, base.label, member.name)
    return tracker.start_run(name, experiment=experiment, tags=tags, params=params, about=about), {}


def _last_step(tracker: Tracker, run_id: str, metric: str) -> int:
    with mlflow_calls(f"read the learning curve of run {run_id}"):
        return max(int(point.step) for point in tracker.client.get_metric_history(run_id, metric))


def record_curve(run: Run, before: Recorded, values: Mapping[str, float], step: int) -> None:
    """Record a point of the learning curve that the run does not have yet."""
    found = {name: values[key] for key, name in _TRAINING.items() if key in values}
    found |= {
        names.held_out_metric(key.removeprefix(_HELD_OUT)): value
        for key, value in values.items()
        if key.startswith(_HELD_OUT)
    }
    if fresh := {name: value for name, value in found.items() if step > before.get(name, -1)}:
        run.log_metrics(fresh, step)


def record_expert(run: Run, made: Made, folder: Path, seconds: float | None) -> None:
    """Record which data an expert was trained on, which epoch it is of, what it took where known, and its card."""
    if run.id is None:
        return
    recording.record_inputs(run, _plain(made.plan.resolved), [made.data])
    took = {} if seconds is None else {names.TRAINING_SECONDS: seconds}
    run.log_metrics({names.BEST_EPOCH: made.outcome.epoch, **took})
    run.set_tags({names.model_hash("base"): made.sha256, names.RUN_FOLDER: folder.absolute()})
    run.log_artifact(folder / README)


def _plain(resolved: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in resolved.items() if key != "output"}
