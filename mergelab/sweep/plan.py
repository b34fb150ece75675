"""The plan of a sweep: every setting checked, its search space too, nothing loaded yet."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mergelab.console.progress import warn
from mergelab.errors import SweepError
from mergelab.experiment.plan import Plan, plan_experiment, warn_if_mini
from mergelab.sweep.adaptive.goals import goals_of, not_estimated
from mergelab.sweep.budget import budget_of
from mergelab.sweep.config import Evaluation, SweepConfig, check_own_keys, sweep_config
from mergelab.sweep.objective import Objective, objectives
from mergelab.sweep.pruners import DEFAULT, make_pruner, pruner_name
from mergelab.sweep.reporting import compares_examples
from mergelab.sweep.samplers import make_sampler, sampler_name
from mergelab.sweep.space import Space, described, space_from
from mergelab.sweep.storage import storage_url
from mergelab.sweep.study import EVALUATION
from mergelab.sweep.targets import is_mean_of_scores

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from mergelab.experiment.locate import Source

FALLBACK: Evaluation = "pruned"  # where trials cannot be measured adaptively


@dataclass(frozen=True)
class Sweep:
    """A sweep whose every setting has been checked."""

    config: DictConfig
    settings: SweepConfig
    space: Space
    plan: Plan  # of the space's lowest corner
    objectives: tuple[Objective, ...]
    source: Source
    name: str
    url: str
    overrides: tuple[str, ...]  # those of the command line

    @property
    def trials(self) -> int:
        """The number of trials in total."""
        if sampler_name(self.settings.sampler) == "grid":
            return min(self.settings.n_trials, self.space.grid_size())
        return self.settings.n_trials


def plan_sweep(node: Mapping[str, Any], config: DictConfig, loader: Any, overrides: Sequence[str]) -> Sweep:
    """Check a sweep's settings, and that every edge of its space is a possible experiment."""
    check_own_keys(config)
    settings = sweep_config(node)
    space = space_from(settings.params or {}, overrides, loader)
    plans = [plan_experiment(loader.load_sweep_config(config, space.overrides(edge))) for edge in space.edges()]
    plan = plans[0]
    if not plan.config.evaluate:
        raise SweepError("evaluate=false: a sweep selects by scores; remove it")
    if plan.config.save.form == "lora_svd":
        raise SweepError(
            "save.form=lora_svd: a sweep measures the merges themselves, not what a rank keeps of them; write the best "
            "one with a run of its own"
        )
    if plan.config.eval.protocol == "full":
        raise SweepError(
            "eval.protocol=full: what a sweep selects on must not be what it reports; eval.protocol=holdout sets "
            "examples apart (oracle: the same ones, and labelled so)"
        )
    if "selection" in plan.method.needs:
        raise SweepError(f"method={plan.method.name}: chooses by the selecting examples itself; it cannot be swept")
    wanted = objectives(settings.objective, settings.direction, plan.tasks)
    make_sampler(settings.sampler, space, seed=0, number=0, objectives=len(wanted), parallel=False)
    _check_pruner(settings, len(wanted))
    budget_of(settings.budget)
    if settings.evaluation == "adaptive" and (reason := not_adaptive(settings, plan)) is not None:
        warn(f"sweep.evaluation=adaptive: {reason}; trials are measured as with sweep.evaluation={FALLBACK}")
    settings = fitted(settings, plan)
    settings = with_usable_points(settings, space, len(plan.config.models.experts))
    source = plan.source
    warn_if_mini(plan.config.source, source)
    url = storage_url(settings.storage, str(config.hydra.runtime.cwd))
    name = settings.study_name or ""
    sweep = Sweep(config, settings, space, plan, tuple(wanted), source, name, url, tuple(overrides))
    return sweep if sweep.name else replace(sweep, name=_default_name(sweep))


def _check_pruner(settings: SweepConfig, objectives: int) -> None:
    if settings.pruner is None:
        return
    name, pruner = pruner_name(settings.pruner), make_pruner(settings.pruner)
    if pruner is not None and objectives > 1 and settings.pruner != "futility":
        raise SweepError(f"sweep.pruner={settings.pruner}: trials are pruned by one objective, there are {objectives}")
    if settings.evaluation in ("full", "adaptive") and name not in ("futility", "none"):
        raise SweepError(
            f"sweep.pruner={name}: only sweep.evaluation=pruned asks a pruner, not "
            f"sweep.evaluation={settings.evaluation}; remove one of them"
        )


def is_pruned(settings: SweepConfig, plan: Plan) -> bool:
    """Return whether trials are pruned."""
    wanted = settings.evaluation == "pruned" and pruner_name(settings.pruner) != "none"
    return wanted and not_pruned(settings, plan) is None


def not_pruned(settings: SweepConfig, plan: Plan) -> str | None:
    """Say why a pruner cannot prune trials; None where it can."""
    if any(task.kind == "lm_eval" for task in plan.tasks):
        return "lm-eval measures all examples at once"
    wanted = objectives(settings.objective, settings.direction, plan.tasks)
    if len(wanted) > 1:
        return "that takes one objective"
    if (name := pruner_name(settings.pruner)) == DEFAULT:
        return None
    if len(plan.tasks) > 1:
        return f"the pruner {name} takes one task, {DEFAULT} several"
    pruner, metric = make_pruner(settings.pruner), wanted[0].metric
    if pruner is not None and compares_examples(pruner) and not is_mean_of_scores(plan.tasks[0], metric):
        return (
            f"the pruner {name} compares single examples, which do not add up to {metric}; {DEFAULT} compares metrics"
        )
    return None


def not_adaptive(settings: SweepConfig, plan: Plan) -> str | None:
    """Say why trials cannot be measured adaptively; None where they can."""
    if any(task.kind == "lm_eval" for task in plan.tasks):
        return "lm-eval measures all examples at once"
    return not_estimated(goals_of(objectives(settings.objective, settings.direction, plan.tasks), plan.tasks))


def fitted(settings: SweepConfig, plan: Plan) -> SweepConfig:
    """Return the settings with evaluation and pruner: adaptive where it is possible, else `FALLBACK`."""
    evaluation = settings.evaluation or ("adaptive" if settings.pruner is None else "pruned")
    if evaluation == "adaptive" and not_adaptive(settings, plan) is not None:
        evaluation = FALLBACK
    return settings.model_copy(update={"evaluation": evaluation, "pruner": settings.pruner or DEFAULT})


def expert_weights(plan: Plan) -> list[float]:
    """Return the weight of each expert."""
    return [expert.weight for expert in plan.config.models.experts.values()]


def with_usable_points(settings: SweepConfig, space: Space, experts: int) -> SweepConfig:
    """Resolve the points to enqueue: ``1/experts`` is a number; points outside of what the user narrowed are dropped.

    With a grid there are none: it has every point once.

    Raises:
        SweepError: a point has a key that is not swept, lacks one that is, or has no number where one is needed.
    """
    usable = []
    fixed = {override.lstrip("+~").partition("=")[0] for override in space.fixed}
    for point in settings.enqueue or []:
        values = {key: 1 / experts if value == "1/experts" else value for key, value in point.items()}
        values = {key: value for key, value in values.items() if key not in fixed}
        if (reason := space.without_number(values)) is not None:
            raise SweepError(f"sweep.enqueue: {point}: {reason}")
        if values and (reason := space.check_point(values)) is None:
            usable.append(values)
        elif values and "is outside of" not in str(reason):
            raise SweepError(f"sweep.enqueue: {point}: {reason}")
    unique = [point for index, point in enumerate(usable) if point not in usable[:index]]
    if sampler_name(settings.sampler) == "grid":
        unique = []  # the grid has them; Optuna's would draw them again, and for each of them omit another point
    return settings.model_copy(update={"enqueue": unique})


def definition(sweep: Sweep) -> dict[str, str]:
    """Return what all trials of a study must share to be comparable, key by key."""
    from mergelab.tracking.values import flatten

    resolved = dict(sweep.plan.resolved)
    compared = {key: resolved[key] for key in ("models", "method", "task", "eval", "seed")}
    flat = {key: value for key, value in flatten(compared).items() if key not in sweep.space.distributions}
    for key in ("eval.cache", "eval.batch_tokens", "eval.bootstrap"):
        flat.pop(key, None)
    space = {f"search space of {key}": described(one) for key, one in sweep.space.distributions.items()}
    named_objectives = ",".join(f"{objective.name}" for objective in sweep.objectives)
    source = "mini" if sweep.source == "mini" else "models"
    evaluation = str(sweep.settings.evaluation)
    return {**flat, **space, "objective": named_objectives, "source": source, EVALUATION: evaluation}


def _default_name(sweep: Sweep) -> str:
    settings = sweep.settings
    shared = {key: value for key, value in definition(sweep).items() if (key, value) != (EVALUATION, "pruned")}
    parts = [shared, settings.sampler, settings.pruner, settings.seed, settings.enqueue]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:8]
    mini = "mini-" if sweep.source == "mini" else ""
    return f"{sweep.plan.method.name}-{mini}{sweep.plan.task_name}-{sampler_name(settings.sampler)}-{digest}"
