"""What analyses of the same models found, for the page: norms, cosines, conflicts, overlaps of task vectors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelab.report.comparison import models_of
from mergelab.report.figure import Figure, shown
from mergelab.tracking import names

if TYPE_CHECKING:
    from mergelab.report.selection import LoggedRun

_COLOURS = ("@expert", "@merged", "@mark", "@base", "@worse")
_DASHES = ("solid", "dash", "dot")
_CELL = 46  # pixels of a matrix's cell


@dataclass(frozen=True)
class ShownAnalysis:
    """An analysis as the page shows it.

    Attributes:
        run: its run.
        title, note: what was analysed, and what is left out of it.
        figures: what was found.
    """

    run: LoggedRun
    title: str
    note: str
    figures: Sequence[Figure]


def of_same_models(analyses: Iterable[LoggedRun], runs: Iterable[LoggedRun]) -> list[LoggedRun]:
    """Return the newest finished analysis of each set of models that one of ``runs`` merges, at each density.

    Models are the same if their weights are: an analysis of a folder whose model was another one then is left out.
    """
    merged = {_models(run) for run in runs if run.kind != "analysis"}
    found: dict[object, LoggedRun] = {}
    for run in sorted(analyses, key=lambda each: -each.record.started):
        if run.record.status == "FINISHED" and _models(run) in merged:
            found.setdefault((_models(run), run.record.params.get("analyze.density")), run)
    return list(found.values())


def _models(run: LoggedRun) -> tuple[frozenset[str], str | None]:
    """Return the models of a run, and which of them is the base."""
    return models_of(run), run.record.tags.get(names.model_hash("base"))


def shown_analyses(
    analyses: Iterable[LoggedRun], read: Callable[[LoggedRun, str], Path | None]
) -> Iterator[ShownAnalysis]:
    """Yield what each analysis found.

    Args:
        analyses: the runs.
        read: returns a local copy of a run's artifact; None where there is none.
    """
    for run in analyses:
        file = read(run, f"{names.ANALYSIS}/{names.ANALYSIS_JSON}")
        found = None if file is None else _read(file)
        if found is not None:
            yield ShownAnalysis(run, f"Task vectors of {found['models']}", found["note"], list(_figures(found)))


def _read(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # damaged
        return None
    return found if isinstance(found, dict) and {"layers", "whole", "experts"} <= found.keys() else None


def _figures(found: Mapping[str, Any]) -> Iterator[Figure]:
    experts, layers, whole = list(found["experts"]), found["layers"], found["whole"]
    labels = [shown(label) for label in found["experts"].values()]
    places, share = [layer["layer"] for layer in layers], f"{found['density']:g}"
    norms = {label: [layer["norm"][name] for layer in layers] for name, label in zip(experts, labels, strict=True)}
    yield _lines("Norm by layer", "The length of each expert's task vector.", places, norms, "‖τ‖")
    if len(experts) > 1:
        note = "Of the whole task vectors; an empty cell is undefined."
        yield _matrix("Cosine between experts", note, labels, whole["cosine"], (-1.0, 1.0))
        conflicts = {
            "of the magnitude": [layer["conflict"] for layer in layers],
            "of the changed entries": [layer["conflict_count"] for layer in layers],
            f"of the largest {share}": [layer["kept_conflict"] for layer in layers],
        }
        note = "The share of Σ|τ|, of the changed entries, and of the largest ones, where experts differ in sign."
        yield _lines("Sign conflicts by layer", note, places, conflicts, "share in conflict")
        note = f"|A∩B| / |A∪B| of the largest {share} of the entries; by chance it is {found['chance_overlap']:.3f}."
        yield _matrix("Overlap of the largest entries", note, labels, whole["overlap"], (0.0, 1.0))
    if layers and "effective_rank" in layers[-1]:
        ranked = [layer for layer in layers if "effective_rank" in layer]
        each = zip(experts, labels, strict=True)
        ranks = {label: [layer["effective_rank"][name] for layer in ranked] for name, label in each}
        note = "exp of the entropy of the singular values' shares, the mean over a layer's matrices."
        yield _lines("Effective rank by layer", note, [layer["layer"] for layer in ranked], ranks, "effective rank")
    if found.get("line"):
        yield from _path(found["line"])


def _lines(
    title: str, note: str, places: Sequence[str], named: Mapping[str, Sequence[float | None]], quantity: str
) -> Figure:
    data = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "x": list(places),
            "y": list(values),
            "name": name,
            "line": {"color": _COLOURS[at % len(_COLOURS)], "dash": _DASHES[at // len(_COLOURS) % len(_DASHES)]},
        }
        for at, (name, values) in enumerate(named.items())
    ]
    return Figure(title, note, data, {"yaxis": {"title": {"text": quantity}, "rangemode": "tozero"}})


def _matrix(
    title: str, note: str, labels: Sequence[str], values: Sequence[Sequence[float | None]], limits: tuple[float, float]
) -> Figure:
    text = [["" if value is None else f"{value:.3f}" for value in row] for row in values]
    numbered = [f"{at} {label}" for at, label in enumerate(labels, 1)]
    heatmap = {
        "type": "heatmap",
        "z": values,
        "x": numbered,
        "y": numbered,
        "zmin": limits[0],
        "zmax": limits[1],
        "colorscale": "RdBu" if limits[0] < 0 else "Blues",
        "text": text,
        "texttemplate": "%{text}",
    }
    height = max(380, 160 + _CELL * len(labels))
    return Figure(title, note, [heatmap], {"yaxis": {"autorange": "reversed"}}, height)


def _path(line: Mapping[str, Any]) -> Iterator[Figure]:
    """Yield the scores along a line between two models, with their intervals."""
    first, last = (shown(name) for name in line["models"])
    for task, metric in line["metrics"].items():
        points = [each for each in line["points"] if each["task"] == task and each["score"] is not None]
        if points:
            places = [each["place"][0] for each in points]
            middle, low, high = ([each["score"][at] for each in points] for at in (0, 1, 2))
            bounds: dict[str, Any] = {
                "type": "data",
                "symmetric": False,
                "array": [top - value for top, value in zip(high, middle, strict=True)],
                "arrayminus": [value - bottom for bottom, value in zip(low, middle, strict=True)],
            }
            curve: dict[str, Any] = {"type": "scatter", "mode": "lines+markers", "x": places, "y": middle}
            curve |= {"error_y": bounds, "line": {"color": _COLOURS[0]}, "showlegend": False}
            axis = {"xaxis": {"title": {"text": f"α: (1−α)·{first} + α·{last}"}}, "yaxis": {"title": {"text": metric}}}
            title = f"From {first} to {last}: {shown(task)}"
            yield Figure(title, "Scores of the models in between, with their intervals.", [curve], axis)
