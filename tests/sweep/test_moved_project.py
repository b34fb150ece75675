"""A project folder that was moved between two commands, and runs that were deleted in the UI: sweeps and grids."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import pytest
from mlflow import MlflowClient

from mergelab.tracking.sqlite_urls import sqlite_url
from tests.conftest import Outcome

pytestmark = pytest.mark.slow

Command = Callable[..., Outcome]
SWEEP = ("-m", "sweep=task_arithmetic", "tracking.experiment=moved")


def store(folder: Path) -> Any:
    return MlflowClient(sqlite_url(folder / "outputs" / "mlflow.db"))


def runs(client: Any) -> list[Any]:
    return list(client.search_runs([client.get_experiment_by_name("moved").experiment_id]))


def kind(run: Any) -> str:
    return str(run.data.tags["mergelab.kind"])


def artifacts(run: Any) -> Path:
    return Path(url2pathname(urlsplit(run.info.artifact_uri).path))


def test_a_sweep_and_a_grid_go_on_in_a_project_that_was_moved(
    mergelab_command: Command, arguments: list[str], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = mergelab_command(*SWEEP, *arguments, "sweep.n_trials=2")
    assert first.code == 0, first
    (parent,) = (run for run in runs(store(workplace)) if kind(run) == "sweep")
    there = workplace.with_name("50% of a?b")
    monkeypatch.chdir(workplace.parent)
    workplace.rename(there)
    monkeypatch.chdir(there)
    monkeypatch.setenv("MERGELAB_CACHE", str(there / "cache"))
    second = mergelab_command(*SWEEP, *arguments, "sweep.n_trials=3")
    assert "3 in all, 2 of them there already" in second.out, second
    grid = mergelab_command(
        "-m", "method=soup,median", *arguments, "tracking.experiment=moved", "tracking.log_model=best"
    )
    assert grid.code == 0, grid

    found = runs(store(there))
    assert [run.info.run_id for run in found if kind(run) == "sweep"] == [parent.info.run_id]
    assert len([run for run in found if kind(run) == "trial"]) == 3
    assert {artifacts(run).parent.parent for run in found} == {there / "outputs" / "mlartifacts" / "moved"}
    assert all((artifacts(run) / "config.yaml").is_file() for run in found if kind(run) in ("trial", "sweep", "merge"))
    (sweep,) = (run for run in found if kind(run) == "sweep")
    assert len((artifacts(sweep) / "trials.csv").read_text().splitlines()) == 4
    assert len(list((there / "outputs" / "mlartifacts" / "moved").glob("models/*/artifacts/model/*.safetensors"))) == 1
    assert not workplace.exists()
    assert list(there.parent.glob("50*")) == [there]


def test_a_sweep_whose_run_was_deleted_gets_another_that_has_its_trials(
    mergelab_command: Command, arguments: list[str], workplace: Path
) -> None:
    assert mergelab_command(*SWEEP, *arguments, "sweep.n_trials=2").code == 0
    client = store(workplace)
    (parent,) = (run for run in runs(client) if kind(run) == "sweep")
    client.delete_run(parent.info.run_id)
    outcome = mergelab_command(*SWEEP, *arguments, "sweep.n_trials=3")
    assert outcome.code == 0, outcome
    (again,) = (run for run in runs(client) if kind(run) == "sweep")
    below = [run for run in runs(client) if run.data.tags.get("mlflow.parentRunId") == again.info.run_id]
    assert sorted(run.data.tags["mergelab.trial"] for run in below if kind(run) == "trial") == ["0", "1", "2"]
    assert again.info.status == "FINISHED"
    assert len((artifacts(again) / "trials.csv").read_text().splitlines()) == 4


def test_a_deleted_experiment_is_one_line_in_every_kind_of_command(
    mergelab_command: Command, arguments: list[str], workplace: Path
) -> None:
    assert mergelab_command(*arguments, "method=soup", "tracking.experiment=moved").code == 0
    client = store(workplace)
    client.delete_experiment(client.get_experiment_by_name("moved").experiment_id)
    for command in (["method=soup"], ["-m", "method=soup,median"], ["-m", "sweep=task_arithmetic"]):
        outcome = mergelab_command(*command, *arguments, "tracking.experiment=moved")
        assert outcome.code == 2, outcome
        (line,) = (line for line in outcome.err.splitlines() if "error" in line)
        assert line.startswith("error: experiment moved was deleted; restore it with `"), outcome
