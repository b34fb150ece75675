"""The plan of a sweep: every setting checked, its search space too, nothing loaded yet."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mergelab.errors import SweepError
from mergelab.experiment.plan import Plan, plan_experiment, warn_if_mini
from mergelab.sweep.config import SweepConfig, check_own_keys, sweep_config
from mergelab.sweep.objective import Objective, objectives
from mergelab.sweep.pruners import make_pruner
from mergelab.sweep.samplers import make_sampler
from mergelab.sweep.space import Space, described, space_from
from mergelab.sweep.storage import storage_url

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from mergelab.experiment.locate import Source


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

    @property
    def trials(self) -> int:
        """How many trials there are to be."""
        if named_sampler(self.settings) == "grid":
            return min(self.settings.n_trials, self.space.grid_size())
        return self.settings.n_trials


def named_sampler(settings: SweepConfig) -> str:
    """Return the sampler's name."""
    return settings.sampler if isinstance(settings.sampler, str) else str(settings.sampler.get("name"))


def plan_sweep(node: Mapping[str, Any], config: DictConfig, loader: Any, overrides: Sequence[str]) -> Sweep:
    """Check a sweep's settings, and that every edge of its space is a possible experiment."""
    check_own_keys(config)
    settings = sweep_config(node)
    space = space_from(settings.params or {}, overrides, loader)
    plans = [plan_experiment(loader.load_sweep_config(config, space.overrides(edge))) for edge in space.edges()]
    plan = plans[0]
    if not plan.config.evaluate:
        raise SweepError("evaluate=false: a sweep selects by scores; leave it out")
    if plan.config.eval.protocol == "full":
        raise SweepError(
            "eval.protocol=full: what a sweep selects on must not be what it reports; eval.protocol=holdout sets "
            "examples apart (oracle: the same ones, and labelled so)"
        )
    if "selection" in plan.method.needs:
        raise SweepError(f"method={plan.method.name}: chooses by the selecting examples itself; it cannot be swept")
    wanted = objectives(settings.objective, settings.direction, plan.tasks)
    make_sampler(settings.sampler, space, seed=0, number=0, objectives=len(wanted), side_by_side=False)
    if make_pruner(settings.pruner) is not None and len(wanted) > 1 and settings.pruner != "futility":
        raise SweepError(f"sweep.pruner={settings.pruner}: trials are pruned by one objective, there are {len(wanted)}")
    settings = replace_enqueued(settings, space, len(plan.config.models.experts))
    source = plan.source
    warn_if_mini(plan, source)
    url = storage_url(settings.storage, str(config.hydra.runtime.cwd))
    sweep = Sweep(config, settings, space, plan, tuple(wanted), source, settings.study_name or "", url)
    return sweep if sweep.name else replace(sweep, name=_default_name(sweep))


def replace_enqueued(settings: SweepConfig, space: Space, experts: int) -> SweepConfig:
    """Work out the first points: ``1/experts`` is a number; what the user has fixed or narrowed is left out.

    Raises:
        SweepError: a point names what is not swept, or lacks what is.
    """
    kept = []
    fixed = {override.lstrip("+~").partition("=")[0] for override in space.fixed}
    for point in settings.enqueue or []:
        values = {key: 1 / experts if value == "1/experts" else value for key, value in point.items()}
        values = {key: value for key, value in values.items() if key not in fixed}
        if values and (reason := space.check_point(values)) is None:
            kept.append(values)
        elif values and "is outside of" not in str(reason):
            raise SweepError(f"sweep.enqueue: {point}: {reason}")
    unique = [point for index, point in enumerate(kept) if point not in kept[:index]]
    return settings.model_copy(update={"enqueue": unique})


def definition(sweep: Sweep) -> dict[str, str]:
    """Say what makes the trials of a study comparable, key by key."""
    from mergelab.tracking.values import flatten

    resolved = dict(sweep.plan.resolved)
    kept = {key: resolved[key] for key in ("models", "method", "task", "eval", "seed")}
    flat = {key: value for key, value in flatten(kept).items() if key not in sweep.space.distributions}
    for key in ("eval.cache", "eval.batch_tokens", "eval.bootstrap"):
        flat.pop(key, None)
    space = {f"search space of {key}": described(one) for key, one in sweep.space.distributions.items()}
    named_objectives = ",".join(f"{objective.name}" for objective in sweep.objectives)
    return {**flat, **space, "objective": named_objectives, "source": "mini" if sweep.source == "mini" else "models"}


def _default_name(sweep: Sweep) -> str:
    settings = sweep.settings
    parts = [definition(sweep), settings.sampler, settings.pruner, settings.seed, settings.enqueue]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:8]
    mini = "mini-" if sweep.source == "mini" else ""
    return f"{sweep.plan.method.name}-{mini}{sweep.plan.task_name}-{named_sampler(settings)}-{digest}"
