"""What every test may use: a fresh folder to work in, the command line in this process, the real data where it is."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from absl import logging as absl_logging
from filelock import FileLock

from tests.standins import BERT_BASE, BERT_RTE_EXPERTS, glue_table

pytest_plugins = ["tests.hub_fixtures"]

ROOT = Path(__file__).resolve().parent.parent
REAL_DATA = ROOT.parent / "shared" / "data"

# The tests of these files take longest, first those that do most; others fill the time beside them.
LONG = (
    "test_real_data.py",
    "test_adding.py",
    "test_launchers.py",
    "test_readme.py",
    "test_killed.py",
    "test_killed_commands.py",
    "test_containers.py",
    "test_hub_experiment.py",
)

# Tests share the cores: operations split over them wait for each other. The tests never ask the public hub; those that
# need one start it on loopback.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# absl, which rouge-score imports, takes the standard error of that moment, pytest's; and closes it when Hydra sets up
# logging.
absl_logging.get_absl_handler().python_handler.stream = sys.__stderr__
for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID", "HYDRA_FULL_ERROR", "COLUMNS"):
    os.environ.pop(name, None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the long tests, so that no worker is left with one of them at the end."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


def pytest_xdist_auto_num_workers() -> int:
    """Have one worker more than there are cores: a third of the time tests wait for the processes that they start."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return usable + 1


@pytest.fixture(scope="session")
def glue_data() -> Path:
    """The folder of real GLUE data, a folder per task."""
    if not (REAL_DATA / "glue").is_dir():
        pytest.skip("needs the GLUE data in ../shared/data")
    return REAL_DATA / "glue"


@pytest.fixture(scope="session")
def generation_data() -> Path:
    """The folder of real generation and language-modelling data, a folder per corpus."""
    if not (REAL_DATA / "generation").is_dir():
        pytest.skip("needs the generation data in ../shared/data")
    return REAL_DATA / "generation"


@pytest.fixture(scope="session", autouse=True)
def databases_do_not_wait_for_the_disk() -> Iterator[None]:
    """Leave it to the system when SQLite's databases reach the disk: tests end processes, and never the machine."""
    import sqlalchemy

    def connected(connection: Any, _record: Any) -> None:
        if isinstance(connection, sqlite3.Connection):
            with suppress(sqlite3.DatabaseError):  # of a file that is no database; whoever uses it hears of that
                connection.execute("PRAGMA synchronous = OFF")

    sqlalchemy.event.listen(sqlalchemy.Engine, "connect", connected)
    yield
    sqlalchemy.event.remove(sqlalchemy.Engine, "connect", connected)


@pytest.fixture(scope="session", autouse=True)
def tracking_tables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Have MLflow's migrations make the tables of a new SQLite store once for all tests; other stores are copies."""
    from mergelab.tracking import store

    folder = shared_folder(tmp_path_factory)
    template = folder / "tracking-tables.db"
    create = store._create_file

    def create_from_template(wanted: store.Store) -> None:
        from mlflow.store.db import utils

        migrate = utils._initialize_tables

        def copy(engine: Any) -> None:
            with FileLock(folder / "tracking-tables.lock"), closing(engine.raw_connection()) as made:
                is_new = not template.exists()
                if is_new:
                    migrate(engine)
                with closing(sqlite3.connect(template)) as tables:
                    if is_new:
                        made.driver_connection.backup(tables)
                    else:
                        tables.backup(made.driver_connection)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(utils, "_initialize_tables", copy)
            create(wanted)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "_create_file", create_from_template)
        yield


def shared_folder(factory: pytest.TempPathFactory) -> Path:
    """Return a temporary folder that all of pytest-xdist's workers have in common."""
    own = factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def process_left_as_it_was() -> Iterator[None]:
    """Fail the test that leaves a run open or a setting of Hydra's behind, not one of those that come after it."""
    before = signal.getsignal(signal.SIGTERM), os.environ.get("HYDRA_FULL_ERROR")
    yield
    assert (signal.getsignal(signal.SIGTERM), os.environ.get("HYDRA_FULL_ERROR")) == before


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh folder that is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def mergelab_command(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Outcome]]:
    """``python -m mergelab ARGUMENTS`` in a fresh folder, in this process so that imports are paid once."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    from mergelab.__main__ import main

    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")

    def run(*arguments: str) -> Outcome:
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", ["mergelab", *arguments])
        os.environ["HYDRA_FULL_ERROR"] = "0"
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    yield run
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None


@pytest.fixture
def arguments(bert_checkpoints: Mapping[str, Path], workplace: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A base, three experts (one with its labels in the other order), RTE-shaped data, and an empty cache."""
    import pyarrow.parquet as pq

    monkeypatch.setenv("MERGELAB_CACHE", str(workplace / "cache"))
    for name, repository in zip(("base", "a", "b", "c"), (BERT_BASE, *BERT_RTE_EXPERTS[1:4]), strict=True):
        shutil.copytree(bert_checkpoints[repository], workplace / name)
    (workplace / "data").mkdir()
    pq.write_table(glue_table("rte", 120, 1), workplace / "data" / "validation.parquet")
    return ["models.base=./base", "models.experts=[./a,./b,./c]", "task.data_dir=data"]
