"""The settings of a sweep, and those that a sweep gives each of its jobs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from mergelab.config import Schema, check, renamed
from mergelab.errors import ConfigError, did_you_mean, listed

if TYPE_CHECKING:
    from omegaconf import DictConfig

Direction = Literal["maximize", "minimize"]
Evaluation = Literal["full", "pruned", "adaptive"]
# Steps of pydantic's paths that are no keys of the configuration are in brackets.
_ONE, _EACH = "[one]", "[each]"
_Directions = Annotated[
    Annotated[Direction, Tag(_ONE)] | Annotated[list[Direction], Tag(_EACH)],
    Discriminator(lambda value: _EACH if isinstance(value, list) else _ONE),
]


class SweepConfig(Schema):
    """The ``hydra.sweeper`` node of ``hydra/sweeper=mergelab``; ``sweep.<key>`` sets the same keys."""

    n_trials: Annotated[int, Field(ge=1)] = 50
    """In total: the same command again resumes the sweep up to it."""
    n_jobs: Annotated[int, Field(ge=1)] = 1
    """Trials that are started together, for launchers that run jobs side by side."""
    sampler: str | dict[str, Any] = "tpe"
    evaluation: Evaluation | None = None
    """How much of a trial is measured: all selecting examples, as many as its pruner lets it, or chosen ones.

    None: chosen ones where that is possible and no pruner is named.
    """
    pruner: str | dict[str, Any] | None = None
    """Of ``evaluation: pruned``; None: futility."""
    budget: int | str | None = None
    """What all trials may take: a number of examples, or seconds (``600s``); None: no bound besides ``n_trials``."""
    objective: str | list[str] | None = None
    """Metrics (``f1``), or tasks of a suite (``rte``); None: the primary metric, of a suite the average."""
    direction: _Directions | None = None
    storage: str | None = None
    study_name: str | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Optuna's samplers take no larger one."""
    params: dict[str, Any] | None = None
    enqueue: list[dict[str, Any]] | None = None
    """Points that are tried before the sampler's."""
    retries: Annotated[int, Field(ge=0)] = 3
    """How often a trial is started again whose worker died, alone, while it was merged or measured.

    When the whole sweep was killed, no trial is to blame: that is not counted.
    """
    compile: bool = False
    """Merge with a compiled function where the method has one; equal within float32 rounding, not bit by bit."""
    max_failure_rate: Annotated[float, Field(ge=0, le=1)] = 0.2
    """The sweep stops when more than this share of its trials failed."""


class TrialJob(Schema):
    """The settings of one job: its trial, and whether it measures that trial or reports the winner."""

    study: str
    number: int
    source: Literal["hub", "mini", "local"]
    folder: str
    """Where the user started the sweep: what is relative is relative to it."""
    host: str
    pid: int
    """The sweeper's."""
    tracking: str | None = None
    """The tracking store's address, unless it holds a password: then the worker's environment must name it too."""
    parent: str | None = None
    attempt: int = 1
    stage: Literal["trial", "whole", "report"] = "trial"
    """``whole``: a trial that was stopped is measured further, until it is whole or hardly the best."""


def check_own_keys(config: DictConfig) -> None:
    """Check the keys of a sweep's file: the settings of a sweep, and those that the rest of ``config`` refers to.

    Raises:
        ConfigError: a key has no effect.
    """
    from omegaconf import OmegaConf

    own = config.get("sweep") or {}
    text = OmegaConf.to_yaml(OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"]))
    for key in own:
        if key not in SweepConfig.model_fields and not re.search(rf"\bsweep\.{re.escape(key)}\b", text):
            hint = did_you_mean(key, SweepConfig.model_fields) or f" (there are {listed(SweepConfig.model_fields, 20)})"
            unknown = f"sweep.{key}: no such key, and nothing refers to it{hint}"
            raise ConfigError(renamed(f"sweep.{key}", own[key], SweepConfig.model_fields) or unknown)


def sweep_config(node: Mapping[str, Any]) -> SweepConfig:
    """Check the settings of a sweep.

    Raises:
        ConfigError: a key is unknown or a value is not usable.
    """
    return check(SweepConfig, {key: value for key, value in node.items() if key != "_target_"}, "sweep")
