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
from mergelab.tracking import TrackingConfig, open_tracking, tracking_config
from mergelab.tracking.grid import BASIC_SWEEPER

if TYPE_CHECKING:
    from mergelab.evaluation.results import ExperimentResult, ModelResult

_open: list[tuple[Path, TrackingConfig]] = []


class GridTable(Callback):
    """Hydra callback that shows the table when the last job has ended."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Remember where the jobs write; a sweep shows its own table."""
        if OmegaConf.select(config, "hydra.sweeper._target_") != BASIC_SWEEPER:
            return
        _open.append((Path(config.hydra.sweep.dir).absolute(), tracking_config(config.tracking)))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Show the table."""
        show_open_grids()


def show_open_grids() -> None:
    """Show the table of every grid that this process has open; Hydra calls no callback after a failed job."""
    while _open:
        folder, tracking = _open.pop()
        _show(folder)
        tracker = open_tracking(tracking)
        if parent := tracker.grid_parent(folder):
            say(f"parent run {parent.id}")
            say_where(tracker, parent.experiment)


def _show(folder: Path) -> None:
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
    for results in groups.values():
        models = (*_baselines(results), *(result.merged for result in results))
        name = results[0].title.partition(" on ")[2]
        result_table(replace(results[0], title=f"grid of {len(results)} on {name}", models=models))
    sys.stdout.flush()


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
