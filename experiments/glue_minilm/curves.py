"""Scores over λ and density: the points of a grid, as tables with the paper's values marked, and drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import figures
from experiments.resumable import Record, Step

# What each method's paper gives, in the same parametrisation.
PAPERS: Mapping[str, Mapping[str, float]] = {
    "task_arithmetic": {"lambda": 0.3},  # arXiv:2212.04089
    "ties": {"lambda": 1.0, "density": 0.2},  # arXiv:2306.01708
    "dare": {"lambda": 1.0, "density": 0.5},  # arXiv:2311.03099, which has no single value for the density
}


@dataclass(frozen=True)
class Point:
    """One point of a grid.

    Attributes:
        settings: λ, and the density where it is varied.
        selects: the score on the half of the split that selects; of several tasks the normalised average.
        reports: likewise on the half that reports.
        model: all that was measured.
    """

    settings: Mapping[str, float]
    selects: float
    reports: float
    model: Mapping[str, Any]


@dataclass(frozen=True)
class Curve:
    """A grid of one method on one set of models."""

    method: str
    title: str
    points: tuple[Point, ...]

    @property
    def holdout(self) -> Point:
        """The point that the selecting half chooses: the first of equal ones."""
        return max(self.points, key=lambda point: point.selects)

    @property
    def oracle(self) -> Point:
        """The point that is best on the half that reports."""
        return max(self.points, key=lambda point: point.reports)

    @property
    def paper(self) -> Point | None:
        """The point with the paper's values."""
        wanted = PAPERS.get(self.method)
        return next((point for point in self.points if dict(point.settings) == wanted), None)


def curve_of(step: Step, record: Record) -> Curve:
    """Return what a grid's step has measured."""
    method = step.name.partition(" ")[0]
    found = []
    for model in record["points"]:
        if len(model["results"]) > 1:
            selects, reports = model["select_normalised"], model["normalised"]
        else:
            (result,) = model["results"].values()
            selects, reports = result["select"][result["primary"]], result["report"][result["primary"]]["value"]
        found.append(Point(model["settings"], selects, reports, model))
    return Curve(method, f"{step.part}: {step.of.replace('+', ', ')}", tuple(found))


def table(curve: Curve) -> str:
    """Return the scores on both halves: a row for each density, a column for each λ, the paper's point in bold."""
    lambdas = sorted({point.settings["lambda"] for point in curve.points})
    densities = sorted({point.settings.get("density", 1.0) for point in curve.points})
    at = {(point.settings["lambda"], point.settings.get("density", 1.0)): point for point in curve.points}
    swept = "density" in curve.points[0].settings
    lines = [
        f"| {curve.method}{', density' if swept else ''} | " + " | ".join(f"λ = {own:g}" for own in lambdas) + " |"
    ]
    lines.append("| --- | " + " | ".join("---" for _ in lambdas) + " |")
    for density in densities:
        cells = []
        for value in lambdas:
            point = at[value, density]
            text = f"{point.reports:.3f} ({point.selects:.3f})"
            cells.append(f"**{text}**" if point is curve.paper else text)
        lines.append(f"| {f'{density:g}' if swept else ''} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(curves: Sequence[Curve], file: Path) -> None:
    """Draw the scores over λ: a panel for each grid, a line for each half of the split, at each λ's best density."""
    rows = list(dict.fromkeys(curve.title for curve in curves))
    methods = list(dict.fromkeys(curve.method for curve in curves))
    figure, axes = figures.panels(len(rows), len(methods))
    for curve in curves:
        axis = axes[rows.index(curve.title)][methods.index(curve.method)]
        for name in ("selects", "reports"):
            best: dict[float, float] = {}
            for point in curve.points:
                value, score = point.settings["lambda"], getattr(point, name)
                best[value] = max(best.get(value, score), score)
            axis.plot(list(best), list(best.values()), marker="o", markersize=3, label=f"half that {name}")
        if curve.method in PAPERS:
            axis.axvline(PAPERS[curve.method]["lambda"], linestyle=":", color="grey", label="paper's λ")
        figures.describe(axis, f"{curve.method}\n{curve.title}", "λ")
    figures.save(figure, file)
