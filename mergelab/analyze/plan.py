"""The plan of an analysis: every setting checked, nothing loaded yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from mergelab.config import Schema, check
from mergelab.errors import ConfigError, did_you_mean, listed
from mergelab.experiment.locate import Source, decide_source
from mergelab.experiment.plan import Plan, plan_experiment
from mergelab.models.references import references

if TYPE_CHECKING:
    from omegaconf import DictConfig

KEY = "analyze"
BASE = "base"
MOST_POINTS = 101


class AnalyzeConfig(Schema):
    """The settings of an analysis."""

    density: Annotated[float, Field(gt=0, le=1)] = 0.2
    """The share of an expert's entries that count as its largest."""
    rank: bool = False
    """Whether the effective rank of every matrix is computed, which takes much longer than all the rest."""
    line: list[str] | None = None
    """Two models, ``base`` or experts' names, between which the task is measured."""
    plane: list[str] | None = None
    """Three models, in whose plane the task is measured."""
    points: Annotated[int, Field(ge=2, le=MOST_POINTS)] = 11
    """How many points a line has, and each side of a plane."""
    margin: Annotated[float, Field(ge=0, le=2)] = 0.2
    """How far a plane goes beyond its models, as a share of their extent."""


@dataclass(frozen=True)
class AnalysisPlan:
    """An analysis whose every setting has been checked.

    Attributes:
        experiment: the models, the task and where it is recorded.
        settings: what is computed.
    """

    experiment: Plan
    settings: AnalyzeConfig

    @property
    def measures(self) -> bool:
        """Whether models are measured on the task."""
        return self.settings.line is not None or self.settings.plane is not None

    @property
    def source(self) -> Source:
        """Decide where models, and the data that they are measured on, come from."""
        plan, config = self.experiment, self.experiment.config
        data = {task.name: (task.path, task.config) for task in plan.tasks if task.path and self.measures}
        local = self.measures and plan.data_dir is not None
        return decide_source(config.source, config.models, data, data_is_local=local)


def plan_analysis(config: DictConfig) -> AnalysisPlan:
    """Check every setting of ``config`` without loading anything.

    Raises:
        ConfigError, DataError: a key, a value or a combination is not usable.
    """
    from omegaconf import OmegaConf

    settings = check(AnalyzeConfig, _plain(config), KEY)
    if (method := OmegaConf.select(config, "method.name")) != "soup":
        raise ConfigError(f"method={method}: an analysis merges nothing; leave it out")
    rest = OmegaConf.masked_copy(config, [str(key) for key in config if key != KEY])
    OmegaConf.update(rest, "evaluate", settings.line is not None or settings.plane is not None, force_add=True)
    plan = plan_experiment(rest, merges=False)
    if plan.config.models.base is None:
        raise ConfigError("models.base: task vectors are the experts' differences from a base, and none is given")
    if plan.config.source != "mini":
        references(plan.config.models)  # what is written as a folder has to be one
    names = [BASE, *plan.config.models.experts]
    _check_models(f"{KEY}.line", settings.line, names, 2)
    _check_models(f"{KEY}.plane", settings.plane, names, 3)
    return AnalysisPlan(plan, settings)


def _plain(config: DictConfig) -> dict[str, object]:
    from omegaconf import OmegaConf

    node = OmegaConf.to_container(config[KEY], resolve=True)
    if not isinstance(node, dict):
        raise ConfigError(f"{KEY}={node!r}: must be a mapping of its settings")
    return {str(key): value for key, value in node.items()}


def _check_models(key: str, given: Sequence[str] | None, names: Sequence[str], count: int) -> None:
    """Raise `ConfigError` where these are not ``count`` different models."""
    if given is None:
        return
    what = f"must be {count} different models of {listed(names)}"
    for name in given:
        if name not in names:
            raise ConfigError(f"{key}=[{','.join(given)}]: {what}{did_you_mean(name, names)}")
    if len(set(given)) != len(given) or len(given) != count:
        raise ConfigError(f"{key}=[{','.join(given)}]: {what}")
