"""A study as artifacts of its run: its trials, its plots, and the study itself."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelab.sweep.study import ERROR, OUTCOME

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from mergelab.sweep.study import SweepStudy
    from mergelab.tracking import Run

_TIMES = {"merge_s": "merge_seconds", "eval_s": "eval_seconds"}
_ENOUGH = 4  # complete trials for which importance means something


def log_study(run: Run, study: SweepStudy, objectives: Sequence[str]) -> None:
    """Log the table of trials, plots, and the study in a file that Optuna and its dashboard open."""
    if run.id is None:
        return
    run.log_table(trial_rows(study, objectives), "trials.csv")
    with tempfile.TemporaryDirectory() as folder:
        plots = Path(folder) / "plots"
        plots.mkdir()
        draw(study, objectives, plots)
        run.log_artifacts(plots, "plots")
        file = Path(folder) / "study.db"
        copy_study(study, file)
        run.log_artifact(file)


def trial_rows(study: SweepStudy, objectives: Sequence[str]) -> list[dict[str, Any]]:
    """List the trials: parameters, scores, how they ended, examples measured, seconds."""
    rows = []
    for trial in study.trials:
        outcome = trial.user_attrs.get(OUTCOME, {})
        scores = dict(zip(objectives, outcome.get("values", ()), strict=False))
        rows.append(
            {
                "trial": trial.number,
                "state": trial.state.name.lower(),
                **trial.params,
                **{f"select {name}": value for name, value in scores.items()},
                "examples": outcome.get("pruned_at") or outcome.get("examples", ""),
                **{key: f"{outcome[name]:.3f}" for key, name in _TIMES.items() if name in outcome},
                "error": trial.user_attrs.get(ERROR, ""),
                "run": outcome.get("run") or "",
            }
        )
    return rows


def copy_study(study: SweepStudy, file: Path) -> None:
    """Write the study to an SQLite file of its own."""
    import optuna

    from mergelab.sweep.storage import open_storage

    storage = open_storage(f"sqlite:///{file}")
    optuna.copy_study(from_study_name=study.study.study_name, from_storage=study.storage, to_storage=storage)
    storage.remove_session()


def draw(study: SweepStudy, objectives: Sequence[str], folder: Path) -> None:
    """Draw history and importance; for two parameters their contour; for several objectives the Pareto front."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as plots

    complete = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    if not complete:
        return
    several, swept = len(objectives) > 1, len(study.space.distributions)
    wanted: dict[str, Callable[[], Any]] = {}
    for index, name in enumerate(objectives):
        options: dict[str, Any] = {"target_name": name.replace("/", " ")}
        if several:
            options["target"] = partial(_value, index)
        suffix = f"_{name.replace('/', '_')}" if several else ""
        wanted[f"history{suffix}"] = partial(plots.plot_optimization_history, study.study, **options)
        if swept > 1 and len(complete) >= _ENOUGH:
            wanted[f"importance{suffix}"] = partial(plots.plot_param_importances, study.study, **options)
        wanted[f"slices{suffix}"] = partial(plots.plot_slice, study.study, **options)
        if swept == 2 and len(complete) >= _ENOUGH:
            wanted[f"contour{suffix}"] = partial(plots.plot_contour, study.study, **options)
    if 1 < len(objectives) <= 3:
        wanted["pareto_front"] = partial(plots.plot_pareto_front, study.study, target_names=list(objectives))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, plot in wanted.items():
            try:
                axes = plot()
            except (ValueError, RuntimeError, ZeroDivisionError):  # all scores alike: there is nothing to draw
                pyplot.close("all")
                continue
            first = next(iter(axes.flat)) if hasattr(axes, "flat") else axes
            first.figure.set_size_inches(9, 6)
            first.figure.savefig(folder / f"{name}.png", dpi=110, bbox_inches="tight")
            pyplot.close("all")


def _value(index: int, trial: FrozenTrial) -> float:
    return float(trial.values[index])
