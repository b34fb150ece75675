"""The table of a grid: base and experts once, then each job's merged model."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from mergelab.console.progress import say, say_where
from mergelab.console.tables import result_table
from mergelab.tracking import TrackingConfig, names, open_tracking, tracking_config
from mergelab.tracking.grid import BASIC_SWEEPER

if TYPE_CHECKING:
    from mergelab.evaluation.results import ExperimentResult, ModelResult

_open: list[tuple[Path, TrackingConfig, str]] = []


class GridTable(Callback):
    """Hydra callback that shows the table when the last job has ended."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Remember where the jobs write; a sweep shows its own table."""
        if OmegaConf.select(config, "hydra.sweeper._target_") != BASIC_SWEEPER:
            return
        from mergelab.experiment.described import command

        typed: Any = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
        folder, tracking = Path(config.hydra.sweep.dir).absolute(), tracking_config(config.tracking)
        _open.append((folder, tracking, command(typed, multirun=True)))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Show the table."""
        show_open_grids()


def show_open_grids() -> None:
    """Show the table of every grid that this process has open; Hydra calls no callback after a failed job."""
    from mergelab.experiment.described import description, result_text
    from mergelab.experiment.recording import save_views

    while _open:
        folder, tracking, typed = _open.pop()
        tables = _tables(folder)
        for table in tables:
            result_table(table)
        sys.stdout.flush()
        tracker = open_tracking(tracking)
        if parent := tracker.grid_parent(folder):
            text = description(*(result_text(table) for table in tables), command=typed)
            tracker.tag(parent.id, {names.DESCRIPTION: text})
            views = [save_views(tracker, parent.experiment, table) for table in tables]
            say(f"parent run {parent.id}")
            say_where(tracker, parent.experiment, next(filter(None, views), None))


def _tables(folder: Path) -> list[ExperimentResult]:
    """Return a table of results for each choice of tasks: base and experts, then each job's merged model."""
    from mergelab.evaluation.results import RESULT, read_result

    files = sorted(folder.glob(f"*/{RESULT}"), key=_job_number)
    overrides = {file: _overrides(file.parent) for file in files}
    common = set.intersection(*map(set, overrides.values())) if len(files) > 1 else set()
    groups: dict[tuple[str, ...], list[ExperimentResult]] = {}
    for file in files:
        result = read_result(file)
        name = " ".join(override for override in overrides[file] if override not in common) or result.merged.label
        models = (*result.models[:-1], replace(result.merged, label=name))
        groups.setdefault(result.tasks, []).append(replace(result, models=models))
    tables = []
    for results in groups.values():
        models = (*_baselines(results), *(result.merged for result in results))
        name = results[0].title.partition(" on ")[2]
        tables.append(replace(results[0], title=f"grid of {len(results)} on {name}", models=models))
    return tables


def _baselines(results: Sequence[ExperimentResult]) -> Iterator[ModelResult]:
    """Yield the models that were merged, once for each score: a split or a merged head may differ between jobs."""
    found: dict[str, list[tuple[ModelResult, str]]] = {}
    for result in results:
        for model in result.models[:-1]:
            same = found.setdefault(model.label, [])
            if all(_measured(model) != _measured(other) for other, _ in same):
                same.append((model, result.merged.label))
    for label, same in found.items():
        yield from (replace(model, label=f"{label} ({job})" if len(same) > 1 else label) for model, job in same)


def _measured(model: ModelResult) -> dict[str, tuple[object, ...]]:
    """Return a model's scores by task; where seeds draw no split, without the intervals, which they draw too."""
    return {
        name: (own.select, own.report if own.select else {m: s.value for m, s in own.report.items()}, own.texts)
        for name, own in model.results.items()
    }


def _job_number(file: Path) -> int:
    return int(file.parent.name) if file.parent.name.isdigit() else 0


def _overrides(folder: Path) -> list[str]:
    """List a job's overrides."""
    recorded: Any = OmegaConf.to_container(OmegaConf.load(folder / ".hydra" / "overrides.yaml"), resolve=False)
    return [str(override).lstrip("+") for override in recorded]
