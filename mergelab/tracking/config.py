"""What a user sets about tracking."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf

from mergelab.config import Schema, check
from mergelab.tracking import names


class TrackingConfig(Schema):
    """The ``tracking`` config group."""

    uri: str | None = None
    experiment: str | None = None
    log_model: Literal["none", "best", "all"] = "none"
    enabled: bool = True


def tracking_config(node: Mapping[str, Any] | DictConfig) -> TrackingConfig:
    """Check the ``tracking`` node of a composed config.

    Raises:
        ConfigError: a key is unknown or a value is not allowed.
    """
    if isinstance(node, DictConfig):
        node = {str(key): value for key, value in dict(OmegaConf.to_container(node, resolve=True) or {}).items()}  # type: ignore[arg-type]
    return check(TrackingConfig, node, "tracking")


def experiment_name(config: TrackingConfig, task: str, *, mini: bool) -> str:
    """Return the MLflow experiment that a run on ``task`` belongs to; the miniature's runs never mix with real ones."""
    return config.experiment or names.labelled(task, mini=mini)
