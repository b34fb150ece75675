"""Hydra finds its plugins in this namespace: ``sweep=<method>`` for methods that have no file in conf/sweep.

conf/config.yaml names the source in ``hydra.searchpath``, after conf/ itself and after a folder given by
``--config-dir``, so that a file of that name wins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hydra.plugins.config_source import ConfigResult, ConfigSource

if TYPE_CHECKING:
    from hydra.core.object_type import ObjectType

GROUP = "sweep"


class MethodSweeps(ConfigSource):
    """A source of configs that has ``sweep/<method>`` for every method; the method is imported when it is loaded."""

    @staticmethod
    def scheme() -> str:
        """Return what its address begins with."""
        return "mergelab"

    def available(self) -> bool:
        """Return whether it can be read."""
        return True

    def is_group(self, config_path: str) -> bool:
        """Return whether it has files in the folder ``config_path``."""
        return config_path.strip("/") in ("", GROUP)

    def is_config(self, config_path: str) -> bool:
        """Return whether it has the file ``config_path``."""
        group, _, file = config_path.partition("/")
        return group == GROUP and file.removesuffix(".yaml") in _methods()

    def load_config(self, config_path: str) -> ConfigResult:
        """Return the search space of a method.

        Raises:
            SweepError: no parameter of the method has a range.
        """
        from omegaconf import OmegaConf

        from mergelab.sweep.method_space import sweep_config_of

        name = self._normalize_file_name(config_path).removeprefix(f"{GROUP}/").removesuffix(".yaml")
        config = OmegaConf.create(sweep_config_of(name))
        return ConfigResult(self.provider, self.full_path(), config, header={"package": "_global_"})

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """List the files or groups of a folder."""
        from hydra.core.object_type import ObjectType

        if config_path.strip("/") == GROUP:
            return [] if results_filter == ObjectType.GROUP else _methods()
        return [] if results_filter == ObjectType.CONFIG or config_path.strip("/") else [GROUP]


def _methods() -> list[str]:
    """List the methods without importing one."""
    from mergelab.config import CONF_DIR

    return sorted(path.stem for path in (CONF_DIR / "method").glob("*.yaml") if path.stem != "custom")
