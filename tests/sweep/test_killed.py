"""A sweep that is killed again and again ends as one that is not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
from mlflow.tracking import MlflowClient

from mergelab.sweep.storage import open_storage
from mergelab.sweep.study import LATER, OUTCOME

TRIALS, KILLS = 9, 4
# Starts ``python -m mergelab`` again and again as forks of one process, so that imports are paid once. The first is
# killed while it starts up, the others a random while after two more trials.
STARTER = """
import os, random, signal, sys, time, traceback
import torch
torch.set_num_threads(1)
import mlflow.store.tracking.sqlalchemy_store, optuna.storages, pyarrow.parquet, scipy.stats, transformers
import mergelab.sweep.run, mergelab.tracking, mergelab.sweep.trial
from mergelab.__main__ import main

def start(arguments):
    pid = os.fork()
    if pid:
        return pid
    try:
        with open("out.txt", "a") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        sys.argv = ["mergelab", *arguments]
        main()
    except SystemExit as end:
        os._exit(end.code or 0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)

def told():
    return open("out.txt").read().count("\\ntrial ") if os.path.exists("out.txt") else 0

rng, kills, killed, before = random.Random(int(sys.argv[1])), int(sys.argv[2]), 0, told()
while True:
    pid = start(sys.argv[3:])
    if killed < kills:
        while told() - before < 2 * killed and os.waitpid(pid, os.WNOHANG) == (0, 0):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3) if killed else rng.uniform(0.2, 2))
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if not os.WIFSIGNALED(status):
        sys.exit(os.WEXITSTATUS(status) or killed != kills)
    killed += 1
"""


@pytest.mark.slow
def test_a_sweep_killed_again_and_again_ends_as_an_undisturbed_one(arguments: list[str], workplace: Path) -> None:
    sweep = ["-m", "sweep=task_arithmetic", *arguments, f"sweep.n_trials={TRIALS}"]
    disturbed = [*sweep, "sweep.study_name=disturbed", "sweep.retries=0"]  # no death here is a trial's fault
    for kills, command in (
        (0, [*sweep, "sweep.study_name=undisturbed", "tracking=none"]),
        (KILLS, disturbed),
    ):
        done = subprocess.run(
            [sys.executable, "-c", STARTER, "7", str(kills), *command], capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, (done.stderr, Path("out.txt").read_text())
    found, expected = trials(workplace, "disturbed"), trials(workplace, "undisturbed")
    again = later(workplace, "undisturbed")
    assert len(found) == TRIALS
    assert [(t.params, t.state, t.values) for t in found] == [(t.params, t.state, t.values) for t in expected]
    client = MlflowClient(f"sqlite:///{workplace}/outputs/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("rte").experiment_id])
    (parent,) = (run for run in runs if run.data.tags["mergelab.kind"] == "sweep")
    children = [run for run in runs if run.data.tags["mergelab.kind"] == "trial"]
    assert sorted(int(run.data.tags["mergelab.trial"]) for run in children) == list(range(TRIALS))
    assert {run.info.status for run in (parent, *children)} == {"FINISHED"}
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    for run in children:
        trial = expected[int(run.data.tags["mergelab.trial"])]
        assert float(run.data.params["method.lambda"]) == pytest.approx(trial.params["method.lambda"])
        history = client.get_metric_history(run.info.run_id, "estimate/accuracy")
        assert [one.step for one in history] == ([0, 1] if trial.number in again else [0])
    (report,) = (run for run in runs if run.data.tags["mergelab.kind"] == "report")
    whole = {t.number: t.value for t in expected if t.state.name == "COMPLETE"}
    whole |= {number: one["values"][0] for number, one in again.items() if one["pruned_at"] is None}
    best = max(whole, key=lambda number: (whole[number], -number))
    assert parent.data.tags["mergelab.best_trial"] == report.data.tags["mergelab.trial"] == str(best)


def later(folder: Path, name: str) -> dict[int, Any]:
    """Return the outcomes of the trials that were measured further after they were stopped."""
    study = optuna.load_study(storage=f"sqlite:///{folder}/outputs/sweeps.db", study_name=name)
    known = {key.removeprefix(LATER): value for key, value in study.user_attrs.items() if key.startswith(LATER)}
    return {int(number): value[OUTCOME] for number, value in known.items()}


def trials(folder: Path, name: str) -> list[Any]:
    open_storage.cache_clear()
    return optuna.load_study(storage=f"sqlite:///{folder}/outputs/sweeps.db", study_name=name).trials
