"""Plots of a study: history, importance, slices, contour and Pareto front."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial


_ENOUGH = 4  # complete trials for which importance means something


def draw(study: Study, parameters: int, objectives: Sequence[str], folder: Path) -> None:
    """Draw history and importance; for two parameters their contour; for several objectives the Pareto front."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as plots

    complete = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    if not complete:
        return
    several = len(objectives) > 1
    wanted: dict[str, Callable[[], Any]] = {}
    for index, name in enumerate(objectives):
        options: dict[str, Any] = {"target_name": name.replace("/", " ")}
        if several:
            options["target"] = partial(_value, index)
        suffix = f"_{name.replace('/', '_')}" if several else ""
        wanted[f"history{suffix}"] = partial(plots.plot_optimization_history, study, **options)
        if parameters > 1 and len(complete) >= _ENOUGH:
            wanted[f"importance{suffix}"] = partial(plots.plot_param_importances, study, **options)
        wanted[f"slices{suffix}"] = partial(plots.plot_slice, study, **options)
        if parameters == 2 and len(complete) >= _ENOUGH:
            wanted[f"contour{suffix}"] = partial(plots.plot_contour, study, **options)
    if 1 < len(objectives) <= 3:
        wanted["pareto_front"] = partial(plots.plot_pareto_front, study, target_names=list(objectives))
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
