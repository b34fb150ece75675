"""Processes that are the first in an empty folder, all at once: tables, studies and the tracking store."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import optuna
import pytest

from mergelab.tracking import TrackingConfig, open_tracking
from tests.sweep.servers import postgres, short_folder

__all__ = ["postgres", "short_folder"]

pytestmark = pytest.mark.slow

# Each process has imported everything before it says so, and goes on when all have.
OPEN = """
import sys
import optuna, sqlalchemy
from mergelab.sweep.storage import open_storage, storage_url
print("ready", flush=True)
sys.stdin.readline()
storage = open_storage(storage_url(sys.argv[1], "."))
study = optuna.create_study(storage=storage, study_name=sys.argv[2], load_if_exists=True)
study.add_trial(optuna.trial.create_trial(value=1.0))
"""
RECORD = """
import sys
import mlflow, mlflow.store.tracking.sqlalchemy_store
from mergelab.tracking import TrackingConfig, open_tracking
print("ready", flush=True)
sys.stdin.readline()
with open_tracking(TrackingConfig()).start_run(sys.argv[1], experiment="rte") as run:
    run.log_text("x", "x.txt")
"""


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)


def together(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    ended = [(process.communicate(timeout=240), process.returncode) for process in processes]
    assert [code for _, code in ended] == [0] * len(ended), ended


@pytest.mark.parametrize("kind", ["sqlite", "journal", "postgres"])
@pytest.mark.parametrize("names", [["one"], [f"study {number}" for number in range(10)]], ids=["one study", "studies"])
def test_ten_processes_may_open_a_new_storage(
    workplace: Path, kind: str, names: list[str], request: pytest.FixtureRequest
) -> None:
    if kind == "postgres":
        url = request.getfixturevalue("postgres")
    else:
        url = {"sqlite": f"sqlite:///{workplace}/new/sweeps.db", "journal": f"journal:{workplace}/new/log"}[kind]
    together([start(OPEN, url, names[number % len(names)]) for number in range(10)])
    storage = (
        optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(f"{workplace}/new/log"))
        if kind == "journal"
        else optuna.storages.RDBStorage(url)
    )
    found = {name: len(optuna.load_study(study_name=name, storage=storage).trials) for name in names}
    assert found == dict.fromkeys(names, 10 // len(names))


def test_ten_processes_may_open_a_new_tracking_store(workplace: Path) -> None:
    together([start(RECORD, f"{number}") for number in range(10)])
    runs = open_tracking(TrackingConfig()).runs(experiment="rte", status="FINISHED")
    assert sorted(run.name for run in runs) == [str(number) for number in range(10)]
    assert len(list((workplace / "outputs" / "mlartifacts" / "rte").glob("*/artifacts/x.txt"))) == 10


def test_commands_that_start_together_in_an_empty_folder_all_work(workplace: Path, arguments: list[str]) -> None:
    sweep = ["-m", "sweep=task_arithmetic", "sweep.n_trials=1"]
    commands = [[*sweep, f"sweep.seed={number}"] for number in range(2)] + [["method=soup"], ["-m", "seed=0,1"]]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "MERGELAB_CACHE": "new/cache"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "mergelab", *command, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for command in commands
    ]
    ended = [(process.communicate(timeout=280), process.returncode) for process in processes]
    assert [code for _, code in ended] == [0] * len(commands), ended
    assert len(optuna.get_all_study_names(f"sqlite:///{workplace}/outputs/sweeps.db")) == 2
