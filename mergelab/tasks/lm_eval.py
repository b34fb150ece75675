"""Tasks of lm-eval, the Language Model Evaluation Harness (Gao et al. 2021): their documents and their metrics.

A document is an example: a part of them can select and the rest report, a score's interval is drawn over them, and two
models are compared on the same ones. What lm-eval computes of one document is kept, and any choice of documents is
aggregated by lm-eval's own functions.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mergelab.config import local_path
from mergelab.errors import ConfigError, DataError, did_you_mean, listed
from mergelab.tasks.metric import Direction, Metric, declare

if TYPE_CHECKING:
    from mergelab.tasks.spec import TaskSpec

Array = np.ndarray[Any, Any]
Stamps = tuple[tuple[str, int, int], ...]
# lm-eval's name of the filter that leaves answers as they are.
_NO_FILTER = "none"
# What Python says of a function that has no source.
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


class LmEvalMetric(Metric, base=True):
    """One of lm-eval's metrics, of a task (``arc_easy/acc``) or of a group of tasks (``mmlu/acc``).

    A document's statistics are the position of its task, -1 where the metric is not of that task, and what lm-eval
    computes of it: (n, 2) float64, of objects where that is several numbers or texts.

    Args:
        name: ``task/metric``, with the filter's name after an underscore where it has one.
        direction: whether models are better when it is greater.
        members: by the position of each task that it is of, the function that aggregates its documents' values.
        key: lm-eval's name of the value, ``acc,none``.
        by_size: whether a group's tasks count by their documents; otherwise all count the same.
    """

    kinds = ()
    answers = ()
    citation = "lm-eval"
    chance = None
    min_examples = 1

    def __init__(
        self,
        name: str,
        direction: Direction,
        members: Mapping[int, Callable[[Sequence[Any]], float]],
        key: str,
        *,
        by_size: bool = True,
    ) -> None:
        self.name, self.direction = name, direction
        self.members, self.key, self.by_size = members, key, by_size

    def score(self, predictions: Any, references: Any) -> float:
        """Compute the metric of all documents."""
        return self.from_statistics(self.statistics(predictions, references))

    def statistics(self, predictions: Any, references: Any) -> Array:
        """Return each document's row.

        Args:
            predictions: (n,) JSON objects, lm-eval's values of each document by their names.
            references: (n,) the position of each document's task.
        """
        rows = np.full((len(references), 2), np.nan, dtype=object)
        rows[:, 0] = -1
        for row, values, task in zip(rows, _parsed(tuple(predictions)), references, strict=True):
            if int(task) in self.members and self.key in values:
                row[0], row[1] = int(task), values[self.key]
        return rows.astype(np.float64) if all(isinstance(value, int | float) for value in rows[:, 1]) else rows

    def from_statistics(self, rows: Array) -> float:
        """Aggregate the documents of each task, and of a group the tasks; NaN without any document."""
        found, sizes = [], []
        for task, aggregate in self.members.items():
            values = rows[rows[:, 0] == task, 1]
            if len(values):
                found.append(self._of_task(values, aggregate))
                sizes.append(len(values) if self.by_size else 1)
        return float(np.average(found, weights=sizes)) if found else float("nan")

    def _of_task(self, values: Array, aggregate: Callable[[Sequence[Any]], float]) -> float:
        if aggregate is _mean():
            return float(values.mean())
        try:
            return float(aggregate(values.tolist()))
        except Exception as error:  # whatever the function of a task raises
            raise DataError(f"{self.name}: lm-eval cannot compute it: {_reason(error)}") from error


@functools.cache
def _mean() -> Any:
    """Return lm-eval's mean, which goes through the values one by one."""
    from lm_eval.api.metrics import mean

    return mean


@functools.lru_cache(maxsize=8)
def _parsed(outputs: tuple[str, ...]) -> list[dict[str, Any]]:
    """Read the values of documents; those of several numbers or texts are tuples, as lm-eval's functions take them."""
    return [
        {name: tuple(value) if isinstance(value, list) else value for name, value in json.loads(text).items()}
        for text in outputs
    ]


@dataclass(frozen=True)
class LmEvalTaskSet:
    """lm-eval's tasks and groups that a task of ours names.

    Attributes:
        manager: lm-eval's index of tasks.
        tasks: lm-eval's tasks by name; a document's task is its position here.
        configs: each task's configuration as JSON.
        counts: how many documents of each task are measured.
        metrics: in order.
        requests: what a model is asked of each task's documents, as soon as it was built.
    """

    manager: Any
    tasks: Mapping[str, Any]
    configs: Mapping[str, str]
    counts: Mapping[str, int]
    metrics: tuple[LmEvalMetric, ...]
    requests: dict[Any, list[Any]] = field(default_factory=dict)


def check_installed() -> None:
    """Check that lm-eval is installed.

    Raises:
        ConfigError: it is not.
    """
    if find_spec("lm_eval") is None:
        raise ConfigError(
            "task=lm_eval: needs the package lm-eval, which is not installed: pip install 'mergelab[lm-eval]'"
        )


def with_metrics(spec: TaskSpec) -> TaskSpec:
    """Return a task of lm-eval with its metrics, which lm-eval's tasks say; any other as it is.

    Raises:
        ConfigError: lm-eval is not installed, has no such task, or ``primary`` is none of the metrics.
        DataError: a task's documents cannot be had.
    """
    if spec.kind != "lm_eval":
        return spec
    metrics = tuple(metric.name for metric in lm_eval_task_set(spec).metrics)
    primary = spec.primary or metrics[0]
    if primary not in metrics:
        raise ConfigError(
            f"task.primary={primary!r}: lm-eval reports {listed(metrics, 20)}{did_you_mean(primary, metrics)}"
        )
    return replace(spec, metrics=metrics, primary=primary)


def lm_eval_task_set(spec: TaskSpec) -> LmEvalTaskSet:
    """Load lm-eval's tasks, once in a process as long as the user's own stay as they are.

    Raises:
        ConfigError: lm-eval is not installed or has no such task. DataError: a task's documents cannot be had.
    """
    check_installed()
    folder = _own_tasks(spec)
    return _loaded(spec.lm_eval_tasks, folder, () if folder is None else _stamps(folder), spec.lm_eval_limit)


def _stamps(folder: str) -> Stamps:
    """Say when each file of the user's tasks was changed: a notebook's process reads them anew then."""
    files = sorted(file for file in Path(folder).rglob("*") if file.is_file())
    return tuple((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files)


def _own_tasks(spec: TaskSpec) -> str | None:
    if spec.include_path is None:
        return None
    folder = local_path(spec.include_path, "task.include_path").absolute()
    if not folder.is_dir():
        raise ConfigError(f"task.include_path={spec.include_path}: no such folder")
    return str(folder)


@functools.cache
def _loaded(wanted: tuple[str, ...], include_path: str | None, _stamps: Stamps, limit: int | None) -> LmEvalTaskSet:
    from mergelab.models import hub

    with quiet(), contextlib.nullcontext() if hub.reachable() else hub.offline():
        manager, found = _found(wanted, include_path)
        try:
            counts = {name: len(task.eval_docs) for name, task in found["tasks"].items()}
        except Exception as error:
            raise _not_loaded(wanted, error) from error
    if empty := [name for name, count in counts.items() if not count]:
        raise DataError(f"task.tasks: lm-eval's {empty[0]} has no documents")
    counts = {name: count if limit is None else min(limit, count) for name, count in counts.items()}
    metrics = tuple(_metrics(wanted, found["tasks"], found["groups"]))
    if not metrics:
        raise ConfigError(f"task.tasks: lm-eval's {listed(wanted)} have no metrics")
    for metric in metrics:
        declare(metric)
    # As they are before lm-eval fills in what a run leaves open.
    configs = {name: _ADDRESS.sub("", _json(task.dump_config())) for name, task in found["tasks"].items()}
    return LmEvalTaskSet(manager, found["tasks"], configs, counts, metrics)


def _found(wanted: tuple[str, ...], include_path: str | None) -> tuple[Any, Any]:
    """Load tasks from the user's folder alone where they are all there, else from all that lm-eval has too.

    The index of the latter takes ten seconds to build: it reads thousands of files.
    """
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        own = TaskManager(include_path=include_path, include_defaults=False)
        if all(name in own.all_tasks for name in wanted):
            with contextlib.suppress(Exception):  # one of them may be made of one of lm-eval's
                return own, own.load(list(wanted))
    manager = TaskManager(include_path=include_path)
    if unknown := [name for name in wanted if name not in manager.all_tasks]:
        raise ConfigError(
            f"task.tasks: lm-eval has no task {unknown[0]!r}{did_you_mean(unknown[0], manager.all_tasks)}"
        )
    try:
        return manager, manager.load(list(wanted))
    except Exception as error:
        raise _not_loaded(wanted, error) from error


def _not_loaded(wanted: Sequence[str], error: Exception) -> DataError:
    """Say why tasks cannot be loaded: by the code of their dataset, or of the transport."""
    return DataError(f"task.tasks: lm-eval cannot load {listed(wanted)}: {_reason(error)}")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _metrics(wanted: Sequence[str], tasks: Mapping[str, Any], groups: Mapping[str, Any]) -> Iterator[LmEvalMetric]:
    """Yield the metrics of groups, then those of their tasks, in the order in which these are named."""
    positions = {name: position for position, name in enumerate(tasks)}
    named = [name for name in wanted if name in groups]
    for group in [groups[name] for name in [*named, *(name for name in groups if name not in named)]]:
        yield from _group_metrics(group, positions)
    for name in [*(name for name in wanted if name in tasks), *(name for name in tasks if name not in wanted)]:
        task = tasks[name]
        for key, aggregate in _keys(task).items():
            yield LmEvalMetric(f"{name}/{_shown(key)}", _direction(task, key), {positions[name]: aggregate}, key)


def _group_metrics(group: Any, positions: Mapping[str, int]) -> Iterator[LmEvalMetric]:
    members = group.get_all_tasks()
    for one in group.aggregate_metric_list or []:
        every = [key for task in members for key in _keys(task) if key.partition(",")[0] == one.metric]
        filters = one.filter_list
        wanted = [filters] if isinstance(filters, str) else filters
        for key in dict.fromkeys(every):
            if wanted is not None and key.partition(",")[2] not in wanted:
                continue
            having = [task for task in members if key in _keys(task)]
            of = {positions[task.task_name]: _keys(task)[key] for task in having}
            name = f"{group.name}/{_shown(key)}"
            yield LmEvalMetric(name, _direction(having[0], key), of, key, by_size=bool(one.weight_by_size))


def _keys(task: Any) -> dict[str, Callable[[Sequence[Any]], float]]:
    """Return the functions that aggregate a task's values, by lm-eval's name of the value and its filter."""
    filters = [own.name for own in getattr(task, "_filters", None) or ()] or [_NO_FILTER]
    return {f"{metric},{name}": function for metric, function in task.aggregation().items() for name in filters}


def _direction(task: Any, key: str) -> Direction:
    return "minimize" if task.higher_is_better().get(key.partition(",")[0]) is False else "maximize"


def _shown(key: str) -> str:
    metric, _, name = key.partition(",")
    return metric if name == _NO_FILTER else f"{metric}_{name}"


def documents(spec: TaskSpec) -> tuple[list[str], Array, Array, str]:
    """Return the documents that are measured.

    Returns:
        Each as JSON, the position of its task (n,), its number in the task (n,), and the SHA-256 of all that the tasks
        are, the documents that worked examples are drawn from included.
    """
    from importlib.metadata import version

    found = lm_eval_task_set(spec)
    digest = hashlib.sha256(f"lm-eval {version('lm-eval')} {spec.lm_eval_num_fewshot}".encode())
    texts: list[str] = []
    for name, task in found.tasks.items():
        with quiet():
            own = [_json(document) for document in task.eval_docs]
            shots = [_json(document) for document in task.fewshot_docs() or ()] if _shots(spec, task) else []
        digest.update("\0".join([name, found.configs[name], *own, *shots]).encode())
        texts += own[: found.counts[name]]
    counts = list(found.counts.values())
    tasks, numbers = np.repeat(np.arange(len(counts)), counts), np.concatenate([*map(np.arange, counts)])
    return texts, tasks, numbers, digest.hexdigest()


def _shots(spec: TaskSpec, task: Any) -> int:
    own = task.get_config("num_fewshot")
    wanted = spec.lm_eval_num_fewshot
    return int((own if wanted is None or own == 0 else wanted) or 0)


def _json(value: Any) -> str:
    return json.dumps(value, default=str, ensure_ascii=False, sort_keys=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep lm-eval from logging and printing, and from drawing bars where there is no terminal."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    shown = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    try:
        with shown, contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
