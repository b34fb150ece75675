"""Hydra's sweep syntax gives the distributions that it says, and points of a space become overrides again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from mergelab.errors import SweepError
from mergelab.sweep.space import described, in_cube, space_from

SYNTAX: list[tuple[str, BaseDistribution]] = [
    ("interval(0.1,0.9)", FloatDistribution(0.1, 0.9)),
    ("interval(0,1)", FloatDistribution(0, 1)),
    ("tag(log,interval(1e-10,1e-2))", FloatDistribution(1e-10, 1e-2, log=True)),
    ("int(interval(1,8))", IntDistribution(1, 8)),
    ("tag(log,int(interval(1,8)))", IntDistribution(1, 8, log=True)),
    ("range(1,8,2)", IntDistribution(1, 7, step=2)),
    ("range(0.1,1.0,0.1)", FloatDistribution(0.1, 0.9, step=0.1)),
    ("range(0.9,0,-0.3)", FloatDistribution(0.3, 0.9, step=0.3)),
    ("choice(mean,sum)", CategoricalDistribution(["mean", "sum"])),
    ("choice(true,false)", CategoricalDistribution([True, False])),
    ("choice(0.2,1,auto)", CategoricalDistribution([0.2, 1, "auto"])),
    ("0.2,0.5", CategoricalDistribution([0.2, 0.5])),
]


@pytest.mark.parametrize(("syntax", "expected"), SYNTAX, ids=[syntax for syntax, _ in SYNTAX])
def test_hydras_sweep_syntax_gives_the_distribution_that_it_names(syntax: str, expected: BaseDistribution) -> None:
    found = space_from({"method.x": syntax}, []).distributions["method.x"]
    assert found == expected
    again = space_from({}, [f"method.x={described(found)}"]).distributions["method.x"]
    assert again == found


def test_the_command_line_has_the_last_word_on_a_key() -> None:
    ready = {"method.lambda": "interval(0.2,2.0)", "method.density": "interval(0.05,0.95)", "seed": 3}
    space = space_from(ready, ["method.lambda=interval(0.5,1)", "++method.density=0.3", "task=rte"])
    assert space.distributions == {"method.lambda": FloatDistribution(0.5, 1)}
    jobs = space.overrides({"method.lambda": 0.75})
    assert sorted(jobs) == ["++method.density=0.3", "++method.lambda=0.75", "seed=3", "task=rte"]


def test_a_value_gives_way_to_a_later_interval_of_the_key() -> None:
    space = space_from({"method.lambda": 0.7}, ["method.lambda=interval(0.5,1)", "seed=1"])
    assert space.overrides({"method.lambda": 0.6}) == ["seed=1", "++method.lambda=0.6"]


def test_a_point_reaches_a_job_as_it_was_drawn() -> None:
    space = space_from({"method.a": "choice(true,0.5,some-name)", "method": "choice(ties,dare)"}, [])
    for value, spelled in ((True, "true"), (0.5, "0.5"), ("some-name", "some-name")):
        assert space.overrides({"method.a": value, "method": "ties"}) == [f"++method.a={spelled}", "method=ties"]
    odd = 0.1 + 0.2
    assert float(space.overrides({"method.a": odd})[0].partition("=")[2]) == odd


def test_edges_reach_every_end_and_every_choice() -> None:
    space = space_from({"a.x": "interval(0,1)", "a.y": "choice(p,q,r)"}, [])
    edges = space.edges()
    assert {edge["a.x"] for edge in edges} == {0.0, 1.0}
    assert {edge["a.y"] for edge in edges} == {"p", "q", "r"}
    assert all(space.check_point(edge) is None for edge in edges)


def test_a_grid_lists_every_value_of_every_dimension() -> None:
    space = space_from({"a.x": "range(0.1,0.5,0.1)", "a.n": "range(2,8,3)", "a.c": "choice(p,q)"}, [])
    assert space.grid() == {"a.x": [0.1, 0.2, 0.3, 0.4], "a.n": [2, 5], "a.c": ["p", "q"]}
    assert space.grid_size() == 16
    with pytest.raises(SweepError, match=r"grid: a\.x is an interval; a grid needs values: a\.x=range\(0,1,<step>\)"):
        space_from({"a.x": "interval(0,1)"}, []).grid()


@pytest.mark.parametrize(
    ("point", "reason"),
    [
        ({"a.x": 0.5, "a.y": "p"}, None),
        ({"a.x": 0.5}, "it has no a.y"),
        ({"a.x": 0.5, "a.y": "p", "a.z": 1}, "a.z is not swept"),
        ({"a.x": 1.5, "a.y": "p"}, "a.x=1.5 is outside of interval(0,1)"),
        ({"a.x": 0.5, "a.y": "s"}, "a.y=s is outside of choice(p,q)"),
        ({"a.x": "much", "a.y": "p"}, "a.x=much is outside of interval(0,1)"),
    ],
)
def test_a_point_outside_of_the_space_is_told_so(point: dict[str, Any], reason: str | None) -> None:
    assert space_from({"a.x": "interval(0,1)", "a.y": "choice(p,q)"}, []).check_point(point) == reason


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["task=rte"], "the search space is empty; say what varies"),
        (["a.x=interval(1,0)"], r"a\.x=interval\(1,0\): the first number must be less than the second"),
        (["a.x=interval(1,1)"], "must be less than the second"),
        (["a.x=tag(log,interval(0,1))"], "must start above 0"),
        (["a.x=tag(ln,interval(0,1))"], r"a\.x: no tag 'ln' \(there is log\)"),
        (["a.x=range(1,1,0.1)"], r"a\.x: range\(1,1,0\.1\) has no values"),
    ],
)
def test_a_space_that_is_none_is_told_so(arguments: Sequence[str], message: str) -> None:
    with pytest.raises(SweepError, match=message):
        space_from({}, arguments)


@pytest.mark.parametrize("interval", ["interval(0,inf)", "interval(-inf,1)", "interval(nan,1)"])
def test_the_ends_of_an_interval_are_finite(interval: str) -> None:
    with pytest.raises(SweepError, match=r"a\.x=interval\(.*the ends must be finite numbers"):
        space_from({"a.x": interval}, [])


def test_a_grid_that_no_memory_holds_is_refused() -> None:
    with pytest.raises(SweepError, match=r"a\.x has 1\d* values; at most 1000000 fit"):
        space_from({"a.x": "range(0,1,1e-11)"}, []).grid()


def test_points_lie_in_a_unit_cube_with_choices_at_distance_one() -> None:
    distributions = {
        "b": FloatDistribution(0.01, 1.0, log=True),
        "a": IntDistribution(2, 6),
        "c": CategoricalDistribution(["x", "y"]),
        "d": FloatDistribution(3.0, 3.0),
    }
    one = in_cube({"a": 3, "b": 0.1, "c": "x", "d": 3.0}, distributions)
    other = in_cube({"d": 3.0, "c": "y", "b": 0.1, "a": 3}, distributions)
    assert one[:2] == pytest.approx([0.25, 0.5])
    assert np.linalg.norm(one - other) == pytest.approx(1.0)
    assert in_cube({"a": 6, "b": 1.0, "c": "y", "d": 3.0}, distributions).max() <= 1
