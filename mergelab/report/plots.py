"""Plots of a study: history, importance, slices, contour, parallel coordinates and Pareto front, of all its trials.

Optuna draws them: with Plotly for one page that opens without a network, with Matplotlib for PNG and SVG. Trials that
were stopped early are drawn on top, paler, each at its estimate with its bounds.
"""

from __future__ import annotations

import html
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelab.tracking import names

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

_ENOUGH = 4  # trials for which importance and contour mean something
_PALE = "#9aa7b5"
_STOPPED = "stopped early: estimate"
_SIZE = (9, 6)  # inches
# What Optuna raises where all scores are alike and there is nothing to draw.
_NOTHING_TO_DRAW = (ValueError, RuntimeError, ZeroDivisionError)


@dataclass(frozen=True)
class Stopped:
    """A trial that was stopped early: its estimate, and the bounds where there are any."""

    value: float
    low: float | None
    high: float | None

    @property
    def below(self) -> float:
        """How far the lower bound is away."""
        return 0.0 if self.low is None else self.value - self.low

    @property
    def above(self) -> float:
        """How far the upper bound is away."""
        return 0.0 if self.high is None else self.high - self.value


@dataclass(frozen=True)
class _Plot:
    """One plot: its file's name, Optuna's function, what it is given, and what is drawn on top."""

    name: str
    function: str
    study: Study
    options: Mapping[str, Any]
    on_plotly: Callable[[Any], None] = lambda _figure: None
    on_matplotlib: Callable[[Any], None] = lambda _axes: None


def draw(study: Study, stopped: Mapping[int, Stopped], objectives: Sequence[str], folder: Path) -> None:
    """Draw a study's plots into a folder: each as PNG and SVG, and all of them on one interactive page.

    Args:
        study: has a complete trial, else nothing is drawn.
        stopped: by number, the trials that were stopped early; only where there is one objective.
        objectives: their names.
        folder: exists.
    """
    if not any(trial.state.name == "COMPLETE" for trial in study.trials):
        return
    import matplotlib

    matplotlib.use("Agg")
    pages: list[tuple[str, Any]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for plot in _plots(study, stopped, objectives):
            try:
                _save_images(plot, folder)
                pages.append((plot.name, _figure(plot)))
            except _NOTHING_TO_DRAW:
                continue
    if pages:
        (folder / names.PLOTS_PAGE).write_text(page(study.study_name, pages), encoding="utf-8")


def page(title: str, figures: Sequence[tuple[str, Any]]) -> str:
    """Write Plotly figures, each with its name, on one HTML page that needs no network."""
    parts = [
        f"<h2>{html.escape(name.replace('_', ' '))}</h2>"
        + figure.to_html(full_html=False, include_plotlyjs=number == 0, default_height="520px")
        for number, (name, figure) in enumerate(figures)
    ]
    style = "body{font-family:sans-serif;max-width:1100px;margin:1em auto;color:#222}h2{font-size:1em;margin:2em 0 0}"
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{style}</style></head><body><h1>{html.escape(title)}</h1>{''.join(parts)}</body></html>"
    )


def _plots(study: Study, stopped: Mapping[int, Stopped], objectives: Sequence[str]) -> Iterator[_Plot]:
    """Yield what a study's plots are made from."""
    several = len(objectives) > 1
    whole = _with_estimates(study, stopped)
    count = sum(trial.state.name == "COMPLETE" for trial in whole.trials)
    parameters = sorted({key for trial in whole.trials for key in trial.params})
    points = [(trial, stopped[trial.number]) for trial in study.trials if trial.number in stopped]
    for index, name in enumerate(objectives):
        options: dict[str, Any] = {"target_name": name.replace("/", " ")}
        if several:
            options["target"] = partial(_value, index)
        suffix = f"_{name.replace('/', '_')}" if several else ""
        on_history = partial(_history_on_plotly, points), partial(_history_on_matplotlib, points)
        yield _Plot(f"history{suffix}", "plot_optimization_history", study, options, *on_history)
        on_slices = partial(_slices_on_plotly, points), partial(_slices_on_matplotlib, points)
        yield _Plot(f"slices{suffix}", "plot_slice", study, options, *on_slices)
        if len(parameters) > 1 and count >= _ENOUGH:
            yield _Plot(f"importance{suffix}", "plot_param_importances", whole, options)
            dotted = partial(_lines_on_plotly, bool(points)), partial(_lines_on_matplotlib, bool(points))
            marked = _with_estimates(study, stopped, marked=True)
            yield _Plot(f"parallel_coordinates{suffix}", "plot_parallel_coordinate", marked, options, *dotted)
        if len(parameters) == 2 and count >= _ENOUGH:
            on_contour = (_contour_on_plotly, _contour_on_matplotlib)
            overlays = [partial(function, points, parameters) for function in on_contour]
            yield _Plot(f"contour{suffix}", "plot_contour", whole, options, *overlays)
    if 1 < len(objectives) <= 3:
        yield _Plot("pareto_front", "plot_pareto_front", study, {"target_names": list(objectives)})


def _with_estimates(study: Study, stopped: Mapping[int, Stopped], *, marked: bool = False) -> Study:
    """Copy a study into memory with its stopped trials complete, their values the estimates.

    Optuna draws trials that violate a constraint in another style; with ``marked`` that is the stopped ones.
    """
    import optuna

    if not stopped:
        return study
    copy = optuna.create_study(directions=study.directions)
    for trial in study.trials:
        if trial.number in stopped:
            values = {"state": optuna.trial.TrialState.COMPLETE, "value": stopped[trial.number].value}
        elif trial.state.name == "COMPLETE":
            values = {"state": trial.state, "values": trial.values}
        else:
            continue
        constraints = {"constraints": [1.0 if trial.number in stopped else 0.0]} if marked else {}
        copy.add_trial(
            optuna.trial.create_trial(
                params=trial.params, distributions=trial.distributions, system_attrs=constraints, **values
            )
        )
    return copy


def _value(index: int, trial: FrozenTrial) -> float:
    return float(trial.values[index])


def _figure(plot: _Plot) -> Any:
    """Return a plot as a Plotly figure."""
    from optuna import visualization

    figure = getattr(visualization, plot.function)(plot.study, **plot.options)
    plot.on_plotly(figure)
    return figure


def _save_images(plot: _Plot, folder: Path) -> None:
    """Save a plot as PNG and SVG."""
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as plots

    try:
        axes = getattr(plots, plot.function)(plot.study, **plot.options)
        each = list(axes.flat) if hasattr(axes, "flat") else [axes]
        plot.on_matplotlib(each)
        figure = each[0].figure
        figure.set_size_inches(*_SIZE)
        for form in ("png", "svg"):
            figure.savefig(folder / f"{plot.name}.{form}", dpi=110, bbox_inches="tight")
    finally:
        pyplot.close("all")


# ----------------------------------------------------------------------------------- stopped trials, drawn on top

_Points = Sequence[tuple["FrozenTrial", Stopped]]


def _bars_on_plotly(x: Sequence[Any], points: _Points, *, legend: bool) -> Any:
    """Return pale markers at the estimates with their bounds, as a Plotly trace."""
    from plotly import graph_objects

    return graph_objects.Scatter(
        x=list(x),
        y=[one.value for _, one in points],
        error_y={
            "array": [one.above for _, one in points],
            "arrayminus": [one.below for _, one in points],
            "thickness": 1,
            "width": 2,
        },
        mode="markers",
        opacity=0.45,
        marker={"color": _PALE, "size": 6},
        name=_STOPPED,
        showlegend=legend,
        text=[f"trial {trial.number}" for trial, _ in points],
    )


def _bars_on_matplotlib(axes: Any, x: Sequence[Any], points: _Points) -> None:
    bounds = [[one.below for _, one in points], [one.above for _, one in points]]
    axes.errorbar(
        list(x), [one.value for _, one in points], yerr=bounds, fmt="o", markersize=4, color=_PALE, ecolor=_PALE,
        elinewidth=0.8, alpha=0.45, zorder=0.5, label=_STOPPED,
    )  # fmt: skip


def _history_on_plotly(points: _Points, figure: Any) -> None:
    if points:
        figure.add_trace(_bars_on_plotly([trial.number for trial, _ in points], points, legend=True))


def _history_on_matplotlib(points: _Points, axes: Sequence[Any]) -> None:
    if points:
        _bars_on_matplotlib(axes[0], [trial.number for trial, _ in points], points)
        axes[0].legend()


def _slices_on_plotly(points: _Points, figure: Any) -> None:
    columns = list(figure.select_xaxes())
    for number, axis in enumerate(columns if points else (), start=1):
        shown, x = _along(points, axis.title.text, categories=axis.type == "category")
        trace = _bars_on_plotly(x, shown, legend=number == 1)
        place = {"row": 1, "col": number} if len(columns) > 1 else {}
        figure.add_trace(trace, **place)
    figure.update_layout(legend={"orientation": "h", "y": 1.08})


def _slices_on_matplotlib(points: _Points, axes: Sequence[Any]) -> None:
    for one in axes if points else ():
        categories = {str(label.get_text()) for label in one.get_xticklabels()} - {""}
        key = one.get_xlabel()
        shown, x = _along(points, key, categories=isinstance(next(iter(points))[0].params.get(key), str | bool))
        known = [(place, point) for place, point in zip(x, shown, strict=True) if not _unknown(place, categories)]
        if not known:
            continue
        limits = one.get_xlim()
        _bars_on_matplotlib(one, [place for place, _ in known], [point for _, point in known])
        one.set_xlim(_widened(limits, [place for place, _ in known]))
    if points:
        axes[0].legend()


def _unknown(place: Any, categories: set[str]) -> bool:
    return isinstance(place, str) and place not in categories


def _widened(limits: tuple[float, float], x: Sequence[Any]) -> tuple[float, float]:
    """Widen an axis to show points that the complete trials did not reach."""
    if any(isinstance(place, str) for place in x):
        return limits
    return min(limits[0], *x), max(limits[1], *x)


def _along(points: _Points, key: str, *, categories: bool) -> tuple[_Points, list[Any]]:
    """Return the stopped trials that have a parameter, and their values of it as Optuna's plots write them."""
    shown = [(trial, one) for trial, one in points if key in trial.params]
    return shown, [repr(t.params[key]) if categories else t.params[key] for t, _ in shown]


def _contour_on_plotly(points: _Points, parameters: Sequence[str], figure: Any) -> None:
    from plotly import graph_objects

    if not points:
        return
    place = [[_written(trial.params[key]) for trial, _ in points] for key in parameters]
    marker = {"color": _PALE, "size": 7, "line": {"width": 1, "color": "white"}}
    text = [f"trial {trial.number}: {one.value:.4f}" for trial, one in points]
    trace = {"mode": "markers", "marker": marker, "name": _STOPPED, "text": text, "showlegend": True}
    figure.add_trace(graph_objects.Scatter(x=place[0], y=place[1], **trace))
    figure.update_layout(legend={"orientation": "h", "y": 1.08})


def _contour_on_matplotlib(points: _Points, parameters: Sequence[str], axes: Sequence[Any]) -> None:
    numbers = [
        [trial.params[key] for key in parameters]
        for trial, _ in points
        if all(isinstance(trial.params[key], int | float) for key in parameters)
    ]
    if numbers:
        x, y = zip(*numbers, strict=True)
        axes[0].scatter(x, y, color=_PALE, edgecolors="white", s=28, zorder=3, label=_STOPPED)
        axes[0].legend(loc="upper right")


def _written(value: Any) -> Any:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _lines_on_plotly(any_stopped: bool, figure: Any) -> None:
    """Name the two styles of lines, and let the stopped trials' be paler."""
    for trace in figure.data if any_stopped else ():
        dotted = getattr(getattr(trace, "line", None), "dash", None) == "dot"
        if dotted and trace.name is None:
            trace.opacity = 0.25
        if trace.name in ("Feasible", "Infeasible"):
            trace.name = _STOPPED if trace.name == "Infeasible" else "complete"


def _lines_on_matplotlib(any_stopped: bool, axes: Sequence[Any]) -> None:
    legend = axes[0].get_legend()
    for text in legend.get_texts() if any_stopped and legend else ():
        text.set_text(_STOPPED if text.get_text() == "Infeasible" else "complete")
