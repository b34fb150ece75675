"""What an experiment says of itself: before it begins, of a grid's job in one line, and as the name of its run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mergelab.tracking import names

if TYPE_CHECKING:
    from mergelab.evaluation.results import ExperimentResult
    from mergelab.experiment.plan import Plan


def announcement(plan: Plan, source: str) -> str:
    """Say in a few lines what is about to happen."""
    models, evaluation, mini = plan.config.models, plan.config.eval, source == "mini"
    settings = ", ".join(f"{key}={value}" for key, value in plan.parameters.by_key().items() if value is not None)
    lines = [
        f"merge     {plan.method.name}({settings})",
        f"models    {names.labelled(plan.task_name, mini=True) if mini else models.name}: "
        f"{'base + ' if models.base else ''}{len(models.experts)} experts, head {models.head}",
    ]
    if plan.config.evaluate:
        tasks = ", ".join(names.labelled(task.name, mini=mini) for task in plan.tasks)
        engine = "" if evaluation.engine == "transformers" else f", {evaluation.engine}"
        lines.append(f"evaluate  {tasks}: protocol {evaluation.protocol}, {evaluation.dtype}{engine}")
    if plan.config.output:
        lines.append(f"save      {plan.config.output}")
    return "\n".join(lines)


def job_line(plan: Plan, result: ExperimentResult | None) -> str:
    """Say in one line what a grid's job found; without a result, that it has merged."""
    from hydra.core.hydra_config import HydraConfig

    line = f"job {HydraConfig.get().job.num}: {plan.method.name} on {plan.task_name}"
    if result is None:
        return f"{line}: merged"
    merged = result.merged
    scores = ", ".join(f"{r.task} {r.primary} {r.score.value:.4f}" for r in merged.results.values())
    return f"{line}: {scores} (merge {merged.merge_seconds or 0:.2f} s, evaluation {merged.eval_seconds or 0:.2f} s)"


def method_and_settings(plan: Plan) -> str:
    """Name the method and the parameters that the user set: ``ties density=0.3``."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    typed: Any = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    overrides = [override.lstrip("+") for override in typed]
    settings = [text.removeprefix("method.") for text in overrides if text.startswith("method.")]
    return " ".join([plan.method.name, *(text for text in settings if not text.startswith("function="))])
