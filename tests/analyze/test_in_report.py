"""The report on merges shows what analyses of the same models found, and nothing of other models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mergelab.tracking import TrackingConfig, names, open_tracking
from tests.conftest import Outcome
from tests.report.conftest import Store, right_on
from tests.report.test_page import Page

Command = Callable[..., Outcome]
OTHERS = ("models.base=./base", "models.experts={a: ./a, c: ./c}")
MODELS = ("models.base=./base", "models.experts={a: ./a, b: ./b}")


def analyse(command: Command, *models: str) -> None:
    outcome = command("analyze", *models, "analyze.rank=true")
    assert outcome.code == 0, outcome.err


def record_merge(*, weights: str = "as analysed") -> None:
    """Record a merge of the models, whose weights are those that the newest analysis read, or others."""
    tracker = open_tracking(TrackingConfig())
    store = Store(tracker, {"base": "./base", "a": "./a", "b": "./b"})
    hashes = {}
    if weights == "as analysed":
        newest = max(tracker.runs({names.KIND: "analysis"}), key=lambda run: run.started)
        hashes = {tag: value for tag, value in newest.tags.items() if tag.endswith(".sha256")}
        assert len(hashes) == 3
    store.run("merge", "method=ties", "task=rte", *MODELS, correct=right_on(150), tags=hashes, name="rte ties")


def page_of(outcome: Outcome) -> tuple[Page, dict[str, Any]]:
    assert outcome.code == 0, outcome.err
    found = Page(Path("report/report.html").read_text(encoding="utf-8"))
    (figures,) = [json.loads(text) for attributes, text in found.scripts if attributes.get("type")]
    return found, figures


def test_the_page_has_the_figures_of_the_newest_analysis_of_its_models(
    mergelab_command: Command, arguments: list[str], workplace: Path
) -> None:
    for models in (MODELS, OTHERS, MODELS):
        analyse(mergelab_command, *models)
    record_merge()
    page, plots = page_of(mergelab_command("report", "rte", "--output=report"))
    newest = max(workplace.glob("outputs/analyses/*/*/analysis.json"), key=lambda file: file.stat().st_mtime_ns)
    found = json.loads(newest.read_text())
    assert page.text.count("Task vectors of") == 1
    assert found["note"].splitlines()[0] in page.text
    drawn = [trace for plot in plots.values() for trace in plot["data"]]
    lines = [trace["y"] for trace in drawn if trace["type"] == "scatter"]
    for key in "ab":
        assert [layer["norm"][key] for layer in found["layers"]] in lines
        assert [layer["effective_rank"][key] for layer in found["layers"] if "effective_rank" in layer] in lines
    matrices = [trace["z"] for trace in drawn if trace["type"] == "heatmap"]
    assert matrices == [found["whole"]["cosine"], found["whole"]["overlap"]]


def test_an_analysis_of_other_models_or_of_other_weights_is_left_out(
    mergelab_command: Command, arguments: list[str]
) -> None:
    analyse(mergelab_command, *OTHERS)
    analyse(mergelab_command, *MODELS)
    record_merge(weights="trained since")
    page, _ = page_of(mergelab_command("report", "rte", "--output=report"))
    assert "Task vectors of" not in page.text
