"""Figures of a search space: curves over parameters with the paper's defaults, importance, contour."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from mergelab.config import CONF_DIR
from mergelab.report.figure import Figure, bars, sentence, short, shown, vertical

_FEW_POINTS = 4  # below, a curve, a contour or an importance says nothing
_TREES, _MANY_POINTS = 64, 100  # of the forest that importance is read from
_GRID = 40  # points of a contour along each side


@dataclass(frozen=True)
class ScoredPoint:
    """A merge in the space of its parameters: where, its score with bounds, and whether that is an estimate."""

    label: str
    at: Mapping[str, float | str]
    value: float
    low: float | None
    high: float | None
    estimated: bool


def space_figures(points: Sequence[ScoredPoint], method: str, name: str, less: bool, of: str) -> list[Figure]:
    """Draw a curve over each number that varies, the contour over the two that matter most, and their importance.

    Args:
        points: the merges.
        method: what they were made with.
        name: of the score.
        less: whether less of it is better.
        of: whose the points are, in the plural: ``trials``.
    """
    keys = [key for key in dict.fromkeys(key for point in points for key in point.at) if _is_curve(points, key)]
    defaults = paper_defaults(method)
    found = [_curve(points, key, defaults.get(key), name, method, of) for key in keys]
    weights = importances(points, less) if len(points) >= _FEW_POINTS else {}
    if len(weights) > 1:
        found.append(_importance(weights, name, method, of))
        keys.sort(key=lambda key: -weights.get(key, 0))
    if len(keys) > 1:
        found += _contour(points, keys[0], keys[1], defaults, name, method, of)
    return found


def _is_curve(points: Sequence[ScoredPoint], key: str) -> bool:
    values = {point.at.get(key) for point in points}
    return len(values - {None}) >= 3 and all(isinstance(value, float) for value in values - {None})


def paper_defaults(method: str) -> dict[str, float]:
    """Return the numbers that a method's paper proposes, by config key: those of its file in ``conf/method``."""
    from omegaconf import OmegaConf

    file = CONF_DIR / "method" / f"{method}.yaml"
    if not re.fullmatch(r"\w+", method) or not file.is_file():
        return {}
    return {
        f"method.{key!s}": float(value)
        for key, value in OmegaConf.load(file).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _curve(points: Sequence[ScoredPoint], key: str, default: float | None, name: str, method: str, of: str) -> Figure:
    own = sorted((point for point in points if key in point.at), key=lambda point: float(point.at[key]))
    data = []
    for estimated, title in ((False, "measured on all examples"), (True, "estimate of a stopped trial")):
        part = [point for point in own if point.estimated == estimated]
        if part:
            data.append(markers(part, [float(point.at[key]) for point in part], title, estimated))
    only = sum(_is_curve(points, other) for other in own[0].at) == 1
    if only and len({point.at[key] for point in own}) == len(own) and not any(point.estimated for point in own):
        data[0] |= {"mode": "lines+markers"}
    mark = None if default is None else vertical(default, f"paper's default {default:g}", "@mark", "dash")
    layout = {
        "xaxis": {"title": {"text": escape(short(key))}},
        "yaxis": {"title": {"text": escape(name)}},
        "shapes": [] if mark is None else [mark["shape"]],
        "annotations": [] if mark is None else [mark["annotation"]],
    }
    others = "" if only else "; the other parameters vary too"
    paler = " Paler points are estimates of trials that were stopped early, with their bounds."
    caption = f"Each point is a merge of {method}{others}."
    caption += paler * any(point.estimated for point in own)
    return Figure(f"{short(key)} of {method}: {of}", caption, data, layout)


def markers(points: Sequence[ScoredPoint], x: Sequence[float], title: str, estimated: bool) -> dict[str, Any]:
    """Return points at ``x`` with their bounds; estimates are paler."""
    colour = "@estimate" if estimated else "@merged"
    bounds = [(point.value, point.low, point.high) for point in points]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": title,
        "x": list(x),
        "y": [point.value for point in points],
        "error_y": {**bars(bounds, colour), "visible": any(low is not None for _, low, _ in bounds)},
        "marker": {"color": colour, "size": 7 if estimated else 9, "symbol": "circle-open" if estimated else "circle"},
        "text": [shown(point.label) for point in points],
        "hovertemplate": "%{text}<br>%{x:.4g}: %{y:.4f}<extra></extra>",
    }


def importances(points: Sequence[ScoredPoint], less: bool) -> dict[str, float]:
    """Return how much of the scores' variance each parameter explains (fANOVA; Hutter et al. 2014), the most first.

    Empty where all scores are alike or there are too few points.
    """
    import optuna

    keys = [key for key in points[0].at if len({point.at.get(key) for point in points}) > 1]
    whole = [point for point in points if all(key in point.at for key in keys)]
    if len(whole) < _FEW_POINTS or len(keys) < 2 or len({point.value for point in whole}) < 2:
        return {}
    spaces = {key: _distribution([point.at[key] for point in whole]) for key in keys}
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = optuna.create_study(direction="minimize" if less else "maximize")
        for point in whole:
            params = {key: point.at[key] for key in keys}
            study.add_trial(optuna.trial.create_trial(params=params, distributions=spaces, value=point.value))
        trees = _TREES if len(whole) <= _MANY_POINTS else _TREES // 4  # the time grows with the square of the points
        evaluator = optuna.importance.FanovaImportanceEvaluator(n_trees=trees, seed=0)
        return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))
    except (ValueError, RuntimeError, ZeroDivisionError):
        return {}
    finally:
        optuna.logging.set_verbosity(verbosity)


def _distribution(values: Sequence[float | str]) -> Any:
    import optuna

    numbers = [value for value in values if isinstance(value, float)]
    if len(numbers) == len(values):
        return optuna.distributions.FloatDistribution(min(numbers), max(numbers))
    return optuna.distributions.CategoricalDistribution(list(dict.fromkeys(values)))


def _importance(weights: Mapping[str, float], name: str, method: str, of: str) -> Figure:
    keys = list(weights)[::-1]
    data = {
        "type": "bar",
        "orientation": "h",
        "x": [weights[key] for key in keys],
        "y": [escape(short(key)) for key in keys],
        "marker": {"color": "@merged"},
        "texttemplate": "%{x:.2f}",
        "textposition": "outside",
        "textangle": 0,
        "hovertemplate": "%{y}: %{x:.3f}<extra></extra>",
        "showlegend": False,
    }
    layout = {"xaxis": {"title": {"text": "share of the variance"}, "range": [0, 1.08]}, "yaxis": {"automargin": True}}
    caption = f"How much of the variance of {name} each parameter explains (fANOVA), estimates included."
    return Figure(f"Importance of the parameters of {method}: {of}", caption, [data], layout, 150 + 40 * len(keys))


def _contour(
    points: Sequence[ScoredPoint],
    first: str,
    second: str,
    defaults: Mapping[str, float],
    name: str,
    method: str,
    of: str,
) -> list[Figure]:
    """Draw the score over two parameters, interpolated linearly between the points."""
    from scipy.interpolate import LinearNDInterpolator
    from scipy.spatial import QhullError

    own = [point for point in points if first in point.at and second in point.at]
    x = np.array([float(point.at[first]) for point in own])
    y = np.array([float(point.at[second]) for point in own])
    z = np.array([point.value for point in own])
    if len(own) < 2 * _FEW_POINTS:
        return []
    across, up = np.linspace(x.min(), x.max(), _GRID), np.linspace(y.min(), y.max(), _GRID)
    places = np.stack([x, y], axis=1)
    distinct, inverse = np.unique(places, axis=0, return_inverse=True)
    means = np.bincount(inverse.ravel(), z) / np.bincount(inverse.ravel())
    try:
        surface = LinearNDInterpolator(distinct, means, rescale=True)(*np.meshgrid(across, up))
    except (QhullError, ValueError):  # the points lie on a line
        return []
    data: list[dict[str, Any]] = [
        {
            "type": "contour",
            "x": across.tolist(),
            "y": up.tolist(),
            "z": [[None if math.isnan(value) else value for value in line] for line in surface.tolist()],
            "colorscale": "Viridis",
            "contours": {"coloring": "heatmap"},
            "line": {"width": 0.5},
            "ncontours": 14,
            "colorbar": {"thickness": 12},
            "hovertemplate": "%{x:.3g}, %{y:.3g}: %{z:.4f}<extra></extra>",
            "showlegend": False,
        }
    ]
    for estimated, title in ((False, "measured"), (True, "estimate")):
        part = [point for point in own if point.estimated == estimated]
        if part:
            marks = markers(part, [float(point.at[first]) for point in part], title, estimated)
            marks |= {"y": [float(point.at[second]) for point in part], "text": [_hover(point) for point in part]}
            marks["marker"] = {
                "color": "#ffffff",
                "size": 7,
                "symbol": "circle",
                "line": {"color": "#222222", "width": 1},
            }
            marks["marker"] |= {"opacity": 0.45} if estimated else {}
            data.append({**marks, "error_y": {"visible": False}, "hovertemplate": "%{text}<extra></extra>"})
    if first in defaults and second in defaults:
        mark = {"color": "@mark", "size": 13, "symbol": "x", "line": {"color": "#ffffff", "width": 1.5}}
        at = {"x": [defaults[first]], "y": [defaults[second]], "marker": mark}
        text = f"paper's default: {short(first)} {defaults[first]:g}, {short(second)} {defaults[second]:g}"
        data.append({"type": "scatter", "mode": "markers", "name": "paper's default", **at, "hovertemplate": text})
    axes = {"xaxis": {"title": {"text": escape(short(first))}}, "yaxis": {"title": {"text": escape(short(second))}}}
    caption = f"{name}, interpolated linearly between the merges (points); nothing is drawn where there are none."
    return [Figure(f"{short(first)} and {short(second)} of {method}: {of}", sentence(caption), data, axes, 460)]


def _hover(point: ScoredPoint) -> str:
    return f"{shown(point.label)}<br>{'estimate ' if point.estimated else ''}{point.value:.4f}"
