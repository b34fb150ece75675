from __future__ import annotations

import os
import shlex
import shutil
import socket
import sqlite3
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mergelab.errors import TrackingError
from mergelab.tracking import TrackingConfig, open_tracking

RECORD_FIVE = """
import sys, time
from mergelab.tracking import TrackingConfig, open_tracking
from mergelab.tracking.names import BASELINE_KEY
tracker = open_tracking(TrackingConfig())
for key in "abc":
    with tracker.exclusively():
        if tracker.find_run({BASELINE_KEY: key}) is None:
            time.sleep(0.3)
            with tracker.start_run(f"baseline {key}", experiment="rte", tags={BASELINE_KEY: key}):
                pass
for number in range(5):
    with tracker.start_run(f"{sys.argv[1]} {number}", experiment="rte", params={"number": number}) as run:
        run.log_metrics({"report/accuracy": number})
        run.log_text("x", "config.yaml")
"""


@pytest.fixture
def silent_server() -> Iterator[str]:
    """An address where something listens and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as once:
        once.bind(("127.0.0.1", 0))
        return int(once.getsockname()[1])


def test_two_processes_may_be_the_first_to_use_a_store(start: Callable[..., Any], workplace: Path) -> None:
    shutil.rmtree(workplace / "outputs")
    processes = [start(RECORD_FIVE, name) for name in ("first", "second")]
    # Nothing of MLflow's or Alembic's own talk reaches the user.
    assert [process.end() for process in processes] == [(0, "", "")] * 2
    runs = open_tracking(TrackingConfig()).runs(experiment="rte", status="FINISHED")
    recorded = [f"{name} {number}" for name in ("first", "second") for number in range(5)]
    assert sorted(run.name for run in runs) == ["baseline a", "baseline b", "baseline c", *recorded]
    assert sorted(path.name for path in workplace.iterdir()) == ["outputs"]
    assert not list((workplace / "outputs").glob(".*.creating*"))


def test_a_store_whose_creation_was_cut_short_is_created_anew(workplace: Path, empty_store: Path) -> None:
    store = workplace / "outputs" / "mlflow.db"
    store.unlink()
    (workplace / "outputs" / ".mlflow.db.creating").write_bytes(empty_store.read_bytes()[:50_000])
    with open_tracking(TrackingConfig()).start_run("ties", experiment="rte") as run:
        pass
    assert run.id
    assert store.exists()


def test_the_address_in_the_config_comes_before_the_environment(
    workplace: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.db", "b.db"):
        shutil.copy(empty_store, workplace / name)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///a.db")
    for config, name in ((TrackingConfig(uri="sqlite:///b.db?timeout=30"), "b.db"), (TrackingConfig(), "a.db")):
        tracker = open_tracking(config)
        with tracker.start_run(name, experiment="rte"):
            pass
        with sqlite3.connect(workplace / name) as database:
            assert database.execute("select name from runs").fetchall() == [(name,)]


def test_a_store_is_opened_once_in_a_process(workplace: Path) -> None:
    assert open_tracking(TrackingConfig()) is open_tracking(TrackingConfig(uri="sqlite:///outputs/mlflow.db"))


@pytest.mark.parametrize("scheme", ["http", "postgresql", "mysql+pymysql"])
def test_a_server_that_is_down_is_one_line(scheme: str, closed_port: int) -> None:
    uri = f"{scheme}://me:secret@127.0.0.1:{closed_port}"
    with pytest.raises(TrackingError) as caught:
        open_tracking(TrackingConfig(uri=uri))
    line = str(caught.value)
    assert line.startswith(f"cannot reach the tracking store {scheme}://me:***@127.0.0.1:{closed_port} (")
    assert line.endswith("; check tracking.uri and MLFLOW_TRACKING_URI, or set tracking=none")
    assert "\n" not in line
    assert "refused" in line


def test_a_server_that_does_not_answer_is_given_up_on(silent_server: str) -> None:
    with pytest.raises(
        TrackingError, match=r"^cannot reach the tracking store http://127.* \(no answer within 5 seconds\)"
    ):
        open_tracking(TrackingConfig(uri=silent_server))


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (lambda path: path.write_text("not a database, but long enough"), r"cannot reach .*\(not an SQLite database\)"),
        (lambda path: path.mkdir(), r"cannot reach .*Is a directory"),
        (lambda path: path.with_suffix("").write_text(""), None),
    ],
)
def test_a_file_that_is_not_a_store_is_one_line(
    tmp_path: Path, prepare: Callable[[Path], Any], said: str | None
) -> None:
    path = tmp_path / "file.db"
    prepare(path)
    uri = f"sqlite:///{path}" if said else f"sqlite:///{path.with_suffix('')}/mlflow.db"
    with pytest.raises(TrackingError, match=said or "cannot reach .*File exists|Not a directory") as caught:
        open_tracking(TrackingConfig(uri=uri))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(TrackingError, match=r"cannot reach .*Permission denied"):
        open_tracking(TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db"))


def test_a_folder_as_store_is_refused_with_what_to_use(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match=rf"a folder is not a tracking store; use sqlite:///{tmp_path}/mlflow.db"):
        open_tracking(TrackingConfig(uri=f"file://{tmp_path}"))


def test_a_store_of_another_mlflow_version_is_one_line_that_says_how_to_upgrade(workplace: Path) -> None:
    with sqlite3.connect(workplace / "outputs" / "mlflow.db") as database:
        database.execute("update alembic_version set version_num = '451aebb31d03'")
    with pytest.raises(
        TrackingError, match=r"^cannot open the tracking store sqlite:///outputs/mlflow.db: .*mlflow db upgrade"
    ):
        open_tracking(TrackingConfig())


def test_a_store_that_was_deleted_under_an_open_process_is_noticed(workplace: Path) -> None:
    open_tracking(TrackingConfig())
    shutil.rmtree(workplace / "outputs")
    with pytest.raises(TrackingError, match=r"mlflow.db was deleted while this process had it open"):
        open_tracking(TrackingConfig())


def test_the_ui_command_is_for_the_working_folder(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = open_tracking(TrackingConfig())
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert tracker.ui_command() == "mlflow ui --backend-store-uri sqlite:///outputs/mlflow.db"
    monkeypatch.chdir(workplace.parent.parent)
    relative = f"{workplace.parent.name}/my experiments/outputs/mlflow.db"
    assert tracker.ui_command() == f"mlflow ui --backend-store-uri 'sqlite:///{relative}'"
    monkeypatch.setenv("PATH", "")
    monkeypatch.chdir("/")
    assert Path(shlex.split(tracker.ui_command())[0]).samefile(Path(sys.executable).with_name("mlflow"))


def test_the_pages_of_the_ui_are_those_for_models(workplace: Path) -> None:
    tracker = open_tracking(TrackingConfig())
    number = tracker.experiment("rte")
    assert tracker.ui_page("rte") == f"http://127.0.0.1:5000/#/experiments/{number}/runs?workflowType=machine_learning"
    assert tracker.ui_page("rte", ["a", "b"]) == (
        f"http://127.0.0.1:5000/#/compare-runs?runs=%5B%22a%22%2C%22b%22%5D&experiments=%5B%22{number}%22%5D"
        "&workflowType=machine_learning"
    )


def test_importing_tracking_does_not_import_mlflow(start: Callable[..., Any]) -> None:
    code, out, _ = start(
        "import sys, mergelab.tracking; print({'mlflow', 'sqlalchemy', 'torch'} & set(sys.modules))"
    ).end()
    assert (code, out) == (0, "set()\n")


@pytest.mark.parametrize(
    "uri", ["http://[::1", "http://[x]", "http://127.0.0.1:99999", "http://a b", "uc:x", "ftp://x"]
)
def test_an_address_that_cannot_be_read_is_one_line(uri: str) -> None:
    with pytest.raises(TrackingError) as caught:
        open_tracking(TrackingConfig(uri=uri))
    assert str(caught.value).isprintable()
