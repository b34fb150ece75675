"""Recorded sweeps: they have what their trials scored, and what is compared on them is counted rightly."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import optuna
import pytest

from mergelab.sweep.storage import open_storage
from tests.conftest import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "experiments").is_dir(), reason="the experiments are not part of this copy"),
]


def test_a_recorded_sweep_has_what_its_trials_scored(
    arguments: list[str], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = importlib.import_module("experiments.recorded")
    monkeypatch.setattr(sys, "argv", ["mergelab"])
    kept = f"sqlite:///{workplace}/kept.db"
    own = ["task=rte", "sweep=ties", *arguments, "sweep.n_trials=4", "sweep.sampler=random"]
    recorded.record(workplace / "rte.parquet", own)
    found = recorded.Recorded.read(workplace / "rte.parquet")
    assert (len(found.points), found.counts, found.points.shape[1]) == (4, (60,), 2)
    assert len(found.models["rte"]) == 4  # the base and three experts
    sys.argv = [
        "mergelab", "-m", *own, "sweep.evaluation=full", f"sweep.storage={kept}", "sweep.study_name=s", "tracking=none"
    ]  # fmt: skip
    importlib.import_module("mergelab.__main__").main()
    open_storage.cache_clear()
    whole = optuna.load_study(storage=kept, study_name="s").trials
    np.testing.assert_allclose(found.values, [trial.value for trial in whole])


def test_the_page_counts_what_is_measured_and_says_who_wins(workplace: Path) -> None:
    adaptive = importlib.import_module("experiments.adaptive")
    matrix = ROOT / "experiments" / "matrices" / "mini_rte_ties.parquet"
    page = workplace / "look.md"
    page.write_text("# Above\n\n## Evaluations compared on recorded sweeps\n\nstale\n")
    adaptive.main(["--orders", "2", "--page", str(page), str(matrix)])
    text = page.read_text()
    assert text.startswith("# Above\n\n## Evaluations compared")
    assert "stale" not in text
    assert (workplace / "look.png").stat().st_size > 10_000
    rows = {}
    for line in text.splitlines():
        if line.startswith("| mini_rte_ties | 50"):
            _, _, _, way, share, regret, worst, held, _ = (cell.strip() for cell in line.split("|"))
            rows[way] = float(share.rstrip("%")), float(regret.split()[0]), float(worst), held
    assert rows["full"] == (100.0, 0.0, 0.0, "")
    assert rows["adaptive"][0] < rows["pruned"][0] < 60
    assert rows["adaptive"][1] < rows["random subset, 20%"][1]
    assert rows["random subset, 20%"][0] == pytest.approx(21.6)  # 50 on each trial, and the rest of one
    assert rows["adaptive"][3].endswith(" of 95") or rows["adaptive"][3].endswith(" of 96")


def test_simulated_sweeps_measure_what_they_say() -> None:
    recorded, simulated = (importlib.import_module(f"experiments.{name}") for name in ("recorded", "simulated"))
    sweep = recorded.Recorded.read(ROOT / "experiments" / "matrices" / "suite_minilm_ties.parquet")
    short = sweep.ordered(np.arange(12))
    full = simulated.full(short, 0)
    assert full.used == 12 * sweep.size
    for way in (simulated.pruned, simulated.adaptive):
        found = way(short, 0)
        assert found.used < full.used
        assert {0}.issubset(found.whole)
        assert all(value == pytest.approx(full.whole[number]) for number, value in found.whole.items())
    assert not simulated.takes_answers(sweep)  # a correlation is among its metrics
