"""Samplers by their short names, and what is wrong about a sampler's setting."""

from __future__ import annotations

from typing import Any

import optuna
import pytest

from mergelab.errors import SweepError
from mergelab.sweep.samplers import SAMPLERS, make_sampler
from mergelab.sweep.space import space_from

GRID = space_from({"a.x": "range(0,1,0.25)"}, [])
INTERVAL = space_from({"a.x": "interval(0,1)"}, [])


def test_every_name_is_optunas_sampler() -> None:
    names = {name: type(make_sampler(name, GRID, seed=0, number=0, side_by_side=False)).__name__ for name in SAMPLERS}
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
    sampler = make_sampler(setting, INTERVAL, seed=0, number=0, objectives=2, side_by_side=False)
    assert isinstance(sampler, optuna.samplers.NSGAIISampler)
    assert sampler.population_size == 4


@pytest.mark.parametrize(
    ("setting", "objectives", "message"),
    [
        ("tpa", 1, r"sweep\.sampler=tpa: no such sampler; did you mean 'tpe'\? \(there are tpe, gp, cmaes"),
        ({"n_startup_trials": 3}, 1, "sweep.sampler=None: no such sampler"),
        ({"name": "tpe", "n_start": 3}, 1, r"sweep\.sampler=tpe: .*n_start"),
        ({"name": "nsga2", "population_size": 1}, 1, r"sweep\.sampler=nsga2: .*population_size"),
        ("grid", 1, "sweep.sampler=grid: a.x is an interval; a grid needs values"),
        ("cmaes", 2, "sweep.sampler=cmaes: is for one objective, there are 2"),
    ],
)
def test_a_sampler_that_cannot_be_had_is_one_clear_error(setting: Any, objectives: int, message: str) -> None:
    with pytest.raises(SweepError, match=message):
        make_sampler(setting, INTERVAL, seed=0, number=0, objectives=objectives, side_by_side=False)
