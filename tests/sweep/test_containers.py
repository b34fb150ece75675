"""A sweep goes on in another container: a lease says whether its process lives, not a number or a host's name."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
from mlflow.tracking import MlflowClient

from mergelab.sweep.storage import open_storage

START = """
from mergelab.sweep import leases
leases.RENEW_S, leases.GRACE_S = 0.3, 6.0
from mergelab.__main__ import main
main()
"""
METHOD = """
import time
from pathlib import Path


def between(tensors, share: float):
    if share == 0.2 and Path("gate").exists():
        Path("held").touch()
        while Path("gate").exists():
            time.sleep(0.02)
    return tensors[0] * (1 - share) + tensors[-1] * share
"""
TRIALS = 6
NAMESPACES = ["unshare", "--user", "--map-root-user", "--uts"]
# In a container of its own the process has the number 1, as every other container's first process.
CONTAINER = [*NAMESPACES, "--pid", "--fork", "--mount-proc"]

pytestmark = pytest.mark.slow
Start = Callable[[list[str], list[str], str], subprocess.Popen[bytes]]


@pytest.fixture
def start(workplace: Path) -> Iterator[Start]:
    """Start a command under another host name, in new namespaces; its output is in ``<name>.txt``."""
    if subprocess.run([*CONTAINER, "true"], capture_output=True).returncode:
        pytest.skip("this system has no namespaces for users")
    started = []

    def run(namespaces: list[str], arguments: list[str], name: str) -> subprocess.Popen[bytes]:
        inside = ["sh", "-c", f'hostname {name}; exec "$@"', "sh", sys.executable, "-c", START, *arguments]
        with open(f"{name}.txt", "wb") as out:
            started.append(subprocess.Popen([*namespaces, *inside], stdout=out, stderr=subprocess.STDOUT))
        return started[-1]

    yield run
    for process in started:
        kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        for living in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            living.kill()
        process.wait()


def waiting_in_a_trial(process: subprocess.Popen[bytes], name: str) -> psutil.Process:
    while not Path("held").exists():
        assert process.poll() is None, Path(f"{name}.txt").read_text()
        time.sleep(0.02)
    Path("held").unlink()
    return [process, *psutil.Process(process.pid).children(recursive=True)][-1]


def suspend_between_writes(process: psutil.Process, *databases: Path) -> None:
    """Stop a process where it holds no lock of SQLite, which nobody else could pass."""
    while True:
        process.suspend()
        try:
            for file in databases:
                with closing(sqlite3.connect(file, timeout=0, isolation_level=None)) as database:
                    database.execute("BEGIN IMMEDIATE")
            return
        except sqlite3.OperationalError:
            process.resume()
            time.sleep(0.05)


def study(storage: str, name: str) -> list[Any]:
    open_storage.cache_clear()
    trials = optuna.load_study(storage=open_storage(storage), study_name=name).trials
    return [(trial.params, trial.state, trial.values) for trial in trials]


def check_runs(folder: Path) -> None:
    client = MlflowClient(f"sqlite:///{folder}/outputs/mlflow.db")
    runs = client.search_runs([found.experiment_id for found in client.search_experiments()])
    assert {run.info.status for run in runs} == {"FINISHED"}
    kinds = [run.data.tags["mergelab.kind"] for run in runs]
    assert [kinds.count(kind) for kind in ("sweep", "trial", "report")] == [1, TRIALS, 1]


@pytest.fixture
def sweep(arguments: list[str], workplace: Path) -> list[str]:
    """A sweep whose second trial waits as long as there is a file ``gate``."""
    (workplace / "gated.py").write_text(METHOD)
    fixed = ["-m", "sweep=custom", "method=custom", "method.function=gated.between", "method.share=interval(0,1)"]
    enqueued = "sweep.enqueue=[{method.share: 0.1},{method.share: 0.2}]"
    return [*fixed, *arguments, enqueued, f"sweep.n_trials={TRIALS}", "sweep.pruner=none"]


@pytest.mark.parametrize("kind", ["sqlite", "journal"])
def test_a_killed_sweep_goes_on_in_another_container_but_beside_no_living_one(
    kind: str, start: Start, sweep: list[str], workplace: Path
) -> None:
    storage = {"sqlite": f"sqlite:///{workplace}/s.db", "journal": f"journal:{workplace}/s.log"}[kind]
    sweep = [*sweep, f"sweep.storage={storage}"]
    undisturbed = start(NAMESPACES, [*sweep, "sweep.study_name=undisturbed", "tracking=none"], "quiet")
    assert undisturbed.wait(300) == 0, Path("quiet.txt").read_text()

    sweep += ["sweep.study_name=s"]
    Path("gate").touch()
    first = start(CONTAINER, sweep, "one")
    waiting_in_a_trial(first, "one")
    assert start(CONTAINER, sweep, "two").wait(300) == 2
    assert "error: study s: process 1 on one is sweeping it" in Path("two.txt").read_text()
    kill(first)
    assert len(study(storage, "s")) == 2

    Path("gate").unlink()
    third = start(CONTAINER, sweep, "three")
    assert third.wait(300) == 0, Path("three.txt").read_text()
    assert "process 1 on one has not ended this sweep; waiting 6 s" in Path("three.txt").read_text()
    assert study(storage, "s") == study(storage, "undisturbed")
    check_runs(workplace)


def test_a_process_that_was_taken_for_dead_leaves_the_sweep_to_its_successor(
    start: Start, sweep: list[str], workplace: Path
) -> None:
    sweep = [*sweep, "sweep.study_name=s"]
    Path("gate").touch()
    first = start(CONTAINER, sweep, "one")
    python = waiting_in_a_trial(first, "one")
    suspend_between_writes(python, workplace / "outputs/sweeps.db", workplace / "outputs/mlflow.db")
    Path("gate").unlink()
    second = start(CONTAINER, sweep, "two")
    assert second.wait(300) == 0, Path("two.txt").read_text()
    expected = study(f"sqlite:///{workplace}/outputs/sweeps.db", "s")
    python.resume()
    assert first.wait(60) == 2
    assert "error: study s: another process sweeps it now" in Path("one.txt").read_text()
    assert study(f"sqlite:///{workplace}/outputs/sweeps.db", "s") == expected
    check_runs(workplace)


def test_a_killed_sweep_goes_on_at_once_under_another_host_name(
    start: Start, sweep: list[str], workplace: Path
) -> None:
    sweep = [*sweep, "sweep.study_name=s"]
    Path("gate").touch()
    first = start(NAMESPACES, sweep, "one")
    waiting_in_a_trial(first, "one")
    kill(first)
    Path("gate").unlink()
    second = start(NAMESPACES, sweep, "two")
    assert second.wait(300) == 0, Path("two.txt").read_text()
    assert "waiting" not in Path("two.txt").read_text()
    check_runs(workplace)
