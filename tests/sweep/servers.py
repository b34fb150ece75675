"""What a sweep over several machines needs, started on this one: PostgreSQL, an MLflow server, a Ray cluster."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

PASSWORD = "not-to-be-shown"
_START_S = 120.0


def free_port() -> int:
    with socket.socket() as once:
        once.bind(("127.0.0.1", 0))
        port: int = once.getsockname()[1]
        return port


@contextmanager
def _short_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="ml-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder whose path is short enough for the sockets in it."""
    with _short_folder() as folder:
        yield folder


@pytest.fixture
def postgres(short_folder: Path) -> Iterator[str]:
    """The address of an empty PostgreSQL database, password included, on a server of its own."""
    with _postgres_server(short_folder) as address:
        yield address


@pytest.fixture(scope="module")
def postgres_with_tables() -> Iterator[str]:
    """The address of a PostgreSQL database that has MLflow's tables without an entry, to make copies of."""
    with _short_folder() as folder, _postgres_server(folder) as address:
        import sqlalchemy
        from mlflow.store.db.utils import _initialize_tables

        address = new_database(address, "tables")
        engine = sqlalchemy.create_engine(address)
        _initialize_tables(engine)
        engine.dispose()
        yield address


def new_database(address: str, name: str, *, copy_of: str = "template1") -> str:
    """Make a database on the server of another one's address; return its address."""
    import sqlalchemy

    server = address.rpartition("/")[0]
    engine = sqlalchemy.create_engine(f"{server}/postgres", isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text(f'CREATE DATABASE "{name}" TEMPLATE "{copy_of}"'))
    engine.dispose()
    return f"{server}/{name}"


@contextmanager
def _postgres_server(folder: Path) -> Iterator[str]:
    pytest.importorskip("psycopg")
    programs = _postgres_programs()
    # The server refuses to be root's.
    user = pwd.getpwnam("postgres") if os.getuid() == 0 else None
    data, secret = folder / "data", folder / "secret"
    data.mkdir()
    secret.write_text(PASSWORD)
    for path in (folder, data, secret) if user else ():
        os.chown(path, user.pw_uid, user.pw_gid)
    who = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if user else {}
    quiet = {"stdout": subprocess.DEVNULL, "cwd": folder, **who}
    settings = ["--auth=scram-sha-256", f"--pwfile={secret}", "--username=lab", "--encoding=UTF8", "--locale=C"]
    subprocess.run([programs / "initdb", "--no-sync", *settings, data], check=True, timeout=_START_S, **quiet)
    port = free_port()
    options = {"listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": folder, "fsync": "off"}
    command = [programs / "postgres", "-D", data, *(f"--{name}={value}" for name, value in options.items())]
    log = (folder / "log").open("wb")
    server = subprocess.Popen(command, stderr=log, **quiet)
    try:
        _wait_for(lambda: _takes_connections(port), server, "PostgreSQL")
        yield f"postgresql+psycopg://lab:{PASSWORD}@127.0.0.1:{port}/postgres"
    finally:
        server.send_signal(signal.SIGINT)  # drops connections
        server.wait(60)
        log.close()


def _postgres_programs() -> Path:
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    folders = [folder for folder in folders if (folder / "initdb").exists() and (folder / "postgres").exists()]
    if not folders:
        pytest.skip("needs PostgreSQL's server programs (Debian: apt-get install postgresql)")
    if os.getuid() == 0 and not any(entry.pw_name == "postgres" for entry in pwd.getpwall()):
        pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
    return folders[-1]


def _takes_connections(port: int) -> bool:
    import psycopg

    try:
        psycopg.connect(
            host="127.0.0.1", port=port, user="lab", password=PASSWORD, dbname="postgres", connect_timeout=5
        ).close()
    except psycopg.OperationalError:
        return False
    return True


@pytest.fixture
def mlflow_server(tmp_path: Path) -> Iterator[str]:
    """The address of an MLflow server with an empty store."""
    from mergelab.tracking import TrackingConfig, open_tracking

    folder = tmp_path / "server"
    store = f"sqlite:///{folder}/mlflow.db"
    open_tracking(TrackingConfig(uri=store))  # many times faster than the server makes its tables
    port = free_port()
    places = ["--backend-store-uri", store, "--artifacts-destination", str(folder / "artifacts")]
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1", *places]
    log = (folder / "log").open("wb")
    server = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_for(lambda: _answers(f"{address}/health"), server, "the MLflow server")
        yield address
    finally:
        end(server)
        log.close()


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture
def ray_cluster(short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a Ray cluster of this machine, started elsewhere than the sweep; Ray believes in two GPUs."""
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else Ray writes one into the home folder
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    port = free_port()
    ports = ["--ray-client-server-port", "--dashboard-agent-listen-port", "--dashboard-agent-grpc-port"]
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={port}"]
    command += [f"{name}={free_port()}" for name in ports] + ["--min-worker-port=0", "--max-worker-port=0"]
    command += ["--node-ip-address=127.0.0.1", "--num-cpus=4", "--num-gpus=2", "--object-store-memory=80000000"]
    command += ["--include-dashboard=false", f"--temp-dir={short_folder}/ray"]
    log = (short_folder / "ray-log").open("wb")
    head = subprocess.Popen(command, stdout=log, stderr=log, cwd=short_folder, start_new_session=True)
    try:
        _wait_for(lambda: b"Ray runtime started" in (short_folder / "ray-log").read_bytes(), head, "Ray")
        yield f"127.0.0.1:{port}"
    finally:
        end(head)
        log.close()


def _wait_for(ready: Callable[[], bool], process: subprocess.Popen[bytes], what: str) -> None:
    deadline = time.monotonic() + _START_S
    while not ready():
        assert process.poll() is None, f"{what} did not start"
        assert time.monotonic() < deadline, f"{what} did not start in time"
        time.sleep(0.1)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process with all that it has started."""
    try:
        family: Sequence[psutil.Process] = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
    _, alive = psutil.wait_procs(family, timeout=5)
    for one in alive:
        one.kill()
    psutil.wait_procs(alive, timeout=10)
