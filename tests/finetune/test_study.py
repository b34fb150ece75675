"""``experiments/glue_minilm.py``: the whole study, small: it runs to its page, and does nothing twice."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.finetune.conftest import ROWS, rte, write
from tests.tasks.tiny import sentences

SCRIPT = ROOT / "experiments" / "glue_minilm.py"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SCRIPT.is_file(), reason="the experiments are not part of this copy"),
]


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch, place: Path) -> Any:
    """The script, with few methods and the tiny BERT as base."""
    spec = importlib.util.spec_from_file_location("glue_minilm", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "glue_minilm", module)
    spec.loader.exec_module(module)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    for name, few in {
        "PLAIN": ("ties", "no_such_method"),
        "WITH_DATA": ("fisher",),
        "SWEPT": ("task_arithmetic",),
        "OF_ADAPTERS": ("soup",),
        "SEEDS": (0, 1),
    }.items():
        monkeypatch.setattr(module, name, few)
    monkeypatch.setattr(module, "_minilm", lambda: place / "bert")
    (place / "data").unlink()
    write(place / "data" / "rte", rte(sentences(ROWS, 0)))
    write(place / "data" / "rte", rte(sentences(ROWS, 9)), "validation")
    return module


def test_the_study_runs_to_its_page_and_does_nothing_twice(study: Any, place: Path) -> None:
    arguments = ["--data-dir", "data", "--work", "work", "--tasks", "rte", "--epochs", "1", "--trials", "2"]
    said: list[str] = []
    study.main(arguments, say=said.append)
    page = (place / "work" / "page.md").read_text()
    failed = [line for line in page.splitlines() if "failed" in line]
    assert len(failed) == 1
    assert "| no_such_method | failed: error: method=no_such_method: no such option" in failed[0]
    for row in ("| ties | 0.", "| fisher | 0.", "| task_arithmetic holdout | 0.", "| soup | 0.", "| expert: "):
        assert row in page
    records = {path.parent.name: path for path in (place / "work" / "steps").glob("*/record.json")}
    score = json.loads(records["same-task-rte-ties"].read_text())["models"][-1]["results"]["rte"]["report"]["accuracy"]
    assert f"| ties | {score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}] |" in page

    before = {path: path.stat().st_mtime_ns for path in records.values()}
    study.main(arguments, say=said.append)
    assert {path: path.stat().st_mtime_ns for path in records.values()} == before
    with pytest.raises(SystemExit, match="is of another command"):
        study.main([*arguments, "--examples", "40"], say=said.append)
