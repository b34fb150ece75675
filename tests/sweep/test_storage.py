"""Where studies are kept, and what is said of a storage that cannot be used."""

from __future__ import annotations

import signal
import sqlite3
from contextlib import closing
from pathlib import Path

import optuna
import pytest

from mergelab.errors import SweepError
from mergelab.sweep.storage import open_storage, redacted, storage_errors, storage_url
from tests.sweep.servers import PASSWORD, free_port, postgres, short_folder

__all__ = ["postgres", "short_folder"]


def test_files_are_relative_to_the_folder_where_the_sweep_was_started(tmp_path: Path) -> None:
    assert storage_url(None, str(tmp_path)) == f"sqlite:///{tmp_path}/outputs/sweeps.db"
    assert storage_url("sqlite:///a/b.db", str(tmp_path)) == f"sqlite:///{tmp_path}/a/b.db"
    assert storage_url("journal:log", str(tmp_path)) == f"journal:{tmp_path}/log"
    assert storage_url("journal:/log", str(tmp_path)) == "journal:/log"
    assert storage_url("postgresql+psycopg://u:p@h/d", str(tmp_path)) == "postgresql+psycopg://u:p@h/d"


def test_a_password_is_not_shown() -> None:
    assert redacted("postgresql+psycopg://lab:secret@db:5432/study") == "postgresql+psycopg://lab:***@db:5432/study"
    assert "secret" not in redacted("postgresql+psycopg://db/study?user=lab&password=secret")


@pytest.mark.parametrize("url", ["sqlite:///{}/made/study.db", "journal:{}/made/study.log"])
def test_a_study_can_be_opened_twice(url: str, tmp_path: Path) -> None:
    url = url.format(tmp_path)
    study = optuna.create_study(storage=open_storage(url), study_name="s")
    study.add_trial(optuna.trial.create_trial(value=1.0))
    open_storage.cache_clear()
    assert optuna.load_study(storage=open_storage(url), study_name="s").best_value == 1.0


def test_a_database_that_another_process_writes_for_too_long_is_waited_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, opened = f"sqlite:///{tmp_path}/study.db", []
    original = optuna.storages.RDBStorage
    monkeypatch.setattr("mergelab.sweep.storage._BUSY_S", 0.1)
    monkeypatch.setattr(optuna.storages, "RDBStorage", lambda *a, **b: opened.append(a) or original(*a, **b))
    with closing(sqlite3.connect(tmp_path / "study.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(SweepError, match=r"study\.db: cannot be used: .*database is locked"):
            open_storage(url)
    assert len(opened) == 1
    monkeypatch.undo()
    open_storage(url)


def test_a_server_that_is_not_there_is_one_line_without_the_password() -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(SweepError) as caught:
        open_storage(f"postgresql+psycopg://lab:{PASSWORD}@127.0.0.1:{free_port()}/study")
    assert "sweep.storage=postgresql+psycopg://lab:***@127.0.0.1" in str(caught.value)
    assert "Connection refused" in str(caught.value)
    assert PASSWORD not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_driver_that_is_not_installed_is_named() -> None:
    with pytest.raises(SweepError, match=r"the driver .* is not installed; for PostgreSQL: pip install"):
        open_storage("postgresql+pg8000://lab@127.0.0.1/study")


def test_postgresql_keeps_studies_refuses_a_wrong_password_and_says_so_when_it_goes_away(postgres: str) -> None:
    with pytest.raises(SweepError, match="password authentication failed") as caught:
        open_storage(postgres.replace(PASSWORD, "another"))
    assert "another" not in str(caught.value)
    study = optuna.create_study(storage=open_storage(postgres), study_name="s")
    study.add_trial(optuna.trial.create_trial(value=1.0))
    assert optuna.load_study(storage=postgres, study_name="s").best_value == 1.0
    port = postgres.rpartition(":")[2].partition("/")[0]
    _stop(int(port))
    with (
        pytest.raises(SweepError, match=r"lab:\*\*\*@127.0.0.1:\d+/postgres: cannot be used: "),
        storage_errors(postgres),
    ):
        study.set_user_attr("late", True)


def _stop(port: int) -> None:
    """End the server that listens on a port of this machine."""
    import psutil

    (server,) = {
        one.pid for one in psutil.net_connections("tcp4") if one.laddr.port == port and one.status == psutil.CONN_LISTEN
    }
    process = psutil.Process(server)
    process.send_signal(signal.SIGINT)
    process.wait(30)


@pytest.mark.parametrize("line", ["garbage", "[]", "5", '"x"', "{}", '{"op_code": 99}', '{"op_code": "x"}'])
def test_a_file_that_is_no_journal_is_one_line(line: str, tmp_path: Path) -> None:
    (tmp_path / "log").write_text(f"{line}\n" * 5)
    open_storage.cache_clear()
    with pytest.raises(SweepError, match=r"^sweep\.storage=journal:.*: cannot be used: ."):
        open_storage(f"journal:{tmp_path / 'log'}")
