"""Every kind of command, killed at a random moment: the same command again gives what an undisturbed one does.

``MERGELAB_KILLS`` sets how often each kind is killed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
from mlflow.tracking import MlflowClient

from mergelab.sweep.storage import open_storage
from mergelab.sweep.study import LATER, MEASURED
from mergelab.tracking import TrackingConfig, open_tracking
from tests.standins import BERT_BASE, BERT_RTE_EXPERTS, glue_table
from tests.tracking.conftest import empty_store

__all__ = ["empty_store"]
pytestmark = pytest.mark.slow

OF_ONE_RUN = {"README.md", "mergelab.json"}  # they name the run
KILLS = int(os.environ.get("MERGELAB_KILLS", "1"))
# Starts commands as forks of one process, so that imports are paid once: a line of JSON is a folder and arguments.
FORKING = """
import json, os, sys, traceback
import torch
torch.set_num_threads(1)
import mlflow.store.tracking.sqlalchemy_store, optuna.storages, pyarrow.parquet, scipy.stats, transformers
import mergelab.sweep.run, mergelab.tracking, mergelab.sweep.trial
from mergelab.__main__ import main
from mergelab.miniature import build as miniature
from mergelab.miniature.recipe import Recipe

for line in sys.stdin:
    folder, arguments = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.chdir(folder)
        os.environ["MERGELAB_CACHE"] = os.path.join(folder, "cache")
        out = os.open("out.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1), os.dup2(out, 2)
        sys.argv = ["mergelab", *arguments]
        try:
            if arguments[0] == "build the miniature":
                miniature("cola", recipe=Recipe(documents=96, size=0.02))
            else:
                main()
        except SystemExit as end:
            os._exit(end.code or 0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
COMMANDS: dict[str, list[str]] = {
    "merge to disk": ["evaluate=false", "method=ties", "output=merged", "save.max_shard_size=100kB"],
    "evaluation": ["method=task_arithmetic", "output=merged"],
    "grid": ["-m", "method=soup,task_arithmetic,ties"],
    "sweep": ["-m", "sweep=task_arithmetic", "sweep.n_trials=6", "sweep.study_name=s"],
    "sweep in workers": ["-m", "sweep=task_arithmetic", "sweep.n_trials=4", "sweep.study_name=s", "sweep.n_jobs=2",
                         "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "adaptive sweep": ["-m", "sweep=ties", "sweep.n_trials=6", "sweep.study_name=s", "sweep.evaluation=adaptive"],
    "encoder-decoder": ["models.base={encoder: ./base, decoder: ./base}", "models.experts={x: {encoder: ./a, decoder: "
                        "./base, seed: 1}, y: {encoder: ./b, decoder: ./base, seed: 2}}", "method=soup",
                        "evaluate=false", "output=merged"],
    "fine-tuning": ["finetune", "task=rte", "base=./base", "seeds=[0,1]", "train.epochs=8", "train.batch_size=8",
                    "output=merged"],
    "miniature": ["build the miniature"],
}  # fmt: skip


@pytest.fixture(scope="module")
def begin() -> Iterator[Callable[..., tuple[int, Callable[[], int]]]]:
    """Start a command in a folder; return its process's number, and what waits for its exit code."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    forking = subprocess.Popen(
        [sys.executable, "-c", FORKING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert forking.stdin is not None
    assert forking.stdout is not None
    stdin, stdout = forking.stdin, forking.stdout

    def start(folder: Path, arguments: list[str]) -> tuple[int, Callable[[], int]]:
        stdin.write(json.dumps([str(folder), arguments]) + "\n")
        stdin.flush()
        return int(stdout.readline()), lambda: int(stdout.readline())

    yield start
    forking.kill()
    forking.wait()


@pytest.fixture
def fresh(bert_checkpoints: Mapping[str, Path], empty_store: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Make a folder to start a command in, with models, data, an empty store and no cache."""

    def make(name: str) -> Path:
        import pyarrow.parquet as pq

        folder = tmp_path / name
        for model, repository in zip(("base", "a", "b", "c"), (BERT_BASE, *BERT_RTE_EXPERTS[1:4]), strict=True):
            shutil.copytree(bert_checkpoints[repository], folder / model)
        (folder / "data").mkdir()
        pq.write_table(glue_table("rte", 120, 1), folder / "data" / "validation.parquet")
        pq.write_table(glue_table("rte", 96, 2), folder / "data" / "train.parquet")
        (folder / "outputs").mkdir()
        shutil.copy(empty_store, folder / "outputs" / "mlflow.db")
        return folder

    return make


def content(folder: Path) -> dict[str, str]:
    """Hash every file of a folder by its path."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not file.is_symlink()
    }


def timeless(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.startswith(("time/", "memory/"))}


def results(folder: Path) -> dict[str, Any]:
    """Collect all results: models, the cached miniature and predictions, studies, and the finished runs' metrics."""
    cache = content(folder / "cache")
    found: dict[str, Any] = {
        "models": {
            name: digest for name, digest in content(folder / "merged").items() if Path(name).name not in OF_ONE_RUN
        },
        "mini": {name: digest for name, digest in cache.items() if name.startswith("mini") and "/." not in name},
    }
    if (folder / "outputs" / "sweeps.db").exists():
        open_storage.cache_clear()
        study = optuna.load_study(storage=f"sqlite:///{folder}/outputs/sweeps.db", study_name="s")
        found["study"] = [
            (trial.params, trial.state, trial.values, trial.user_attrs.get(MEASURED)) for trial in study.trials
        ]
        later = {key: value[MEASURED] for key, value in study.user_attrs.items() if key.startswith(LATER)}
        found["finalists"] = later or None
    found["runs"] = sorted(
        {
            (run.data.tags["mergelab.kind"], run.info.run_name, json.dumps(timeless(run.data.metrics), sort_keys=True))
            for run in runs(folder)
            if run.info.status == "FINISHED"
        }
    )
    return found


def runs(folder: Path) -> list[Any]:
    client = MlflowClient(f"sqlite:///{folder}/outputs/mlflow.db")
    return list(client.search_runs([experiment.experiment_id for experiment in client.search_experiments()]))


def unfinished(folder: Path) -> set[str]:
    """Name what is hidden, but for locks and Hydra's own: numbers and hashes replaced."""
    hidden = [path for path in folder.rglob(".*") if path.name != ".hydra" and not path.name.endswith(".lock")]
    return {re.sub(r"[0-9a-f]{8,}", "#", str(path.relative_to(folder))) for path in hidden}


@pytest.mark.parametrize("kind", COMMANDS)
def test_the_same_command_again_gives_what_an_undisturbed_one_does(
    kind: str, begin: Callable[..., tuple[int, Callable[[], int]]], fresh: Callable[[str], Path]
) -> None:
    arguments = COMMANDS[kind]
    if kind != "miniature":
        models = (
            [] if kind in ("encoder-decoder", "fine-tuning") else ["models.base=./base", "models.experts=[./a,./b,./c]"]
        )
        arguments = [*arguments, *models, "task.data_dir=data"]
    assert_kills_leave_no_trace(kind, arguments, begin, fresh)


def assert_kills_leave_no_trace(
    kind: str,
    arguments: list[str],
    begin: Callable[..., tuple[int, Callable[[], int]]],
    fresh: Callable[[str], Path],
) -> None:
    """Kill a command at random moments, give it again, and compare all results with those of an undisturbed one."""
    undisturbed = fresh("undisturbed")
    _, ended = begin(undisturbed, arguments)  # the process that forks imports everything at the first
    started = time.monotonic()
    assert ended() == 0, said(undisturbed)
    lasts = time.monotonic() - started
    expected = results(undisturbed)
    assert any(expected.values())

    draw = random.Random(f"{kind} {os.environ.get('MERGELAB_KILLS_SEED', '0')}")
    killed = 0
    while killed < KILLS:
        folder = fresh(f"killed-{killed}")
        for _ in range(draw.choice([1, 1, 1, 2])):
            pid, ended = begin(folder, arguments)
            time.sleep(draw.uniform(0, lasts))
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(pid).kill()
            if (code := ended()) == 0:
                break
            assert code in (-9, 2), said(folder)
            killed += code == -9
        if code:
            again = begin(folder, arguments)[1]()
            # A process that is killed while it says that its model is there has written it.
            assert again == 0 or (again == 2 and "the folder is not empty" in said(folder)), said(folder)
            found = results(folder)
            if again:
                assert found["models"] == expected["models"]
            else:
                assert found == expected, said(folder)
        assert unfinished(folder) == unfinished(undisturbed), said(folder)
        open_tracking(TrackingConfig(uri=f"sqlite:///{folder}/outputs/mlflow.db"))
        assert not [run for run in runs(folder) if run.info.status == "RUNNING"]
        shutil.rmtree(folder)


def said(folder: Path) -> str:
    return (folder / "out.txt").read_text()
