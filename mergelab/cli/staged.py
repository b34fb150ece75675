"""Make the stages of a sweep's or a grid's merges before its first job, once for all jobs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback

from mergelab.cli.quoting import parsed
from mergelab.cli.run import Refused
from mergelab.errors import MergelabError

if TYPE_CHECKING:
    from omegaconf import DictConfig

_BRING_STAGES = ("models", "experiment")  # groups
_BELOW = ("models.stages", "models.base", "models.experts")


class StagesFirst(Callback):
    """Hydra callback that makes stages, and gives the jobs their folders.

    Where the jobs of a grid differ in stages, or in models, each makes its own.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Make the stages."""
        from omegaconf import OmegaConf

        if not OmegaConf.select(config, "models.stages") or _differ(config):
            return
        from mergelab.experiment.plan import plan_experiment
        from mergelab.experiment.run import merge_stage
        from mergelab.experiment.staged import made_stages
        from mergelab.report.commands import spelled

        try:
            plan = plan_experiment(config)
            if plan.config.models.stages:
                with made_stages(plan, merge_stage, config) as (folders, _):
                    config.hydra.overrides.task.append(f"models.stages={spelled(folders)}")
        except MergelabError as error:
            raise Refused(error) from None


def _differ(config: DictConfig) -> bool:
    """Return whether jobs may have other stages than the whole has."""
    params = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    for line in [*config.hydra.overrides.task, *params]:
        override = parsed(str(line))
        if override is None or not override.is_sweep_override():
            continue
        key = str(override.key_or_group)
        if key in _BRING_STAGES or key in _BELOW or key.startswith(f"{_BELOW[0]}."):
            return True
    return False
