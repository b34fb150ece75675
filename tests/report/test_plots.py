"""A study's plots show all trials: complete ones as Optuna draws them, stopped ones paler with their bounds."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest

from mergelab.report import plots
from mergelab.report.plots import Stopped, draw, page
from mergelab.tracking import names

COMPLETE, PRUNED, FAIL = (getattr(optuna.trial.TrialState, name) for name in ("COMPLETE", "PRUNED", "FAIL"))
STOPPED = {number: Stopped(0.5 + number / 100, 0.4, 0.7) for number in range(2, 12)}


def study(*, objectives: int = 1, categorical: bool = False) -> optuna.Study:
    """Two complete trials, ten that were stopped early, and a failed one."""
    made = optuna.create_study(directions=["maximize"] * objectives)
    x = optuna.distributions.FloatDistribution(0, 1)
    y: Any = optuna.distributions.CategoricalDistribution(["a", "b"]) if categorical else x
    for number in range(13):
        state = COMPLETE if number < 2 or objectives > 1 else FAIL if number == 12 else PRUNED
        params = {"method.x": number / 13, "method.y": "ab"[number % 2] if categorical else (number * 5 % 13) / 13}
        values = {"values": [0.8 - number / 50] * objectives} if state == COMPLETE else {}
        made.add_trial(
            optuna.trial.create_trial(
                state=state, params=params, distributions={"method.x": x, "method.y": y}, **values
            )
        )
    return made


def figures(folder: Path) -> list[dict[str, Any]]:
    """The data of the figures on a page, in their order, and whether they have bounds."""
    text = (folder / names.PLOTS_PAGE).read_text()
    found = []
    for start in re.finditer(r"Plotly\.newPlot\(\s*\"[^\"]+\",\s*", text):
        data, _ = json.JSONDecoder().raw_decode(text[start.end() :])
        found.append(data)
    return found


def traces(data: Any, name: str = "stopped early: estimate") -> list[Any]:
    return [trace for trace in data if trace.get("name") == name]


def numbers(values: Any) -> list[float]:
    """A list of a trace, which Plotly writes as it is or packed."""
    if isinstance(values, dict):
        import base64

        import numpy as np

        return list(np.frombuffer(base64.b64decode(values["bdata"]), dtype=values["dtype"]).astype(float))
    return [float(value) for value in values]


def test_every_plot_has_every_trial_and_every_form(tmp_path: Path) -> None:
    draw(study(), STOPPED, ["accuracy"], tmp_path)
    kinds = {"history", "slices", "importance", "parallel_coordinates", "contour"}
    assert {file.name for file in tmp_path.iterdir()} == {
        *(f"{kind}.{form}" for kind in kinds for form in ("png", "svg")), names.PLOTS_PAGE,
    }  # fmt: skip
    history, slices, _, lines, contour = figures(tmp_path)
    (pale,) = traces(history)
    assert numbers(pale["x"]) == [float(number) for number in STOPPED]
    assert numbers(pale["y"]) == pytest.approx([one.value for one in STOPPED.values()])
    assert numbers(pale["error_y"]["array"]) == pytest.approx([0.7 - one.value for one in STOPPED.values()])
    assert numbers(pale["error_y"]["arrayminus"]) == pytest.approx([one.value - 0.4 for one in STOPPED.values()])
    assert pale["opacity"] < 0.5
    assert [len(numbers(trace["y"])) for trace in traces(slices)] == [10, 10]
    assert len(numbers(traces(contour)[0]["x"])) == 10
    drawn = [trace for trace in lines if trace["mode"] == "lines" and trace["y"] != [None]]
    assert [trace["line"]["dash"] for trace in drawn].count("dot") == 10
    assert len(drawn) == 12


def test_only_complete_trials_are_best(tmp_path: Path) -> None:
    best = {2: Stopped(0.99, 0.9, 1.0)}  # an estimate above every score
    draw(study(), STOPPED | best, ["accuracy"], tmp_path)
    (line,) = traces(figures(tmp_path)[0], "Best Value")
    assert max(numbers(line["y"])) == pytest.approx(0.8)


@pytest.mark.parametrize("made", [lambda: study(categorical=True), lambda: study(objectives=2)], ids=["words", "two"])
def test_plots_of_words_and_of_several_objectives(tmp_path: Path, made: Callable[[], optuna.Study]) -> None:
    one = made()
    several = len(one.directions) > 1
    draw(one, {} if several else STOPPED, ["a", "b"] if several else ["accuracy"], tmp_path)
    assert (tmp_path / ("pareto_front.svg" if several else "slices.png")).is_file()
    if not several:
        assert [len(trace["x"]) for trace in traces(figures(tmp_path)[1])][1] == 10


def test_a_page_needs_no_network_and_has_plotly_once(tmp_path: Path) -> None:
    draw(study(), STOPPED, ["accuracy"], tmp_path)
    text = (tmp_path / names.PLOTS_PAGE).read_text()
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", text)
    assert len(text) < 8_000_000


def test_a_title_is_text() -> None:
    assert "<script>" not in page("<script>", [])


def test_without_a_complete_trial_nothing_is_drawn(tmp_path: Path) -> None:
    draw(optuna.create_study(), {}, ["accuracy"], tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert plots.Stopped(0.5, None, None).above == 0
