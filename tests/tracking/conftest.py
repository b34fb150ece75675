"""A store per test, made from one whose tables were created once; processes that use it from outside."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from mergelab.tracking import Tracker, TrackingConfig, open_tracking
from tests.conftest import shared_folder

ROOT = Path(__file__).resolve().parents[2]
APP = Path(__file__).with_name("grid_app")


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tracking database without runs; creating the tables takes seconds, copying it does not."""
    folder = shared_folder(tmp_path_factory)
    path = folder / "empty-store" / "mlflow.db"
    with FileLock(folder / "empty-store.lock"):
        if not path.exists():
            open_tracking(TrackingConfig(uri=f"sqlite:///{path}"))
    return path


@pytest.fixture
def workplace(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a store in ``outputs``; its name has a space, as folders have."""
    folder = tmp_path / "my experiments"
    (folder / "outputs").mkdir(parents=True)
    shutil.copy(empty_store, folder / "outputs" / "mlflow.db")
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return folder


@pytest.fixture
def tracker(workplace: Path) -> Tracker:
    return open_tracking(TrackingConfig())


@pytest.fixture
def mlflow_client(workplace: Path) -> Any:
    """MLflow's own client: what it says of a run is what any other tool sees."""
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{workplace}/outputs/mlflow.db")


def environment() -> dict[str, str]:
    paths = [str(ROOT), str(APP), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "MERGELAB_CONF": str(ROOT / "conf"),
        "OMP_NUM_THREADS": "1",
    }


class Process:
    """A Python process that is waited for by what it prints, not by the clock."""

    def __init__(self, arguments: list[str]) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-u", *arguments],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # Shells start background jobs, which these tests may be, with interrupts ignored; it would be inherited.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )

    def line(self) -> str:
        assert self.popen.stdout is not None
        return self.popen.stdout.readline().strip()

    def signal(self, number: int) -> None:
        self.popen.send_signal(number)

    def end(self) -> tuple[int, str, str]:
        out, err = self.popen.communicate(timeout=120)
        return self.popen.returncode, out, err


@pytest.fixture
def start(workplace: Path) -> Iterator[Callable[..., Process]]:
    """Start Python on a piece of code, or on a file with arguments."""
    started: list[Process] = []

    def start_process(code: str | None = None, *arguments: str) -> Process:
        first = ["-c", textwrap.dedent(code)] if code is not None else []
        started.append(Process([*first, *arguments]))
        return started[-1]

    yield start_process
    for process in started:
        if process.popen.poll() is None:
            os.killpg(process.popen.pid, signal.SIGKILL)
        process.popen.communicate()
