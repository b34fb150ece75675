"""``-q`` prints the result alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mergelab.console.progress import QUIET, say
from tests.conftest import Outcome

pytestmark = pytest.mark.slow

Command = Callable[..., Outcome]
MEASURED = ("task.limit=20", "eval.preflight=false", "eval.bootstrap=10", "method=soup")
FEW = ("sweep.n_trials=2", "sweep.study_name=s")


def table_of(text: str) -> list[str]:
    """The lines of the only table, from its title to its caption."""
    lines = text.splitlines()
    begin = next(at for at, line in enumerate(lines) if line.startswith("┏")) - 1
    end = next(at for at, line in enumerate(lines) if line.startswith("* best of its column"))
    return lines[begin : end + 1]


@pytest.mark.parametrize("flag", ["-q", "--quiet"])
@pytest.mark.parametrize("place", ["first", "last"])
def test_a_run_prints_its_table_alone(mergelab_command: Command, arguments: list[str], flag: str, place: str) -> None:
    told = [*arguments, *MEASURED]
    outcome = mergelab_command(*([flag, *told] if place == "first" else [*told, flag]))
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines() == table_of(outcome.out)
    assert "soup of 3" in outcome.out
    assert outcome.err == ""
    assert QUIET not in os.environ


def test_a_grid_prints_its_table_alone(mergelab_command: Command, arguments: list[str]) -> None:
    outcome = mergelab_command("-q", "-m", *arguments, *MEASURED, "seed=0,1")
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines() == table_of(outcome.out)
    assert "grid of 2" in outcome.out


def test_a_sweep_prints_its_table_and_its_best_point_alone(mergelab_command: Command, arguments: list[str]) -> None:
    outcome = mergelab_command("-m", "sweep=task_arithmetic", "-q", *arguments, *MEASURED[:-1], *FEW)
    assert outcome.code == 0, outcome.err
    table = table_of(outcome.out)
    (best,) = outcome.out.splitlines()[len(table) :]
    assert outcome.out.splitlines()[: len(table)] == table
    assert best.startswith("best: trial ")
    assert "lambda=" in best
    assert "select accuracy" in best


def test_without_the_flag_more_is_printed(mergelab_command: Command, arguments: list[str]) -> None:
    outcome = mergelab_command(*arguments, *MEASURED)
    assert outcome.out.startswith("merge     soup(")
    assert "\nrun " in outcome.out


def test_an_error_is_printed_all_the_same(mergelab_command: Command, workplace: Path) -> None:
    outcome = mergelab_command("-q", "method.density=7")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: method.density=7")


def test_a_failure_on_the_way_goes_to_standard_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(QUIET, "1")
    say("trial 1: select 0.5")
    say("trial 2: failed", failure=True)
    say("best: trial 1", result=True)
    assert capsys.readouterr() == ("best: trial 1\n", "trial 2: failed\n")
