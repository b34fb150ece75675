"""An analysis as one page that opens without a network, and as a picture."""

from __future__ import annotations

import math
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from mergelab.analyze.figures import figures
from mergelab.analyze.result import DEFINITIONS, Analysis

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; color: #222; }}
h1 {{ font-size: 1.6rem; }} h2 {{ font-size: 1.15rem; margin: 2rem 0 0; }} p {{ margin: .2rem 0; color: #555; }}
pre {{ background: #f4f4f4; padding: .6rem; overflow-x: auto; }} dt {{ font-weight: 600; }} dd {{ margin: 0 0 .4rem; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{note}</p>
<pre>{command}</pre>
{figures}
<h2>Definitions</h2>
<dl>{definitions}</dl>
</body>
</html>
"""


def write_page(analysis: Analysis, file: Path, command: str) -> None:
    """Write the page, with everything that it needs inside.

    Args:
        analysis: what was found.
        file: where to.
        command: what made it.
    """
    parts = []
    for number, (title, note, figure) in enumerate(figures(analysis)):
        drawn = figure.to_html(full_html=False, include_plotlyjs=number == 0, config={"displaylogo": False})
        parts.append(f"<h2>{escape(title)}</h2>\n<p>{escape(note)}</p>\n{drawn}")
    defined = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in DEFINITIONS.items())
    file.write_text(
        _PAGE.format(
            title=escape(f"Task vectors of {analysis.models}"),
            note=escape(analysis.note).replace("\n", "<br>"),
            command=escape(command),
            figures="\n".join(parts),
            definitions=defined,
        ),
        encoding="utf-8",
    )


def write_picture(analysis: Analysis, file: Path) -> None:
    """Write norms, cosines and sign conflicts by layer, the matrix of cosines, and what was measured, as a PNG."""
    from matplotlib.figure import Figure

    drawings = [_norms] + ([_cosines, _cosine_lines, _conflicts] if analysis.pairs else [])
    if analysis.line is not None:
        drawings.append(_line)
    if analysis.plane is not None:
        drawings.append(_plane)
    rows = -(-len(drawings) // 2)
    picture = Figure(figsize=(14, 4.4 * rows), layout="constrained")
    axes = picture.subplots(rows, 2 if len(drawings) > 1 else 1, squeeze=False).ravel()
    for axis, draw in zip(axes, drawings, strict=False):
        draw(analysis, axis)
    for axis in axes[len(drawings) :]:
        axis.set_visible(False)
    picture.suptitle(f"Task vectors of {analysis.models}")
    picture.savefig(file, dpi=110)


def _by_layer(axis: Axes, places: list[str], title: str) -> None:
    axis.set_xticks(range(len(places)), places, rotation=60, ha="right", fontsize=8)
    axis.set_title(title)
    axis.grid(alpha=0.3)


def _norms(analysis: Analysis, axis: Axes) -> None:
    layers = analysis.layers
    for index, label in enumerate(analysis.labels):
        axis.plot([sums.norms[index] for sums in layers.values()], marker="o", label=label)
    _by_layer(axis, list(layers), "norm of the task vector by layer")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=7)


def _cosines(analysis: Analysis, axis: Axes) -> None:
    count, whole = range(len(analysis.labels)), analysis.whole
    values = [[whole.cosine(one, other) for other in count] for one in count]
    filled = [[float("nan") if value is None else value for value in row] for row in values]
    axis.imshow(filled, vmin=-1, vmax=1, cmap="RdBu")
    for one, row in enumerate(values):
        for other, value in enumerate(row):
            shown, dark = ("–", False) if value is None else (f"{value:.2f}", abs(value) > 0.6)
            axis.text(other, one, shown, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    axis.set_xticks(list(count), [str(index + 1) for index in count])
    axis.set_yticks(list(count), [f"{index + 1} {label}" for index, label in enumerate(analysis.labels)], fontsize=7)
    axis.set_title("cosine between experts")


def _cosine_lines(analysis: Analysis, axis: Axes) -> None:
    layers = analysis.layers
    for one, other in analysis.pairs:
        values = [float("nan") if (c := sums.cosine(one, other)) is None else c for sums in layers.values()]
        axis.plot(values, marker=".", label=f"{one + 1}, {other + 1}")
    _by_layer(axis, list(layers), "cosine by layer")
    axis.legend(fontsize=6, ncols=2)


def _conflicts(analysis: Analysis, axis: Axes) -> None:
    layers = analysis.layers
    read = {
        "of the magnitude": [sums.conflict for sums in layers.values()],
        "of the changed entries": [sums.conflict_count for sums in layers.values()],
        f"of the largest {analysis.density:g}": [sums.kept_conflict for sums in layers.values()],
    }
    for label, values in read.items():
        axis.plot([float("nan") if value is None else value for value in values], marker="o", label=label)
    _by_layer(axis, list(layers), "share of sign conflicts by layer")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=7)


def _line(analysis: Analysis, axis: Axes) -> None:
    assert analysis.line is not None
    for task, metric in analysis.line.metrics.items():
        points = [point for point in analysis.line.points if point.task == task]
        scored = [(point.place[0], point.score) for point in points if point.score is not None]
        if scored:
            places = [place for place, _ in scored]
            axis.plot(places, [score.value for _, score in scored], marker="o", label=f"{task} {metric}")
            axis.fill_between(places, [s.low for _, s in scored], [s.high for _, s in scored], alpha=0.2)
    axis.set_xlabel(f"α: (1−α)·{analysis.line.models[0]} + α·{analysis.line.models[1]}")
    axis.set_title("score along the line")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)


def _plane(analysis: Analysis, axis: Axes) -> None:
    assert analysis.plane is not None
    task, metric = next(iter(analysis.plane.metrics.items()))
    points = [point for point in analysis.plane.points if point.task == task and not point.model]
    scores = [math.nan if point.score is None else point.score.value for point in points]
    losses = [math.nan if point.loss is None else point.loss for point in points]
    lossy = not any(map(math.isnan, losses))
    x, y = [point.place[0] for point in points], [point.place[1] for point in points]
    drawn = axis.scatter(x, y, c=losses if lossy else scores, s=160, marker="s")
    axis.figure.colorbar(drawn, ax=axis, label="loss" if lossy else metric)
    for name, corner in zip(analysis.plane.models, analysis.plane.corners, strict=True):
        axis.plot(*corner, "wo", markeredgecolor="black")
        axis.annotate(name, (corner[0], corner[1]), xytext=(4, 6), textcoords="offset points")
    axis.set_aspect("equal")
    axis.set_title(f"plane of {', '.join(analysis.plane.models)} on {task}")
