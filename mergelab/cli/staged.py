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
        from omegaconf import OmegaConf, open_dict

        if not OmegaConf.select(config, "models.stages") or _differ(config):
            return
        from mergelab.experiment.plan import plan_experiment
        from mergelab.experiment.run import merge_stage
        from mergelab.experiment.staged import as_experiment, made_stages
        from mergelab.report.commands import spelled

        try:
            # Where each job writes is not known yet.
            whole = OmegaConf.masked_copy(config, [str(key) for key in config if key not in ("output", "hydra")])
            OmegaConf.update(whole, "output", None, force_add=True)
            with as_experiment(hydra=config):
                plan = plan_experiment(whole, merges=False)
                if not plan.config.models.stages:
                    return
                with made_stages(plan, merge_stage) as (folders, _), open_dict(config.hydra):
                    typed: Any = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
                    others = [line for line in typed if not str(line).lstrip("+~").startswith(_BELOW[0])]
                    config.hydra.overrides.task = [*others, f"{_BELOW[0]}={spelled(folders)}"]
        except MergelabError as error:
            raise Refused(error) from None


def _differ(config: DictConfig) -> bool:
    """Return whether jobs may have other stages than the whole has."""
    from omegaconf import OmegaConf

    typed: Any = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
    params = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    for line in [*typed, *params]:
        override = parsed(str(line))
        if override is None or not override.is_sweep_override():
            continue
        key = str(override.key_or_group)
        if key in _BRING_STAGES or key in _BELOW or key.startswith(f"{_BELOW[0]}."):
            return True
    return False
