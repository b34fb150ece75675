"""What a task is: where its data are, which columns hold the texts, the order of its labels, and its metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import Field

from mergelab.config import CONF_DIR, Schema, check
from mergelab.errors import ConfigError, DataError, did_you_mean, listed
from mergelab.tasks.metrics import METRICS

Name = Annotated[str, Field(pattern=r"^[\w.\-]+$")]


class _Dataset(Schema):
    path: str
    name: str | None = None
    revision: str | None = None


class _Task(Schema):
    name: Name
    version: int
    dataset: _Dataset
    splits: Annotated[list[Name], Field(min_length=1)] = Field(default=["validation"])
    columns: Annotated[list[str], Field(min_length=1, max_length=2)]
    label_column: str = "label"
    labels: Annotated[list[str], Field(min_length=2)] | None
    metrics: Annotated[list[str], Field(min_length=1)]
    primary: str
    limit: Annotated[int, Field(ge=1)] | None = None
    data_dir: str | None = None


class _Suite(Schema):
    name: Name
    version: int
    members: Annotated[list[str], Field(min_length=1)]
    splits: dict[str, list[Name]] = Field(default={})
    limit: Annotated[int, Field(ge=1)] | None = None
    data_dir: str | None = None


@dataclass(frozen=True)
class TaskSpec:
    """A task, as ``conf/task/<name>.yaml`` says it.

    ``path``, ``config`` and ``revision`` are the hub dataset's; ``labels`` are in the dataset's order, and ``None`` for
    regression. With several ``splits`` every metric is of all their examples, and of each split on its own beside that.
    """

    name: str
    version: int
    path: str
    config: str | None
    revision: str | None
    splits: tuple[str, ...]
    columns: tuple[str, ...]
    label_column: str
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...]
    primary: str

    @property
    def is_regression(self) -> bool:
        """Whether the labels are scores."""
        return self.labels is None

    @property
    def outputs(self) -> int:
        """How many outputs a model for this task has."""
        return 1 if self.labels is None else len(self.labels)


@dataclass(frozen=True)
class Suite:
    """The tasks that an experiment is measured on (one, for a plain task), and where and how much of their data."""

    name: str
    tasks: tuple[TaskSpec, ...]
    data_dir: str | None = None
    limit: int | None = None


def task_from_config(node: Mapping[str, Any]) -> TaskSpec:
    """Check one task's configuration.

    Raises:
        ConfigError: a key is unknown or missing, or a value is not usable.
    """
    task = check(_Task, node, "task")
    kind = "regression" if task.labels is None else "classification"
    for metric in task.metrics:
        if metric not in METRICS:
            raise ConfigError(
                f"task.metrics: no metric {metric!r}{did_you_mean(metric, METRICS)} (there are {listed(METRICS)})"
            )
        if METRICS[metric].kind != kind:
            raise ConfigError(f"task.metrics: {metric} is not for {kind}")
    if "f1" in task.metrics and task.labels is not None and len(task.labels) != 2:
        raise ConfigError(f"task.metrics: f1 is for two labels, {task.name} has {len(task.labels)}")
    if task.primary not in task.metrics:
        raise ConfigError(f"task.primary={task.primary!r}: must be one of task.metrics: {listed(task.metrics)}")
    for key in ("splits", "columns", "labels", "metrics"):
        values = getattr(task, key) or []
        if len(set(values)) < len(values):
            raise ConfigError(f"task.{key}={values}: must not repeat a name")
    return TaskSpec(
        name=task.name,
        version=task.version,
        path=task.dataset.path,
        config=task.dataset.name,
        revision=task.dataset.revision,
        splits=tuple(task.splits),
        columns=tuple(task.columns),
        label_column=task.label_column,
        labels=None if task.labels is None else tuple(task.labels),
        metrics=tuple(task.metrics),
        primary=task.primary,
    )


def tasks_from_config(node: Mapping[str, Any]) -> Suite:
    """Check the configuration of a task or of a suite (which has ``members``), and load a suite's tasks.

    Raises:
        ConfigError: a key is unknown or missing, or a value is not usable.
        DataError: a suite names a task that does not exist.
    """
    if "members" not in node:
        return Suite(str(node.get("name")), (task_from_config(node),), node.get("data_dir"), node.get("limit"))
    suite = check(_Suite, node, "task")
    if len(set(suite.members)) < len(suite.members):
        raise ConfigError(f"task.members={suite.members}: must not repeat a task")
    for name in suite.splits:
        if name not in suite.members:
            raise ConfigError(f"task.splits.{name}: not among task.members{did_you_mean(name, suite.members)}")
    tasks = [load_task(name) for name in suite.members]
    chosen = [replace(task, splits=tuple(suite.splits.get(task.name, task.splits))) for task in tasks]
    return Suite(suite.name, tuple(chosen), suite.data_dir, suite.limit)


def task_names() -> list[str]:
    """List the ready tasks, suites aside."""
    return sorted(path.stem for path in (CONF_DIR / "task").glob("*.yaml") if "members" not in _read(path.stem))


def load_task(name: str) -> TaskSpec:
    """Load a ready task by its name.

    Raises:
        DataError: there is no such task.
    """
    if not (CONF_DIR / "task" / f"{name}.yaml").is_file() or "members" in (node := _read(name)):
        names = task_names()
        raise DataError(f"no task {name!r}{did_you_mean(name, names)} (there are {listed(names, 20)})")
    return task_from_config(node)


def _read(name: str) -> dict[str, Any]:
    from omegaconf import OmegaConf

    node: Any = OmegaConf.to_container(OmegaConf.load(CONF_DIR / "task" / f"{name}.yaml"))
    return {key: value for key, value in node.items() if key != "defaults"}
