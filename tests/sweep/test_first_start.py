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

# Forks a process for each argument after everything is imported; they go on when all are there.
TOGETHER = """
import os, sys, traceback
IMPORTS

wait, go = os.pipe()
children = []
for argument in sys.argv[1:]:
    children.append(os.fork())
    if children[-1] == 0:
        os.close(go)
        os.read(wait, 1)
        code = 0
        try:
            work(argument)
        except BaseException:
            traceback.print_exc()
            code = 1
        os._exit(code)
os.close(go)
sys.exit(sum(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children))
"""
OPEN = """
import optuna, sqlalchemy
from mergelab.sweep.storage import open_storage, storage_url

def work(name):
    storage = open_storage(storage_url(URL, "."))
    study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True)
    study.add_trial(optuna.trial.create_trial(value=1.0))
"""
RECORD = """
import mlflow, mlflow.store.tracking.sqlalchemy_store
from mergelab.tracking import TrackingConfig, open_tracking

def work(name):
    with open_tracking(TrackingConfig()).start_run(name, experiment="rte") as run:
        run.log_text("x", "x.txt")
"""


def together(code: str, names: list[str]) -> None:
    """Run ``work`` on each name, each in a process of its own, all at once."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, "-c", TOGETHER.replace("IMPORTS", code), *names]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["sqlite", "journal", "postgres"])
@pytest.mark.parametrize("names", [["one"], [f"study {number}" for number in range(10)]], ids=["one study", "studies"])
def test_ten_processes_may_open_a_new_storage(
    workplace: Path, kind: str, names: list[str], request: pytest.FixtureRequest
) -> None:
    if kind == "postgres":
        url = request.getfixturevalue("postgres")
    else:
        url = {"sqlite": f"sqlite:///{workplace}/new/sweeps.db", "journal": f"journal:{workplace}/new/log"}[kind]
    together(OPEN.replace("URL", repr(url)), [names[number % len(names)] for number in range(10)])
    storage = (
        optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(f"{workplace}/new/log"))
        if kind == "journal"
        else optuna.storages.RDBStorage(url)
    )
    found = {name: len(optuna.load_study(study_name=name, storage=storage).trials) for name in names}
    assert found == dict.fromkeys(names, 10 // len(names))


def test_ten_processes_may_open_a_new_tracking_store(workplace: Path) -> None:
    together(RECORD, [f"{number}" for number in range(10)])
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
