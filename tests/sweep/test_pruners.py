"""Pruners by short names or dotted paths: ours and Optuna's are made, and wrong settings are one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest

from mergelab.errors import SweepError
from mergelab.sweep.pruners import PRUNERS, make_pruner, pruner_name

MINE = """
import optuna
class Stop(optuna.pruners.BasePruner):
    def __init__(self, after: int = 1):
        self.after = after
    def prune(self, study, trial):
        return len(trial.intermediate_values) >= self.after
class NotOne:
    pass
"""


def test_every_name_is_an_optuna_pruner() -> None:
    made = {name: make_pruner(name) for name in PRUNERS}
    assert all(isinstance(pruner, optuna.pruners.BasePruner) for name, pruner in made.items() if name != "none")
    assert {name: type(pruner).__name__ for name, pruner in made.items()} == {
        "futility": "Futility",
        "wilcoxon": "WilcoxonPruner",
        "median": "MedianPruner",
        "halving": "SuccessiveHalvingPruner",
        "none": "NoneType",
    }


def test_any_pruner_is_named_by_the_dotted_path_of_its_class(workplace: Path) -> None:
    pruner = make_pruner({"name": "optuna.pruners.ThresholdPruner", "lower": 0.5})
    assert isinstance(pruner, optuna.pruners.ThresholdPruner)
    (workplace / "my_pruner.py").write_text(MINE)
    own: Any = make_pruner({"name": "my_pruner.Stop", "after": 3})
    assert own.after == 3
    assert isinstance(own, optuna.pruners.BasePruner)


def test_a_class_that_has_a_short_name_is_the_same_under_its_dotted_path() -> None:
    assert pruner_name("optuna.pruners.MedianPruner") == "median"
    pruner: Any = make_pruner({"name": "optuna.pruners.MedianPruner", "n_warmup_steps": 4})
    assert (pruner._n_startup_trials, pruner._n_warmup_steps) == (5, 4)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("wilcoxn", r"sweep\.pruner=wilcoxn: no such pruner; did you mean 'wilcoxon'\?"),
        ({"name": "futility", "probability": 0.7}, r"sweep\.pruner=futility: probability=0\.7: must be between 0 and"),
        ({"name": "futility", "p": 0.1}, r"sweep\.pruner=futility: .*'p'"),
        ({"name": "wilcoxon", "p_threshold": 2}, r"sweep\.pruner=wilcoxon: .*p_threshold"),
        ({"name": "median", "warmup": 2}, r"sweep\.pruner=median: .*warmup"),
        ("nowhere.Pruner", r"sweep\.pruner=nowhere\.Pruner: importing nowhere fails: ModuleNotFoundError"),
        ("optuna.pruners.MedianPrunr", r"optuna\.pruners has no 'MedianPrunr'; did you mean 'MedianPruner'\?"),
        ("optuna.samplers.TPESampler", r"sweep\.pruner=.*TPESampler: is not a subclass of optuna's BasePruner"),
        ("my_pruner.NotOne", "is not a subclass of optuna's BasePruner"),
        ("optuna.create_study", "is not a subclass of optuna's BasePruner"),
        ("a..b", r"sweep\.pruner=a\.\.b: no such pruner"),
    ],
)
def test_a_pruner_that_cannot_be_had_is_one_clear_error(workplace: Path, setting: Any, message: str) -> None:
    (workplace / "my_pruner.py").write_text(MINE)
    with pytest.raises(SweepError, match=message) as caught:
        make_pruner(setting)
    assert "\n" not in str(caught.value)


def test_without_a_pruner_nothing_is_pruned() -> None:
    assert make_pruner("none") is None
