"""Figures of a sweep's trials: history and Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import pairwise

import numpy as np

from mergelab.errors import ConfigError
from mergelab.report.figure import Figure, sentence
from mergelab.report.space import ScoredPoint, markers
from mergelab.report.trials import Trial
from mergelab.tasks.metric import get_metric
from mergelab.tracking import names


def history(trials: Sequence[Trial], name: str, less: bool) -> list[Figure]:
    """Draw the trials' scores in their order, with the best so far."""
    known = [trial for trial in trials if trial.cell is not None]
    complete = [trial for trial in known if trial.score is not None]
    if len(complete) < 2:
        return []
    points = [
        ScoredPoint(f"trial {trial.number}", {}, trial.cell.value, trial.cell.low, trial.cell.high, trial.score is None)
        for trial in known
        if trial.cell is not None
    ]
    data = []
    for estimated, title in ((False, "complete"), (True, "estimate of a stopped trial")):
        part = [(trial, point) for trial, point in zip(known, points, strict=True) if point.estimated == estimated]
        if part:
            own = [point for _, point in part]
            data.append(markers(own, [float(trial.number) for trial, _ in part], title, estimated))
    best, steps = (np.minimum if less else np.maximum), [trial.score for trial in complete]
    line = {"color": "@mark", "width": 1.6, "shape": "hv"}
    data.append(
        {
            "type": "scatter",
            "mode": "lines",
            "name": "best so far",
            "x": [trial.number for trial in complete],
            "y": best.accumulate(np.array(steps, np.float64)).tolist(),
            "line": line,
            "hoverinfo": "skip",
        }
    )
    layout = {"xaxis": {"title": {"text": "trial"}}, "yaxis": {"title": {"text": escape(name)}}}
    return [Figure("History of the sweep", sentence(f"{name}, trial by trial."), data, layout)]


def fronts(trials: Sequence[Trial]) -> list[Figure]:
    """Draw the trials of several objectives, two at a time, with those that no other is better than in both."""
    wanted = trials[0].run.record.tags.get(names.TASK, "").split(",")
    known = dict.fromkeys(key for trial in trials for key in trial.objectives)
    keys = [next((key for key in known if key.startswith(f"{task}/")), "") for task in wanted]
    keys = [key for key in keys if key]
    found = []
    for first, second in pairwise(keys):
        own = [trial for trial in trials if first in trial.objectives and second in trial.objectives]
        if len(own) > 1:
            found.append(_front(own, first, second))
    return found


def _front(trials: Sequence[Trial], first: str, second: str) -> Figure:
    signs = {key: -1 if _lessens(key) else 1 for key in (first, second)}
    front = pareto(
        [(signs[first] * trial.objectives[first], signs[second] * trial.objectives[second]) for trial in trials]
    )
    data = []
    for member, title, colour in ((False, "trials", "@estimate"), (True, "Pareto front", "@merged")):
        own = sorted(
            (trial for at, trial in enumerate(trials) if (at in front) == member),
            key=lambda trial: trial.objectives[first],
        )
        if own:
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers" if member else "markers",
                    "name": title,
                    "x": [trial.objectives[first] for trial in own],
                    "y": [trial.objectives[second] for trial in own],
                    "text": [f"trial {trial.number}" for trial in own],
                    "marker": {"color": colour, "size": 9},
                    "line": {"color": colour, "width": 1.2, "dash": "dot"},
                    "hovertemplate": "%{text}<br>%{x:.4f}, %{y:.4f}<extra></extra>",
                }
            )
    layout = {"xaxis": {"title": {"text": escape(first)}}, "yaxis": {"title": {"text": escape(second)}}}
    caption = "Complete trials on the selecting examples; no trial is better in both than one on the front."
    return Figure(f"Pareto front of {first} and {second}", caption, data, layout)


def pareto(points: Sequence[tuple[float, float]]) -> set[int]:
    """Return the positions of the points that no other equals or exceeds in both numbers and exceeds in one."""
    return {
        at
        for at, (x, y) in enumerate(points)
        if not any(ox >= x and oy >= y and (ox > x or oy > y) for ox, oy in points)
    }


def _lessens(key: str) -> bool:
    parts = key.split("/")
    for start in range(len(parts)):  # lm-eval's metrics have a slash
        try:
            return get_metric("/".join(parts[start:])).direction == "minimize"
        except ConfigError:
            continue
    return False
