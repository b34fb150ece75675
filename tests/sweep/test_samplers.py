"""Samplers by short names or dotted paths, and what is wrong about a sampler's setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest

from mergelab.errors import SweepError
from mergelab.sweep.samplers import SAMPLERS, KnownSampler, make_sampler, sampler_name
from mergelab.sweep.space import space_from

GRID = space_from({"a.x": "range(0,1,0.25)"}, [])
INTERVAL = space_from({"a.x": "interval(0,1)"}, [])


def test_every_name_is_optunas_sampler() -> None:
    names = {name: type(make_sampler(name, GRID, seed=0, number=0, parallel=False)).__name__ for name in SAMPLERS}
    assert names == {
        "tpe": "TPESampler",
        "gp": "GPSampler",
        "cmaes": "CmaEsSampler",
        "qmc": "QMCSampler",
        "random": "RandomSampler",
        "grid": "GridSampler",
        "nsga2": "NSGAIISampler",
    }


def test_options_reach_optunas_class() -> None:
    setting = {"name": "nsga2", "population_size": 4}
    sampler = make_sampler(setting, INTERVAL, seed=0, number=0, objectives=2, parallel=False)
    assert isinstance(sampler, optuna.samplers.NSGAIISampler)
    assert sampler.population_size == 4


MINE = """
import optuna
class Mine(optuna.samplers.RandomSampler):
    def __init__(self, seed, bold=False):
        super().__init__(seed=seed)
        self.seed, self.bold = seed, bold
class Sobol(optuna.samplers.QMCSampler):
    pass
class Seedless(optuna.samplers.RandomSampler):
    def __init__(self):
        super().__init__()
"""


def test_any_sampler_is_named_by_the_dotted_path_of_its_class(workplace: Path) -> None:
    (workplace / "my_sampler.py").write_text(MINE)
    setting = {"name": "my_sampler.Mine", "bold": True}
    made: list[Any] = [make_sampler(setting, INTERVAL, seed=3, number=n, parallel=False) for n in (0, 1)]
    assert all(one.bold for one in made)
    assert made[0].seed != made[1].seed
    again: Any = make_sampler(setting, INTERVAL, seed=3, number=1, parallel=False)
    assert again.seed == made[1].seed


def test_a_sequence_is_one_sequence_under_any_name(workplace: Path) -> None:
    (workplace / "my_sampler.py").write_text(MINE)
    for name in ("qmc", "optuna.samplers.QMCSampler", "my_sampler.Sobol"):
        made: list[Any] = [make_sampler(name, INTERVAL, seed=3, number=n, parallel=False) for n in (0, 1)]
        assert [one._seed for one in made] == [3, 3]
    assert sampler_name("optuna.samplers.GridSampler") == "grid"


def test_a_line_of_the_table_adds_a_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    known = KnownSampler(
        "optuna.samplers.BruteForceSampler", {"avoid_premature_stop": lambda space, parallel: parallel}
    )
    monkeypatch.setitem(SAMPLERS, "brute", known)
    made: Any = make_sampler("brute", GRID, seed=0, number=0, parallel=True)
    assert isinstance(made, optuna.samplers.BruteForceSampler)
    assert made._avoid_premature_stop


@pytest.mark.parametrize(
    ("setting", "objectives", "message"),
    [
        ("tpa", 1, r"sweep\.sampler=tpa: no such sampler; did you mean 'tpe'\? \(there are tpe, gp, cmaes"),
        ({"n_startup_trials": 3}, 1, "sweep.sampler=None: no such sampler"),
        ({"name": "tpe", "n_start": 3}, 1, r"sweep\.sampler=tpe: .*n_start"),
        ({"name": "nsga2", "population_size": 1}, 1, r"sweep\.sampler=nsga2: .*population_size"),
        ("grid", 1, "sweep.sampler=grid: a.x is an interval; a grid needs values"),
        ("cmaes", 2, "sweep.sampler=cmaes: is for one objective, there are 2"),
        ("optuna.samplers.CmaEsSampler", 2, "sweep.sampler=cmaes: is for one objective, there are 2"),
        ({"name": "tpe", "seed": 5}, 1, r"sweep\.sampler=tpe: its seed follows from the sweep's: sweep\.seed=5"),
        ("my_sampler.Seedless", 1, "sweep.sampler=my_sampler.Seedless: Seedless takes no seed"),
        ("optuna.samplers.Tpe", 1, "sweep.sampler=optuna.samplers.Tpe: optuna.samplers has no 'Tpe'"),
        ("optuna.pruners.MedianPruner", 1, "is not a subclass of optuna's BaseSampler"),
    ],
)
def test_a_sampler_that_cannot_be_had_is_one_clear_error(
    workplace: Path, setting: Any, objectives: int, message: str
) -> None:
    (workplace / "my_sampler.py").write_text(MINE)
    with pytest.raises(SweepError, match=message):
        make_sampler(setting, INTERVAL, seed=0, number=0, objectives=objectives, parallel=False)
