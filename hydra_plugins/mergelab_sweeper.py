"""Hydra finds its plugins in this namespace: ``hydra/sweeper=mergelab``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.plugins.sweeper import Sweeper

from mergelab.cli import schema

if TYPE_CHECKING:
    from hydra.core.config_search_path import ConfigSearchPath
    from hydra.types import HydraContext, TaskFunction
    from omegaconf import DictConfig


class MergelabSchema(SearchPathPlugin):
    """Bring the structure that overrides are held to: Hydra calls this before it composes anything."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Leave the search path as it is; other plugins have stored their configurations by now."""
        schema.register()
        schema.open_launchers()


class MergelabSweeper(Sweeper):
    """Sweep with Optuna (4.9 or newer): persistent, pruned, and reported on examples that did not select."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what Hydra has composed."""
        from hydra.core.plugins import Plugins
        from hydra.types import HydraContext

        from mergelab.sweep.job_configs import JobConfigs

        self.loader, self.config = hydra_context.config_loader, config
        if config.hydra.runtime.choices.get("hydra/launcher") == "basic":  # jobs in this process
            configs: Any = JobConfigs(self.loader)
            hydra_context = HydraContext(configs, hydra_context.callbacks)
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Run the sweep that the settings and the command line's ``arguments`` describe."""
        from omegaconf import OmegaConf

        from mergelab.sweep.run import run_sweep

        node: Any = OmegaConf.to_container(self.config.hydra.sweeper, resolve=True)
        return run_sweep(node, self.config, self.launcher, self.loader, arguments)
