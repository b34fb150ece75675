"""Whole sweeps that measure their trials adaptively: what is measured, what wins, and how a sweep goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from mlflow.tracking import MlflowClient

from mergelab.sweep.adaptive.history import read_history
from mergelab.sweep.adaptive.policy import POLICY
from mergelab.sweep.outcome import TrialOutcome
from mergelab.sweep.storage import open_storage
from mergelab.sweep.study import MEASURED, OUTCOME, WHOLE
from tests.conftest import Outcome

Command = Callable[..., Outcome]


@pytest.fixture
def sweep(mergelab_command: Command, arguments: list[str]) -> Callable[..., Outcome]:
    """``python -m mergelab -m sweep=ties sweep.evaluation=adaptive ...`` on three tiny experts and 60 examples."""

    def run(*more: str, name: str = "ties", code: int = 0) -> Outcome:
        own = ["sweep.evaluation=adaptive", "sweep.study_name=s", "tracking=none"]
        kept = [one for one in own if not any(other.startswith(one.partition("=")[0]) for other in more)]
        outcome = mergelab_command("-m", f"sweep={name}", *arguments, *kept, *more)
        assert outcome.code == code, outcome
        return outcome

    return run


def study(folder: Path, name: str = "s") -> optuna.Study:
    open_storage.cache_clear()
    return optuna.load_study(storage=f"sqlite:///{folder}/outputs/sweeps.db", study_name=name)


def test_trials_are_measured_in_part_and_the_winner_is_a_whole_one(
    sweep: Callable[..., Outcome], workplace: Path
) -> None:
    outcome = sweep("sweep.n_trials=8", "sweep.sampler=random", "tracking=mlflow")
    assert "adaptive evaluation" in outcome.out
    found = study(workplace)
    outcomes = [TrialOutcome.read(trial.user_attrs[OUTCOME]) for trial in found.trials]
    print(outcome.out, outcome.err)
    print([(o.pruned_at, o.values, o.estimate) for o in outcomes])
    print({k: v[OUTCOME] for k, v in found.user_attrs.items() if k.startswith(WHOLE)})
    assert 0
