"""A grid (``-m method=soup,ties``) as one parent run: opened before its jobs, closed with a summary after them."""

from __future__ import annotations

import atexit
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from mergelab.errors import MergelabError
from mergelab.tracking import interrupts, names
from mergelab.tracking.config import experiment_name, tracking_config
from mergelab.tracking.names import MODEL
from mergelab.tracking.run import Run, Status
from mergelab.tracking.secrets import without_password
from mergelab.tracking.tracker import RunRecord, Tracker, open_tracking

log = logging.getLogger(__name__)

BASIC_SWEEPER = f"{BasicSweeper.__module__}.{BasicSweeper.__qualname__}"
# Where the models and data of a job come from follows from overrides that begin so.
_OF_SOURCE = ("models", "task", "source", "experiment")
_SETTLE_S = 3.0  # for killed workers to be gone


@dataclass(frozen=True)
class _Grid:
    run: Run
    tracker: Tracker
    swept: tuple[str, ...]
    jobs: int
    pid: int
    register: str | None


_open_grids: list[_Grid] = []


class GridCallback(Callback):
    """Hydra callback that gives each grid its parent run; does nothing for single runs and for other sweepers.

    Args:
        decide_source: dotted path of a function of a job's whole config that decides where its models come from
            (``hub`` or ``mini``); where this is the same for all jobs, they read it from the parent's tag.
    """

    def __init__(self, decide_source: str | None = None) -> None:
        self.decide_source = decide_source

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Open the parent run."""
        if OmegaConf.select(config, "hydra.sweeper._target_") != BASIC_SWEEPER:
            return
        try:
            open_grid(config, self._decide())
        except HydraException:  # the sweeper says so when it makes the jobs
            return
        except MergelabError as error:
            # Hydra turns a callback's exceptions into warnings; only an exit stops the jobs from starting.
            sys.stderr.write(f"error: {without_password(str(error))}\n")
            raise SystemExit(2) from error

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Close the parent run with its summary."""
        close_open_parents("FINISHED")

    def _decide(self) -> Callable[[DictConfig], str | None]:
        if self.decide_source is None:
            return lambda _config: None
        from hydra.utils import get_method

        return get_method(self.decide_source)


def open_grid(config: DictConfig, decide_source: Callable[[DictConfig], str | None]) -> None:
    """Open the parent run of the grid that ``config`` (Hydra's own node included) is about to run.

    Raises:
        TrackingError: the store cannot be used.
    """
    settings = tracking_config(config.tracking)
    if not settings.enabled:
        return
    sweeps = _sweeps(config)
    source = _source(config, decide_source)
    tasks = sweeps.get("task") or [str(OmegaConf.select(config, "task.name", default="default"))]
    mini = source == "mini"
    name = names.grid_run(sweeps, _typed(config), names.labelled(",".join(tasks), mini=True) if mini else None)
    tracker = open_tracking(settings)
    jobs = math.prod(len(values) for values in sweeps.values())
    sweep_dir = os.path.abspath(config.hydra.sweep.dir)
    run = tracker.start_run(
        name,
        experiment=experiment_name(settings, ",".join(tasks), mini=mini),
        tags={names.KIND: "grid", names.SWEEP_DIR: sweep_dir, names.SOURCE: source},
        params={names.OVERRIDES: " ".join(_typed(config)), names.JOBS: jobs},
    )
    if not _open_grids:
        atexit.register(close_open_parents)
    _open_grids.append(_Grid(run, tracker, tuple(sweeps), jobs, os.getpid(), settings.register_as))


def _typed(config: DictConfig) -> list[str]:
    """List the overrides as they were typed, references included: one may stand for an address with a password."""
    overrides: Any = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
    return [str(override) for override in overrides]


def _source(config: DictConfig, decide_source: Callable[[DictConfig], str | None]) -> str | None:
    """Decide where the models of all jobs come from; None where that is not the same for all of them.

    Raises:
        MergelabError: no job can run; what is wrong with the first one. Other failing jobs say so themselves.
    """
    loader = GlobalHydra.instance().config_loader()
    decided: dict[tuple[str, ...], str | None] = {}
    errors: list[MergelabError] = []
    for job in BasicSweeper.split_arguments(_overrides(config), None)[0]:
        of_source = tuple(override for override in job if override.lstrip("+~").startswith(_OF_SOURCE))
        if of_source not in decided:
            try:
                decided[of_source] = decide_source(loader.load_sweep_config(config, job))
            except MergelabError as error:
                errors.append(error)
    if errors and not decided:
        raise errors[0]
    return decided.popitem()[1] if len(set(decided.values())) == 1 else None


def _overrides(config: DictConfig) -> list[Override]:
    """Parse what the jobs are made of, from the command line and ``hydra.sweeper.params``."""
    params = OmegaConf.select(config, "hydra.sweeper.params") or {}
    lines = [f"{key}={value}" for key, value in params.items()] + _typed(config)
    parsed = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader()).parse_overrides(lines)
    return list(parsed)


def _sweeps(config: DictConfig) -> dict[str, list[str]]:
    """List what the grid varies and the values it takes."""
    return {
        str(override.key_or_group): [str(value) for value in override.sweep_string_iterator()]
        for override in _overrides(config)
        if override.is_discrete_sweep()
    }


def close_open_parents(status: Status | None = None) -> None:
    """Close every parent run that this process has open, with the summary of its jobs.

    Hydra calls no callback after a failure: the caller that catches what a multirun raises calls this, and so does the
    process's exit. ``FINISHED`` becomes ``FAILED`` where a job did not finish; without ``status`` it follows from what
    ended the process.
    """
    while _open_grids:
        grid = _open_grids.pop()
        if grid.pid == os.getpid():
            _close(grid, status or _status_at_exit())


def _status_at_exit() -> Status:
    error = sys.exc_info()[1] or getattr(sys, "last_value", None)
    return "KILLED" if isinstance(error, KeyboardInterrupt) or interrupts.terminated() else "FAILED"


def _close(grid: _Grid, status: Status) -> None:
    reason = "interrupted" if status == "KILLED" else None
    try:
        children = _settled_children(grid, wait=status != "FINISHED")
        if status != "KILLED" and (status == "FAILED" or any(child.status != "FINISHED" for child in children)):
            status, reason = "FAILED", _failure(grid, children)
        _summarise(grid, children)
    except (MergelabError, RuntimeError) as error:  # a dying process cannot do everything; its own error is the news
        log.warning("no summary of %s: %s", grid.run.name, error)
    try:
        grid.run.end(status, reason)
    except MergelabError as error:
        log.warning("%s", error)


def _failure(grid: _Grid, children: Sequence[RunRecord]) -> str:
    finished = sum(child.status == "FINISHED" for child in children)
    errors = [f"; {child.name}: {child.tags[names.ERROR]}" for child in children if names.ERROR in child.tags]
    return f"{finished} of {grid.jobs} jobs finished" + "".join(errors[:1])


def _settled_children(grid: _Grid, *, wait: bool) -> list[RunRecord]:
    """Return the grid's children, oldest first, once those whose process was killed are marked so."""
    deadline = time.monotonic() + _SETTLE_S
    while True:
        grid.tracker.reconcile()
        children = grid.tracker.runs({names.PARENT: str(grid.run.id)}, experiment=grid.run.experiment)
        if not wait or time.monotonic() > deadline or all(child.status != "RUNNING" for child in children):
            return children[::-1]
        time.sleep(0.1)


def _summarise(grid: _Grid, children: Sequence[RunRecord]) -> None:
    best = best_child(children)
    rows = [_row(child, grid.swept, best is not None and child.id == best.id) for child in children]
    if rows:
        grid.run.log_table(rows, names.SUMMARY)
        grid.run.log_table(rows, names.SUMMARY_JSON)
    grid.run.set_tags(shared_tags(children, grid.jobs))
    grid.tracker.copy_datasets(grid.run, *(child.id for child in children))
    if best is not None:
        primary = best.tags[names.PRIMARY]
        own = _primary_metrics(best)
        grid.run.log_metrics({**own, **{names.best_of_jobs(key): value for key, value in own.items()}})
        grid.run.set_tags(
            {
                names.BEST_RUN_ID: best.id,
                names.BEST_RUN_NAME: best.name,
                names.PRIMARY: names.best_of_jobs(primary),
                names.DIRECTION: best.tags.get(names.DIRECTION),
            }
        )
        _log_best_model(grid, children, best)


def shared_tags(children: Sequence[RunRecord], jobs: int) -> dict[str, str]:
    """Return what all jobs have in common of the tags that describe a result; nothing where a job has no run."""
    if len(children) != jobs:
        return {}
    first, *others = (child.tags for child in children)
    return {
        tag: value
        for tag, value in first.items()
        if names.describes_result(tag) and all(other.get(tag) == value for other in others)
    }


def _log_best_model(grid: _Grid, children: Sequence[RunRecord], best: RunRecord) -> None:
    """Log the best job's merged model where the jobs saved theirs (``tracking.log_model=best``); drop all of them."""
    folders = {child.id: child.tags.get(names.RUN_FOLDER) for child in children}
    saved = {run: Path(folder) / MODEL for run, folder in folders.items() if folder}
    if best.id not in saved or not saved[best.id].is_dir():
        return
    grid.tracker.log_models(best.id, saved[best.id], grid.register)
    for folder in saved.values():
        shutil.rmtree(folder, ignore_errors=True)


def best_child(children: Sequence[RunRecord]) -> RunRecord | None:
    """Return the finished run that is best by the metric that all of them are judged by; None without a common one."""
    finished = [child for child in children if child.status == "FINISHED"]
    judged = [child for child in finished if child.tags.get(names.PRIMARY) in child.metrics]
    if len({(child.tags[names.PRIMARY], child.tags.get(names.TASK)) for child in judged}) != 1:
        return None
    sign = -1.0 if judged[0].tags.get(names.DIRECTION) == "minimize" else 1.0
    return max(judged, key=lambda child: sign * child.metrics[child.tags[names.PRIMARY]])


def _primary_metrics(child: RunRecord) -> dict[str, float]:
    """Return the metric that a run is judged by, with its interval."""
    primary = child.tags.get(names.PRIMARY, "")
    wanted = (primary, names.low(primary), names.high(primary))
    return {key: child.metrics[key] for key in wanted if key in child.metrics}


def _row(child: RunRecord, swept: Sequence[str], best: bool) -> Mapping[str, Any]:
    values = {key: child.params.get(key, child.params.get(f"{key}.name", "")) for key in swept}
    first = _primary_metrics(child)
    rest = {key: child.metrics[key] for key in sorted(child.metrics) if key not in first}
    ending = {"error": child.tags.get(names.ERROR, ""), "run_id": child.id}
    return {"run": child.name, **values, "status": child.status, "best": "*" if best else "", **first, **rest, **ending}
