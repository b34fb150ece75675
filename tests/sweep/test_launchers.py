"""Sweeps whose trials run in other processes: none is lost and none is done twice, whichever of them is killed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from mlflow.tracking import MlflowClient

from mergelab.sweep.storage import open_storage
from mergelab.sweep.study import OUTCOME
from tests.standins import BERT_BASE, BERT_RTE_EXPERTS, glue_table
from tests.sweep.servers import PASSWORD, end, mlflow_server, postgres, ray_cluster, short_folder
from tests.tracking.conftest import empty_store

pytestmark = pytest.mark.slow

__all__ = ["empty_store", "mlflow_server", "postgres", "ray_cluster", "short_folder"]

_METHOD = '''
import os, time
from pathlib import Path


def between(tensors, share: float):
    """Go from the first to the last, once no gate holds this share; a share of 1 makes a worthless model."""
    gate = Path(f"gate-{share}")
    if gate.exists():
        Path(f"held-{share}-{os.getpid()}").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
        while gate.exists():
            time.sleep(0.02)
    return tensors[0] * 0 if share == 1 else tensors[0] * (1 - share) + tensors[-1] * share
'''
_FIRST = (0.1, 0.2, 0.3, 0.4, 1.0)
_LIMIT_S = 240.0


@dataclass
class Sweep:
    """A sweep that a user starts in a terminal."""

    folder: Path
    process: subprocess.Popen[bytes]

    @property
    def output(self) -> str:
        return (self.folder / "output").read_text()

    def ended(self) -> int:
        return self.process.wait(_LIMIT_S)

    def held(self, *shares: float) -> list[int]:
        """Wait until the trials of these shares are in the middle; answer their processes' ids."""
        patterns = [f"held-{share}-*" for share in shares]
        self.wait_until(lambda: all(any(self.folder.glob(pattern)) for pattern in patterns))
        return [int(file.name.rpartition("-")[2]) for pattern in patterns for file in self.folder.glob(pattern)]

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _LIMIT_S
        while not condition():
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.05)

    def interrupt(self) -> None:
        """Press Ctrl-C: the terminal sends it to all processes in the foreground."""
        os.killpg(self.process.pid, signal.SIGINT)


class Gates:
    """Keeps trials in the middle."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def close(self, *shares: float) -> None:
        for share in shares:
            (self.folder / f"gate-{share}").touch()

    def open(self, *shares: float) -> None:
        for share in shares or _FIRST:
            (self.folder / f"gate-{share}").unlink(missing_ok=True)


@pytest.fixture
def gates(workplace: Path) -> Gates:
    return Gates(workplace)


@pytest.fixture
def store(workplace: Path, empty_store: Path) -> str:
    """The address of the store that sweeps record in unless told otherwise; its tables are there already."""
    (workplace / "outputs").mkdir()
    shutil.copy(empty_store, workplace / "outputs" / "mlflow.db")
    return f"sqlite:///{workplace}/outputs/mlflow.db"


@pytest.fixture
def start(
    bert_checkpoints: Mapping[str, Path], workplace: Path, gates: Gates, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Sweep]]:
    """Start a sweep over a parameter of a user's method, with two trials at a time."""
    monkeypatch.setenv("MERGELAB_CACHE", str(workplace / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name, repository in zip(("base", "a", "b"), (BERT_BASE, *BERT_RTE_EXPERTS[1:3]), strict=True):
        shutil.copytree(bert_checkpoints[repository], workplace / name)
    (workplace / "data").mkdir()
    pq.write_table(glue_table("rte", 80, 1), workplace / "data" / "validation.parquet")
    (workplace / "gated.py").write_text(_METHOD)
    fixed = ["sweep=custom", "method=custom", "method.function=gated.between", "method.share=interval(0,1)"]
    fixed += ["models.base=./base", "models.experts=[./a,./b]", "task=rte", "task.data_dir=data"]
    fixed += ["sweep.n_jobs=2", "sweep.sampler=random", "sweep.evaluation=pruned"]
    fixed += [f"sweep.enqueue=[{','.join(f'{{method.share: {share}}}' for share in _FIRST)}]"]
    started = []

    def start(*arguments: str) -> Sweep:
        command = [sys.executable, "-m", "mergelab", "-m", *fixed, *arguments]
        with (workplace / "output").open("ab") as output:
            process = subprocess.Popen(command, cwd=workplace, stdout=output, stderr=output, start_new_session=True)
        started.append(process)
        return Sweep(workplace, process)

    yield start
    gates.open()
    for process in started:
        end(process)
    for file in workplace.glob("held-*"):  # what outlives its sweep
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(int(file.name.rpartition("-")[2])).kill()


def trials(url: str) -> list[Any]:
    storage = open_storage(url)
    (study,) = storage.get_all_studies()
    return storage.get_all_trials(study._study_id)


def runs(uri: str, kind: str) -> list[Any]:
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("rte").experiment_id
    return list(client.search_runs([experiment], f"tags.`mergelab.kind` = '{kind}'"))


def check_each_trial_is_there_once(url: str, uri: str, count: int) -> list[Any]:
    """Compare the study with the tracking store; answer the trials' runs."""
    done = trials(url)
    assert [trial.number for trial in done] == list(range(count))
    assert [trial.state.name for trial in done] == ["COMPLETE", "COMPLETE", "COMPLETE", "COMPLETE", "PRUNED"][:count]
    (parent,) = runs(uri, "sweep")
    children = sorted(runs(uri, "trial"), key=lambda run: int(run.data.tags["mergelab.trial"]))
    assert [child.info.run_id for child in children] == [trial.user_attrs[OUTCOME]["run"] for trial in done]
    client = MlflowClient(uri)
    for child, trial, share in zip(children, done, _FIRST, strict=False):
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert child.info.status == "FINISHED"
        assert "error" not in child.data.tags
        assert float(child.data.params["method.share"]) == trial.params["method.share"] == share
        (measured,) = client.get_metric_history(child.info.run_id, "estimate/accuracy")
        assert [measured.value] == trial.user_attrs[OUTCOME]["values"]
    return children


def process_of(run: Any) -> int:
    return int(json.loads(run.data.tags["mergelab.process"])["mergelab.pid"])


def test_joblib_workers_keep_a_trial_when_the_sweeper_is_killed_and_lose_nothing_when_one_of_them_is(
    start: Callable[..., Sweep], gates: Gates, workplace: Path, store: str
) -> None:
    arguments = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "sweep.n_trials=5", "sweep.storage=journal:study"]
    gates.close(0.1, 0.2, 0.3, 0.4)
    sweep = start(*arguments)
    orphans = sweep.held(0.1, 0.2)
    sweep.process.kill()
    sweep = start(*arguments)
    sweep.wait_until(lambda: "waiting for that" in sweep.output)
    gates.open(0.1, 0.2)
    sweep.wait_until(lambda: not any(map(psutil.pid_exists, orphans)))  # with what they had loaded
    victim, _ = sweep.held(0.3, 0.4)
    os.kill(victim, signal.SIGKILL)
    gates.open()
    assert sweep.ended() == 0, sweep.output
    assert "a worker died" in sweep.output
    children = check_each_trial_is_there_once(f"journal:{workplace}/study", store, 5)
    assert [process_of(child) for child in children[:2]] == orphans
    assert len({process_of(child) for child in children[2:]}) < 3  # a worker keeps what it has loaded
    assert [run.info.status for run in runs(store, "sweep")] == ["FINISHED"]


def test_ctrl_c_lets_running_trials_end_in_their_processes_and_a_second_one_ends_them(
    start: Callable[..., Sweep], gates: Gates, workplace: Path, store: str
) -> None:
    url = f"sqlite:///{workplace}/outputs/sweeps.db"
    arguments = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "sweep.n_trials=20"]
    gates.close(0.1, 0.2, 0.3, 0.4)
    sweep = start(*arguments)
    sweep.held(0.1, 0.2)
    sweep.interrupt()
    sweep.wait_until(lambda: "ends after the running trials" in sweep.output)
    gates.open(0.1, 0.2)
    assert sweep.ended() == 130, sweep.output
    assert "interrupted with 18 trials to go" in sweep.output
    check_each_trial_is_there_once(url, store, 2)
    assert [run.info.status for run in runs(store, "sweep")] == ["KILLED"]

    (workplace / "output").unlink()
    sweep = start(*arguments)
    workers = sweep.held(0.3, 0.4)
    sweep.interrupt()
    sweep.wait_until(lambda: "ends after the running trials" in sweep.output)
    sweep.interrupt()
    assert sweep.ended() == 130, sweep.output
    assert [trial.state.name for trial in trials(url)] == ["COMPLETE"] * 2 + ["RUNNING"] * 2  # to be gone on with
    assert sorted(run.info.status for run in runs(store, "trial")) == ["FINISHED"] * 2 + ["KILLED"] * 2
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


def test_on_a_ray_cluster_with_postgresql_and_an_mlflow_server_a_killed_worker_loses_and_repeats_nothing(
    start: Callable[..., Sweep], gates: Gates, workplace: Path, postgres: str, mlflow_server: str, ray_cluster: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)  # the cluster's processes do not have it
    gates.close(0.1, 0.2)
    ray = ["hydra/launcher=ray", f"hydra.launcher.ray.init.address={ray_cluster}"]
    ray += ["hydra.launcher.ray.remote.num_gpus=1", "hydra.launcher.ray.remote.max_calls=0"]
    sweep = start(*ray, f"sweep.storage={postgres}", "sweep.n_trials=5")
    victim, other = sweep.held(0.1, 0.2)
    assert {file.read_text() for file in workplace.glob("held-*")} == {"0", "1"}  # a trial for each GPU
    os.kill(victim, signal.SIGKILL)
    gates.open()
    assert sweep.ended() == 0, sweep.output
    children = check_each_trial_is_there_once(postgres, mlflow_server, 5)
    assert process_of(children[1]) == other  # only the killed worker's trial was started again
    assert len({process_of(child) for child in children}) < 3  # a worker keeps what it has loaded
    assert not (workplace / "outputs" / "mlflow.db").exists()
    # Jobs write where the sweep was started, not where the cluster was.
    folders = {path.parent.name for path in workplace.glob("outputs/sweeps/*/*/*/.hydra")}
    assert folders == {"0", "1", "2", "3", "4", "report"}
    assert PASSWORD not in sweep.output
    written = [file for file in workplace.rglob("*") if file.is_file() and PASSWORD.encode() in file.read_bytes()]
    assert written == []


def test_submitit_starts_a_process_for_each_trial_and_one_that_is_killed_is_started_again(
    start: Callable[..., Sweep], gates: Gates, workplace: Path, store: str
) -> None:
    pytest.importorskip("submitit")
    gates.close(0.1, 0.2)
    sweep = start("hydra/launcher=submitit_local", "sweep.n_trials=2")
    victim, other = sweep.held(0.1, 0.2)
    os.kill(victim, signal.SIGKILL)
    sweep.wait_until(lambda: "waiting for that" in sweep.output)
    gates.open()
    assert sweep.ended() == 0, sweep.output
    url = f"sqlite:///{workplace}/outputs/sweeps.db"
    children = check_each_trial_is_there_once(url, store, 2)
    assert process_of(children[1]) == other
