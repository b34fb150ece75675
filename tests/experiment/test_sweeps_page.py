"""``experiments/sweeps.py``: what it counts of each sweep, what it calls its winner, and the page that has it."""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from mergelab.sweep.config import SweepConfig
from mergelab.sweep.outcome import TrialOutcome
from mergelab.sweep.space import space_from
from mergelab.sweep.storage import open_storage
from mergelab.sweep.study import LATER, OUTCOME, SweepStudy
from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(not (ROOT / "experiments").is_dir(), reason="the experiments are not in this copy")
TRIALS, SELECTING = 6, 60


@pytest.fixture
def sweeps() -> Any:
    return importlib.import_module("experiments.sweeps")


def stored(folder: Path) -> tuple[list[int], list[float]]:
    """Read from a study how many examples each trial was measured on in all, and the scores of the whole trials."""
    open_storage.cache_clear()
    study = optuna.load_study(storage=open_storage(f"journal:{folder}/study.log"), study_name="s")
    examples, scores = [], []
    for trial in study.trials:
        outcome = study.user_attrs.get(f"{LATER}{trial.number}", trial.user_attrs)[OUTCOME]
        examples.append(outcome["pruned_at"] or outcome["examples"])
        scores += outcome["values"] if outcome["pruned_at"] is None else []
    return examples, scores


@pytest.mark.slow
def test_the_page_has_what_the_sweeps_have_stored(
    sweeps: Any, arguments: list[str], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = sweeps.Setting("tiny", "Tiny models", "Three tiny experts", ("sweep=ties", *arguments), 1, TRIALS)
    monkeypatch.setattr(sweeps, "SETTINGS", (setting,))
    page = workplace / "page.md"
    page.write_text(f"# Another page\n\n{sweeps.RECORDED}\n\nkept\n")
    command = ["--work", ".", "--page", str(page)]
    sweeps.main(command)
    text = page.read_text()
    records = {name: sweeps.run(setting, name, 0, TRIALS, workplace) for name in sweeps.WAYS}
    for name, found in records.items():
        folder = sweeps.folder_of(setting, name, 0, TRIALS, workplace)
        examples, scores = stored(folder)
        winner = json.loads((folder / "result.json").read_text())["models"][-1]
        assert found.examples == found.curve[-1][0] == sum(examples)
        assert found.whole == TRIALS * SELECTING
        assert found.select == found.curve[-1][1] == max(scores)
        assert found.select == pytest.approx(winner["results"]["rte"]["select"]["accuracy"])
        assert found.report == winner["results"]["rte"]["report"]["accuracy"]["value"]
        cells = (
            f"{found.select:.4f} ± 0.0000 | {found.report:.4f} ± 0.0000 | {sum(examples)} ± 0 | {found.share:.0%} | "
        )
        assert f"| {name} | {cells}" in text
        if name.endswith("full"):
            assert found.examples == found.whole
    assert min(found.share for found in records.values()) < 1
    assert "![Best selection score over the share of the examples that was measured](page.png)" in text
    assert page.with_suffix(".png").stat().st_size > 1000
    assert text.endswith(f"\n\n{sweeps.RECORDED}\n\nkept\n")
    assert "Another page" not in text

    before = {path: path.stat().st_mtime_ns for path in workplace.glob("*/record.json")}
    sweeps.main(command)
    assert {path: path.stat().st_mtime_ns for path in workplace.glob("*/record.json")} == before
    assert page.read_text() == text


def test_a_finalist_counts_with_the_rest_of_its_examples_and_can_win(sweeps: Any, tmp_path: Path) -> None:
    space = space_from({"a.x": "interval(0,1)"}, [])
    study = SweepStudy(f"journal:{tmp_path}/study.log", "s", space, SweepConfig(), ["maximize"], {})
    for value, pruned_at in ((0.5, None), (0.7, 30), (0.9, 20)):  # the estimate of the last one is too high
        outcome = TrialOutcome((value,), 100, pruned_at, 0.0, 0.0, None)
        number = study.ask().number
        study.set_attribute(number, OUTCOME, asdict(outcome))
        study.tell(number, outcome.values, estimated_of=None if pruned_at is None else 100)
    for number, value, before in ((2, 0.4, 20), (1, 0.6, 30)):
        study.tell_later(number, asdict(TrialOutcome((value,), 100, None, 0.0, 0.0, None, before=before)), {})
    found = sweeps.measured(study, 3, 0.0, 0.0)
    assert found.curve == [(100, 0.5), (130, 0.5), (150, 0.5), (230, 0.5), (300, 0.6)]
    assert (found.select, found.examples, found.whole) == (0.6, 300, 300)


def test_a_curve_is_the_mean_of_what_was_known_by_then(sweeps: Any) -> None:
    one = sweeps.Measured(0.7, 0.0, 60, 100, 0.0, [(10, 0.5), (40, 0.6), (60, 0.7)])
    two = sweeps.Measured(0.6, 0.0, 40, 100, 0.0, [(20, 0.4), (40, 0.6)])
    shares, best, error = sweeps.mean_curve([one, two])
    assert (shares[0], shares[-1]) == pytest.approx((0.2, 0.5))
    np.testing.assert_allclose(best[[0, -1]], [0.45, 0.65])
    np.testing.assert_allclose(error[[0, -1]], [0.05, 0.05])
    np.testing.assert_allclose(best[(shares > 0.21) & (shares < 0.39)], 0.45)
    np.testing.assert_allclose(best[(shares > 0.41) & (shares < 0.49)], 0.6)
    alone = sweeps.mean_curve([one])
    assert not alone[2].any()
    assert alone[1][-1] == 0.7
