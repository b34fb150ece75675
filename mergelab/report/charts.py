"""The figures of a group: models with their intervals, a suite's tasks, and each search space."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from mergelab.errors import MergelabError
from mergelab.evaluation.averages import normalised
from mergelab.report.figure import Figure, bars, shown, vertical
from mergelab.report.space import ScoredPoint, space_figures
from mergelab.report.sweeps import fronts, history
from mergelab.report.trials import judged_by, number
from mergelab.tracking import names

if TYPE_CHECKING:
    from mergelab.report.comparison import Group, Row

_MOST_ROWS = 40  # of a chart of models: more cannot be read


def figures(group: Group) -> list[Figure]:
    """Draw a group: models with their intervals, a suite's tasks, and for each sweep or grid its space."""
    found = [*_models(group), *_tasks(group)]
    for trials in group.trials.values():
        metric, less = judged_by([trial.run for trial in trials])
        runs = [trial.run for trial in trials]
        method = runs[0].record.tags.get(names.METHOD, "")
        points = [
            ScoredPoint(f"trial {trial.number}", trial.point, cell.value, cell.low, cell.high, trial.score is None)
            for trial in trials
            if (cell := trial.cell) is not None
        ]
        name = f"{metric} of the selecting examples"
        found += [*history(trials, name, less), *space_figures(points, method, name, less, "trials"), *fronts(trials)]
    for method, points in _varied(group).items():
        found += space_figures(points, method, f"{group.primary} of the reporting examples", group.less, "merges")
    return found


# -------------------------------------------------------------------------------------------------------------- models


def _models(group: Group) -> list[Figure]:
    """Draw each model's score with its interval, and lines at the best expert, the base and the soup."""
    chosen = [row for row in group.ranked if row.role != "merged"]
    chosen += group.merged[: max(1, _MOST_ROWS - len(chosen))]
    rows = [row for row in group.ranked if row in chosen][::-1]
    if len(rows) < 2:
        return []
    data = []
    for role, title in (("base", "base"), ("expert", "experts"), ("merged", "merged")):
        own = [(place, row) for place, row in enumerate(rows) if row.role == role]
        scores = [row.scores[group.primary] for _, row in own]
        if not own:
            continue
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": title,
                "x": [score.value for score in scores],
                "y": [place for place, _ in own],
                "text": [shown(row.label) for _, row in own],
                "error_x": bars([(score.value, score.low, score.high) for score in scores], f"@{role}"),
                "marker": {"color": f"@{role}", "size": 9},
                "hovertemplate": "%{text}<br>%{x:.4f}<extra></extra>",
            }
        )
    best = next((row for row in group.ranked if row.role == "expert"), None)
    soup = next((row for row in group.ranked if row.is_soup or (not row.own_run and "soup" in row.label)), None)
    lines = [(best, "best expert", "@expert", "dot"), (soup, "soup", "@merged", "dash")]
    marks = [vertical(row.scores[group.primary].value, text, colour, dash) for row, text, colour, dash in lines if row]
    layout = {
        "xaxis": {"title": {"text": escape(group.primary)}},
        "yaxis": _named_rows(rows),
        "shapes": [mark["shape"] for mark in marks],
        "annotations": _staggered([mark["annotation"] for mark in marks]),
    }
    hidden = len(group.ranked) - len(rows)
    more = f" The {hidden} merged models that rank lowest are in the table alone." if hidden else ""
    caption = f"Points are scores on the reporting examples, bars 95 % bootstrap intervals.{more}"
    return [Figure("Merged models against base, experts and soup", caption, data, layout, 150 + 24 * len(rows))]


def _named_rows(rows: Sequence[Row]) -> dict[str, Any]:
    """Return an axis with a model at each whole number: names that are cut may be alike."""
    labels = [shown(row.label) for row in rows]
    edges = [-0.6, len(rows) - 0.4]
    return {
        "tickvals": list(range(len(rows))),
        "ticktext": labels,
        "range": edges,
        "automargin": True,
        "zeroline": False,
    }


def _staggered(notes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Let two notes that are near each other stand to both sides."""
    if len(notes) == 2:
        left, right = sorted(notes, key=lambda note: float(note["x"]))
        left["xanchor"], right["xanchor"] = "right", "left"
    return notes


def _tasks(group: Group) -> list[Figure]:
    """Draw, for a suite, each model's score relative to the best expert of the task that it was merged from."""
    if len(group.tasks) < 2:
        return []
    rows = [row for row in group.merged[:_MOST_ROWS] if normalised_scores(group, row)]
    if not rows:
        return []
    rows = rows[::-1]
    values = [normalised_scores(group, row) for row in rows]
    grid = [[scores.get(task) for task in group.tasks] for scores in values]
    flat = [value for line in grid for value in line if value is not None]
    reach = max(0.02, *(abs(value - 1) for value in flat))
    data = {
        "type": "heatmap",
        "x": [escape(task) for task in group.tasks],
        "y": list(range(len(rows))),
        "text": [[shown(row.label)] * len(group.tasks) for row in rows],
        "z": grid,
        "zmin": 1 - reach,
        "zmax": 1 + reach,
        "colorscale": [[0, "@worse"], [0.5, "@even"], [1, "@better"]],
        "texttemplate": "%{z:.3f}",
        "colorbar": {"title": {"text": "relative"}, "thickness": 12},
        "hovertemplate": "%{text} on %{x}: %{z:.4f}<extra></extra>",
    }
    layout = {"yaxis": _named_rows(rows), "xaxis": {"side": "top"}}
    caption = "Each task's score relative to its own best expert: 1 is as good as not merging, more is better."
    return [Figure("Normalised scores by task", caption, [data], layout, 140 + 30 * len(rows))]


def normalised_scores(group: Group, row: Row) -> dict[str, float]:
    """Return a model's score of each task of a suite relative to the task's best expert, where both are known."""
    found: dict[str, float] = {}
    for task in group.tasks:
        column = next((column for column in group.columns if column.name.startswith(f"{task}/")), None)
        if column is None or column.name not in row.scores or column.less is None:
            continue
        experts = [other.scores[column.name].value for other in group.experts_of(row) if column.name in other.scores]
        if not experts:
            continue
        best, own = (min if column.less else max)(experts), row.scores[column.name].value
        try:
            found |= normalised({task: own}, {task: best}, [task] if column.less else [])
        except MergelabError:  # the expert's score is no measure
            continue
    return found


# ------------------------------------------------------------------------------------------------------- search spaces


def _varied(group: Group) -> dict[str, list[ScoredPoint]]:
    """Return, by method, the merges of grids and single runs in the numbers that differ between them."""
    found: dict[str, list[ScoredPoint]] = {}
    for row in group.merged:
        if row.own_run and row.run.kind == "merge":
            params = row.run.record.params
            at = {
                key: value
                for key, text in params.items()
                if key.startswith("method.") and (value := number(text)) is not None
            }
            score = row.scores[group.primary]
            point = ScoredPoint(row.label, at, score.value, score.low, score.high, False)
            found.setdefault(row.run.record.tags.get(names.METHOD, ""), []).append(point)
    return found
