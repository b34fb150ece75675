"""Passwords and tokens of the stores' addresses: nowhere that others look."""

from __future__ import annotations

import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mergelab.cli.hidden import references
from mergelab.tracking import secrets
from mergelab.tracking.secrets import has_secret, without_password
from tests.conftest import Outcome
from tests.sweep.servers import PASSWORD, new_database, postgres_with_tables

__all__ = ["postgres_with_tables"]

Command = Callable[..., Outcome]
ADDRESSES = [
    "postgresql+psycopg://lab:hunter22@127.0.0.1:9/db",
    "postgresql+psycopg://lab:hunter22/x@127.0.0.1:9/db",
    "postgresql+psycopg://lab:x@hunter22@127.0.0.1:9/db",
    "postgresql+psycopg://lab:hunter22%40%2F@127.0.0.1:9/db",
    "postgresql+psycopg://127.0.0.1:9/db?user=lab&password=hunter22",
    "postgresql+psycopg://lab@127.0.0.1:9/db?sslpassword=hunter22",
    "mysql+pymysql://lab:hunter22@127.0.0.1:9/db",
    "http://lab:hunter22@127.0.0.1:9",
    "http://lab:hunter22/y@127.0.0.1:9",
    "http://lab:p@hunter22@127.0.0.1:9",
    "http://hunter22@127.0.0.1:9",
    "http://127.0.0.1:9/?token=hunter22",
    "http://127.0.0.1:9/mlflow?access_token=hunter22&x=1",
]


@pytest.fixture
def new_workers() -> Iterator[None]:
    """Processes of joblib's that have the environment of this test."""
    yield
    loky = pytest.importorskip("joblib.externals.loky")
    loky.get_reusable_executor().shutdown(wait=True)


@pytest.fixture
def postgres(postgres_with_tables: str, tmp_path: Path) -> str:
    """The address of a PostgreSQL database without runs, password included."""
    return new_database(postgres_with_tables, tmp_path.name, copy_of="tables")


@pytest.fixture
def studies(postgres_with_tables: str, tmp_path: Path) -> str:
    """The address of an empty database for studies, which have tables of the same names as MLflow's."""
    return new_database(postgres_with_tables, f"{tmp_path.name}-studies")


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "_known", set())


def written(folder: Path, secret: str) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file() and secret.encode() in file.read_bytes()]


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_password_in_an_address_is_masked(address: str) -> None:
    assert has_secret(address)
    for text in (address, f"storage: '{address}'", f'cannot reach "{address}", is it there?', f"[{address},{address}]"):
        masked = without_password(text)
        assert "hunter22" not in masked
        assert "***" in masked
        assert without_password(masked) == masked


@pytest.mark.parametrize(
    "text",
    [
        "sqlite:////home/me@work/outputs/mlflow.db",
        "postgresql+psycopg://lab@db/study",
        "file:///home/me@work/x",
        "org/model@main",
        "http://127.0.0.1:5000/#/experiments/1/runs?workflowType=machine_learning",
        "models.base=org/name@rev method.keep=1",
        "journal:/x/y?z",
    ],
)
def test_what_is_no_password_is_shown(text: str) -> None:
    assert not has_secret(text)
    assert without_password(text) == text


@pytest.mark.parametrize("key", ["tracking.uri", "sweep.storage"])
@pytest.mark.parametrize("address", ADDRESSES)
def test_a_store_that_is_not_reached_is_one_line_without_the_password(
    mergelab_command: Command, workplace: Path, key: str, address: str
) -> None:
    if key == "sweep.storage" and address.startswith("http"):
        pytest.skip("studies are not stored there")
    kinds = [("method=soup",), ("-m", "method=soup,ties")] if key == "tracking.uri" else []
    for kind in [*kinds, ("-m", "sweep=ties", "sweep.n_trials=1")]:
        outcome = mergelab_command(*kind, f"{key}={address}", "source=mini")
        assert outcome.code == 2, outcome
        assert "hunter22" not in outcome.out + outcome.err
        assert [line for line in outcome.err.splitlines() if line.startswith("error: ")] == [
            outcome.err.splitlines()[-1]
        ]
    assert not written(workplace, "hunter22")


def test_the_composed_configuration_does_not_show_it(mergelab_command: Command) -> None:
    for more in ([], ["--resolve"]):
        outcome = mergelab_command("tracking.uri=http://lab:hunter22@host", "--cfg", "job", *more)
        assert outcome.code == 0
        assert "hunter22" not in outcome.out + outcome.err


def test_launchers_of_other_machines_get_the_address_itself() -> None:
    address = "tracking.uri=http://lab:hunter22@host"
    assert references([address, "hydra/launcher=ray"]) == [address, "hydra/launcher=ray"]
    assert address not in references([address, "hydra/launcher=joblib"])


@pytest.mark.slow
@pytest.mark.usefixtures("new_workers")
@pytest.mark.parametrize(
    "kind",
    [
        ("method=ties",),
        ("-m", "method=soup,slerp"),
        ("-m", "seed=0,1", "method.density=0.1"),
        ("-m", "sweep=task_arithmetic", "sweep.n_trials=2"),
        ("-m", "sweep=task_arithmetic", "sweep.n_trials=2", "hydra/launcher=joblib", "sweep.n_jobs=2"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("where", ["typed", "file", "environment"])
def test_stores_with_passwords_are_used_and_the_passwords_are_nowhere(
    mergelab_command: Command, arguments: list[str], workplace: Path, postgres: str, studies: str,
    kind: tuple[str, ...], where: str, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    sweeps = any(each.startswith("sweep=") for each in kind)
    stores = [f"tracking.uri={postgres}"] + ([f"sweep.storage={studies}"] if sweeps else [])
    if where == "file":
        (workplace / "conf" / "experiment").mkdir(parents=True)
        lines = "".join(
            f"{store.partition('.')[0]}: {{{store.partition('.')[2].replace('=', ': ', 1)}}}\n" for store in stores
        )
        recipe = workplace / "conf" / "experiment" / "mine.yaml"
        recipe.write_text(f"# @package _global_\n{lines}")
        stores = ["experiment=mine", "--config-dir", str(workplace / "conf")]
    elif where == "environment":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", postgres)
        stores = stores[1:]
    outcome = mergelab_command(*kind, *arguments, *stores)
    assert outcome.code == (2 if "method=soup,slerp" in kind else 0), outcome
    assert PASSWORD not in outcome.out + outcome.err
    if where == "file":
        recipe.unlink()
    assert not written(workplace, PASSWORD)
    folders = (path for kinds in ("runs", "grids", "sweeps") for path in workplace.glob(f"outputs/{kinds}/*/*"))
    made = {path for path in folders if path.is_dir()}
    assert made
    assert {stat.S_IMODE(path.stat().st_mode) for path in made} == {0o700}
    assert not _recorded(postgres, PASSWORD)


def _recorded(address: str, secret: str) -> list[Any]:
    """Everything in the store's tables that has the secret."""
    import sqlalchemy

    engine = sqlalchemy.create_engine(address)
    tables = sqlalchemy.MetaData()
    tables.reflect(engine)
    with engine.connect() as connection:
        rows = [(name, row) for name, table in tables.tables.items() for row in connection.execute(table.select())]
    engine.dispose()
    assert any(name == "runs" for name, _ in rows)
    return [row for _, row in rows if secret in str(row)]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks at Linux's list of processes")
def test_the_list_of_processes_does_not_show_it(workplace: Path) -> None:
    seen: list[str] = []
    with socket.socket() as silent:  # takes the connection and never responds
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        host = f"127.0.0.1:{silent.getsockname()[1]}"
        command = [sys.executable, "-m", "mergelab", "method=soup", "source=mini"]
        command.append(f"tracking.uri=http://lab:hunter22@{host}")
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            while process.poll() is None:
                listed = Path(f"/proc/{process.pid}/cmdline").read_bytes().decode()
                seen += [listed] if listed else []
                time.sleep(0.02)
            out, err = process.communicate()
    assert "hunter22" not in out + err
    assert process.returncode == 2
    assert f"cannot reach the tracking store http://lab:***@{host}" in err
    assert "tracking.uri=***" in seen[-1]
    assert "hunter22" not in seen[-1]
