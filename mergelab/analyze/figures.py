"""The figures of an analysis as Plotly's, for the page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mergelab.analyze.ranks import mean_rank

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from mergelab.analyze.paths import Path
    from mergelab.analyze.result import Analysis

CELL = 46  # pixels of a matrix's cell
HEIGHT = 420


def figures(analysis: Analysis) -> Iterator[tuple[str, str, Figure]]:
    """Yield each figure with its title and what it shows."""
    layers = analysis.layers
    places = list(layers)
    norms = {label: [sums.norms[index] for sums in layers.values()] for index, label in enumerate(analysis.labels)}
    yield "Norm by layer", "The length of each expert's task vector.", _lines(places, norms, "‖τ‖", from_zero=True)
    if analysis.pairs:
        yield from _between(analysis, places)
    if ranks := analysis.ranks_of_layers():
        named = {
            label: [mean_rank([rank.effective for rank in each[index]]) for each in ranks.values()]
            for index, label in enumerate(analysis.labels)
        }
        note = "exp of the entropy of the singular values' shares (Roy & Vetterli 2007), the mean over the matrices."
        yield "Effective rank by layer", note, _lines(list(ranks), named, "effective rank", from_zero=True)
    for path in (analysis.line, analysis.plane):
        if path is not None:
            yield from (_line if len(path.models) == 2 else _plane)(path)


def _between(analysis: Analysis, places: Sequence[str]) -> Iterator[tuple[str, str, Figure]]:
    """Yield the figures of how experts stand to each other."""
    labels, whole, layers = analysis.labels, analysis.whole, list(analysis.layers.values())
    count = range(len(labels))
    named = {(one, other): f"{labels[one]} – {labels[other]}" for one, other in analysis.pairs}
    note = "Of the whole task vectors; an empty cell is undefined, as the angle to a task vector that is 0."
    cosines = [[whole.cosine(one, other) for other in count] for one in count]
    yield "Cosine between experts", note, _matrix(labels, cosines, (-1.0, 1.0), "RdBu")
    each = {name: [sums.cosine(*pair) for sums in layers] for pair, name in named.items()}
    yield "Cosine by layer", "A line for each two experts; a click on a name hides it.", _lines(places, each, "cosine")
    shares = {
        "of the magnitude": [sums.conflict for sums in layers],
        "of the changed entries": [sums.conflict_count for sums in layers],
        f"of the largest {analysis.density:g}": [sums.kept_conflict for sums in layers],
    }
    note = "The share of Σ|τ|, of the changed entries, and of the largest ones, where experts differ in sign."
    yield "Sign conflicts by layer", note, _lines(places, shares, "share in conflict", from_zero=True)
    overlaps = [[whole.overlap(one, other) for other in count] for one in count]
    note = (
        f"|A∩B| / |A∪B| of the largest {analysis.density:g} of each task vector's entries; sets chosen at random have "
        f"{analysis.chance_overlap:.3f}."
    )
    yield "Overlap of the largest entries", note, _matrix(labels, overlaps, (0.0, 1.0), "Blues")
    each = {name: [sums.overlap(*pair) for sums in layers] for pair, name in named.items()}
    yield "Overlap by layer", "A line for each two experts.", _lines(places, each, "overlap", from_zero=True)


def _lines(places: Sequence[str], named: Any, title: str, *, from_zero: bool = False) -> Figure:
    from plotly.graph_objects import Figure, Scatter

    figure = Figure(
        [Scatter(x=list(places), y=values, name=name, mode="lines+markers") for name, values in named.items()]
    )
    figure.update_yaxes(title=title, rangemode="tozero" if from_zero else "normal")
    return _laid_out(figure)


def _matrix(labels: Sequence[str], values: Sequence[Sequence[float | None]], limits: Any, colours: str) -> Figure:
    from plotly.graph_objects import Figure, Heatmap

    text = [["" if value is None else f"{value:.3f}" for value in row] for row in values]
    numbered = [f"{index + 1} {label}" for index, label in enumerate(labels)]
    heatmap = Heatmap(
        z=[list(row) for row in values],
        x=numbered,
        y=numbered,
        zmin=limits[0],
        zmax=limits[1],
        colorscale=colours,
        text=text,
        texttemplate="%{text}",
    )
    figure = Figure(heatmap)
    figure.update_yaxes(autorange="reversed")
    return _laid_out(figure, max(HEIGHT, 160 + CELL * len(labels)))


def _line(path: Path) -> Iterator[tuple[str, str, Figure]]:
    from plotly.graph_objects import Figure, Scatter

    first, last = path.models
    for task, metric in path.metrics.items():
        points = [point for point in path.points if point.task == task]
        figure, places = Figure(), [point.place[0] for point in points]
        if all(point.score is not None for point in points):
            scores: Any = [point.score for point in points]
            bounds = [score.high for score in scores] + [score.low for score in reversed(scores)]
            band = {"fill": "toself", "line": {"width": 0}, "opacity": 0.25, "hoverinfo": "skip"}
            figure.add_trace(Scatter(x=places + places[::-1], y=bounds, name="95 % interval", mode="lines", **band))
            figure.add_trace(Scatter(x=places, y=[s.value for s in scores], name=metric, mode="lines+markers"))
        if all(point.loss is not None for point in points):
            losses = [point.loss for point in points]
            figure.add_trace(Scatter(x=places, y=losses, name="loss", mode="lines+markers", yaxis="y2"))
        figure.update_xaxes(title=f"α: (1−α)·{first} + α·{last}")
        figure.update_layout(
            yaxis={"title": metric}, yaxis2={"title": "loss", "overlaying": "y", "side": "right", "showgrid": False}
        )
        yield f"From {first} to {last}: {task}", "Score and loss of the models in between.", _laid_out(figure)


def _plane(path: Path) -> Iterator[tuple[str, str, Figure]]:
    from plotly.graph_objects import Figure, Heatmap, Scatter

    for task, metric in path.metrics.items():
        points = [point for point in path.points if point.task == task and not point.model]
        measured = {
            "loss": [point.loss for point in points],
            metric: [None if point.score is None else point.score.value for point in points],
        }
        for name, values in measured.items():
            if all(value is None for value in values):
                continue
            x, y = [point.place[0] for point in points], [point.place[1] for point in points]
            figure = Figure(Heatmap(x=x, y=y, z=values, colorscale="Viridis", colorbar={"title": name}))
            corners = list(zip(*path.corners, strict=True))
            marker = {"size": 12, "color": "white", "line": {"width": 2, "color": "black"}}
            figure.add_trace(
                Scatter(
                    x=corners[0], y=corners[1], text=list(path.models), mode="markers+text", marker=marker,
                    textposition="top center", textfont={"color": "white"}, showlegend=False,
                )
            )  # fmt: skip
            figure.update_yaxes(scaleanchor="x")
            note = "Distances are those of the weights (Garipov et al. 2018, arXiv:1802.10026)."
            yield f"The plane of {', '.join(path.models)}: {name} on {task}", note, _laid_out(figure, 640)


def _laid_out(figure: Figure, height: int = HEIGHT) -> Figure:
    figure.update_layout(height=height, margin={"l": 70, "r": 30, "t": 20, "b": 60}, template="plotly_white")
    return figure
