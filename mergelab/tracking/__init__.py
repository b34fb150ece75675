"""Tracking with MLflow: experiments, runs, grids. MLflow itself is imported when a store is opened."""

from __future__ import annotations

from mergelab.tracking.config import TrackingConfig, experiment_name, tracking_config
from mergelab.tracking.grid import GridCallback, close_open_parents
from mergelab.tracking.processes import environment_tags
from mergelab.tracking.run import Run
from mergelab.tracking.tracker import GridParent, RunRecord, Tracker, open_tracking

__all__ = [
    "GridCallback",
    "GridParent",
    "Run",
    "RunRecord",
    "Tracker",
    "TrackingConfig",
    "close_open_parents",
    "environment_tags",
    "experiment_name",
    "open_tracking",
    "tracking_config",
]
