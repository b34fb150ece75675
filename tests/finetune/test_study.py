"""``experiments/glue_minilm``: the whole study, small: it runs to its page, and does nothing twice."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.finetune.conftest import ROWS, rte, write
from tests.tasks.tiny import sentences

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "experiments").is_dir(), reason="the experiments are not part of this copy"),
]
ARGUMENTS = ("--data-dir", "data", "--work", "work", "--tasks", "rte,mrpc", "--epochs", "1", "--examples", "40")


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch, place: Path) -> Any:
    """The script, with few methods and the tiny BERT as base."""
    main, steps, page = (importlib.import_module(f"experiments.glue_minilm.{name}")
                         for name in ("__main__", "steps", "page"))  # fmt: skip
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    for name, few in {
        "METHODS": ("ties", "no_such_method"),
        "OF_LABELLED": ("fisher",),
        "SIZES": {"fisher": ("method.samples=8",), "adamerging": ("method.steps=2", "method.samples=8")},
        "SWEPT": {"ties": {"lambda": (0.5, 1.0), "density": (0.2,)}},
        "OF_ADAPTERS": ("soup",),
        "LENGTH": 64,
    }.items():
        monkeypatch.setattr(steps, name, few)
    for module in (main, steps, page):
        monkeypatch.setattr(module, "SEEDS", (0, 1))
    monkeypatch.setattr(main, "_minilm", lambda: place / "bert")
    (place / "data").unlink()
    for task, names in (("rte", ("sentence1", "sentence2")), ("mrpc", ("sentence1", "sentence2"))):
        for split, seed in (("train", 0), ("validation", 9)):
            rows = rte(sentences(ROWS, seed))
            write(place / "data" / task, {name: rows[name] for name in (*names, "label", "idx")}, split)
    scores = [float(number % 6) for number in range(20)]
    texts = sentences(20, 5)
    write(place / "data" / "stsb", {"sentence1": texts, "sentence2": texts[::-1], "label": scores}, "validation")
    return main


def test_the_study_runs_to_its_page_and_does_nothing_twice(study: Any, place: Path) -> None:
    said: list[str] = []
    study.main(ARGUMENTS, say=said.append)
    page = (place / "work" / "page.md").read_text()
    failed = [line for line in page.splitlines() if "failed" in line]
    assert len(failed) == 3, failed  # of each of the three sets of models
    assert all("no_such_method failed: error: method=no_such_method: no such option" in line for line in failed)
    assert "Not run" not in page
    assert "cosine" in page.lower()
    assert str(place) not in page
    assert (place / "work" / "lambda.png").stat().st_size > 1000
    assert not list((place / "work").rglob("merged"))
    records = {path.parent.name: path for path in (place / "work" / "steps").glob("*/record.json")}

    ties = json.loads(records["same-task-rte-ties"].read_text())
    model = ties["models"][-1]
    score = model["results"]["rte"]["report"]["accuracy"]
    cells = f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}] | {model['p_value']:.3f} | "
    assert f"| ties | {cells}" in page
    assert f" | {ties['skill']:.3f} | " in page
    # A grid's winner is chosen on the half that selects; with the paper's values it is the merge of before.
    points = json.loads(records["same-task-rte-ties-grid"].read_text())["points"]
    assert [point["settings"] for point in points] == [{"lambda": 0.5, "density": 0.2}, {"lambda": 1.0, "density": 0.2}]
    assert points[1]["results"] == ties["models"][-1]["results"]
    chosen = max(points, key=lambda point: point["results"]["rte"]["select"]["accuracy"])
    assert f"| ties, holdout: lambda {chosen['settings']['lambda']:g}, density 0.2 |" in page
    several = json.loads(records["multi-task-rte+mrpc-ties"].read_text())["models"][-1]
    assert f"| ties | {several['normalised']:.3f} | " in page

    before = {path: path.stat().st_mtime_ns for path in records.values()}
    study.main(ARGUMENTS, say=said.append)
    assert {path: path.stat().st_mtime_ns for path in records.values()} == before
    with pytest.raises(SystemExit, match="is of another command"):
        study.main([*ARGUMENTS, "--examples", "30"], say=said.append)
