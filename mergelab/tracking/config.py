"""What a user sets about tracking."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from pydantic import Field

from mergelab.config import Schema, check
from mergelab.errors import ConfigError
from mergelab.tracking import names


class TrackingConfig(Schema):
    """The ``tracking`` config group."""

    uri: str | None = None
    experiment: str | None = None
    log_model: Literal["none", "best", "all"] = "none"
    register_as: Annotated[str, Field(pattern=r"^[^/:]{1,200}$")] | None = Field(default=None, alias="register")
    """The registered model that a logged model becomes a version of."""
    enabled: bool = True


def tracking_config(node: Mapping[str, Any] | DictConfig) -> TrackingConfig:
    """Check the ``tracking`` node of a composed config.

    Raises:
        ConfigError: a key is unknown, a value is not allowed, or a model is to be registered that is not logged.
    """
    if isinstance(node, DictConfig):
        node = {str(key): value for key, value in dict(OmegaConf.to_container(node, resolve=True) or {}).items()}  # type: ignore[arg-type]
    found = check(TrackingConfig, node, "tracking")
    if found.register_as is not None and (found.log_model == "none" or not found.enabled):
        why = "tracking.log_model=none" if found.enabled else "tracking=none"
        raise ConfigError(
            f"tracking.register={found.register_as}: only logged models are registered, and with {why} there are none; "
            "tracking.log_model=best logs one"
        )
    return found


def experiment_name(config: TrackingConfig, task: str, *, mini: bool) -> str:
    """Return the MLflow experiment that a run on ``task`` belongs to; the miniature's runs never mix with real ones."""
    return config.experiment or names.labelled(task, mini=mini)
