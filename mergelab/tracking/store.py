"""Where runs are stored: the default SQLite file, a database or a server; reached quickly or refused in one line."""

from __future__ import annotations

import functools
import gc
import json
import logging
import os
import re
import shlex
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from mergelab.errors import TrackingError
from mergelab.tracking.config import TrackingConfig
from mergelab.tracking.locks import one_process
from mergelab.tracking.moved import ARTIFACTS, adapt_locations
from mergelab.tracking.secrets import has_secret, remember, without_password
from mergelab.tracking.sqlite_urls import absolute, is_sqlite, sqlite_path, sqlite_url
from mergelab.tracking.values import one_line
from mergelab.tracking.views import OLDEST

log = logging.getLogger(__name__)

DEFAULT = "outputs/mlflow.db"
_PROBE_S = 3.0  # to connect
_RESPONSE_S = 5.0  # to respond once connected
_LOCAL_UI = "http://127.0.0.1:5000"  # where `mlflow ui` listens
_DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
# MLflow's own defaults phone home, retry for minutes and write links to standard output.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "4",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


@dataclass(frozen=True)
class Store:
    """A tracking store's address, where its artifacts go (None: the server decides), and an SQLite store's file."""

    uri: str
    artifact_root: Path | None
    file: Path | None = None

    @property
    def shown(self) -> str:
        """The address without a password, files relative to the working folder where that is shorter."""
        return without_password(_relative_sqlite(self))


def locate(config: TrackingConfig) -> Store:
    """Return the store: ``tracking.uri``, else ``MLFLOW_TRACKING_URI``, else ``outputs/mlflow.db``.

    Raises:
        ConfigError: it is an SQLite address without a file.
        TrackingError: it is a folder.
    """
    outputs = _launch_folder() / "outputs"
    uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{DEFAULT}"
    remember(uri)
    if is_sqlite(uri):
        file = absolute(sqlite_path(uri), _launch_folder())
        return Store(sqlite_url(file, uri), file.parent / ARTIFACTS, file)
    scheme = _scheme(uri)
    if scheme.partition("+")[0] in _DATABASE_PORTS:
        return Store(uri, outputs / ARTIFACTS)
    if scheme in ("", "file"):
        folder = uri.removeprefix("file://").rstrip("/")
        raise TrackingError(
            f"tracking.uri={uri}: a folder is not a tracking store; use sqlite:///{folder}/mlflow.db or a server"
        )
    return Store(uri.rstrip("/") if scheme in ("http", "https") else uri, None)


def _scheme(uri: str) -> str:
    try:
        return urlsplit(uri).scheme
    except ValueError as error:
        raise TrackingError(f"the tracking store's address cannot be read: {error}") from None


def _launch_folder() -> Path:
    from hydra.core.hydra_config import HydraConfig

    # A job may run in its own folder (hydra.job.chdir); the store is where the user started.
    return Path(HydraConfig.get().runtime.cwd if HydraConfig.initialized() else os.getcwd())


def connect(store: Store) -> Any:
    """Open an MLflow client on ``store``, creating the tables at first use.

    Raises:
        TrackingError: the store cannot be reached within seconds, or is not a tracking store.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    _probe(store)
    with mlflow_calls(f"open the tracking store {store.shown}"), _no_collection():
        from mlflow import MlflowClient

        _silence_mlflow()
        _create_file(store)
        client = MlflowClient(tracking_uri=store.uri)
        client.search_experiments(max_results=1)
        if store.file is not None:
            adapt_locations(store.file)
    return client


@contextmanager
def _no_collection() -> Iterator[None]:
    """Pause garbage collection, and leave out of later ones what is there: MLflow's imports make objects that stay."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


def _create_file(store: Store) -> None:
    """Make a missing SQLite store: one process does it, in a file that gets its name when its tables are whole."""
    path = store.file
    if path is None or path.exists():
        return
    import sqlalchemy
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    fresh = path.with_name(f".{path.name}.creating")
    with exclusively(store):
        if path.exists():
            return
        log.info("creating the tracking store %s (a few seconds, once)", store.shown)
        fresh.unlink(missing_ok=True)
        # Fifty migrations that each wait for the disk; nothing is lost if power fails before the renaming.
        sqlalchemy.event.listen(sqlalchemy.Engine, "connect", _do_not_wait_for_disk)
        try:
            assert store.artifact_root is not None
            SqlAlchemyStore(sqlite_url(fresh), store.artifact_root.as_uri()).engine.dispose()
        finally:
            sqlalchemy.event.remove(sqlalchemy.Engine, "connect", _do_not_wait_for_disk)
        fresh.replace(path)


@contextmanager
def exclusively(store: Store) -> Iterator[None]:
    """Keep other processes out of the same block: all that use an SQLite store, those of this user here for others.

    Raises:
        TrackingError: another process has been in it for minutes.
    """
    with one_process(store.uri, store.file):
        yield


def _do_not_wait_for_disk(connection: Any, record: Any) -> None:
    connection.execute("PRAGMA synchronous = OFF")


def _probe(store: Store) -> None:
    scheme = store.uri.partition(":")[0].partition("+")[0]
    try:
        if store.file is not None:
            _probe_file(store.file)
        elif scheme in ("http", "https"):
            _probe_server(store.uri)
        elif scheme in _DATABASE_PORTS:
            _probe_database(store.uri, _DATABASE_PORTS[scheme])
    except Exception as error:
        raise TrackingError(
            f"cannot reach the tracking store {store.shown} ({one_line(str(error) or error)}); "
            "check tracking.uri and MLFLOW_TRACKING_URI, or set tracking=none"
        ) from error


def _probe_file(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        tempfile.TemporaryFile(dir=path.parent).close()  # fails here where nothing can be written
        return
    with path.open("r+b") as file:
        start = file.read(15)
    if start and start != b"SQLite format 3":
        raise ValueError("not an SQLite database")


def _probe_server(uri: str) -> None:
    import requests

    try:
        # Any response will do: a proxy may well hide /health.
        requests.get(f"{uri}/health", timeout=(_PROBE_S, _RESPONSE_S))
    except requests.exceptions.SSLError:
        return  # reached; whether the certificate is good enough is for MLflow's own settings to say
    except requests.exceptions.Timeout as error:
        raise TimeoutError(f"no answer within {_RESPONSE_S:.0f} seconds") from error
    except requests.exceptions.RequestException as error:
        raise ConnectionError("connection refused or host unknown") from error


def _probe_database(uri: str, default_port: int) -> None:
    # MLflow tries ten times, for over a minute, before it says what a first attempt says.
    import sqlalchemy

    url = sqlalchemy.make_url(uri)
    if "@" in (url.host or ""):
        raise ValueError("the password has an @: write it as %40")
    if not (host := url.host or "localhost").startswith("/"):
        socket.create_connection((host, url.port or default_port), timeout=_PROBE_S).close()
    engine = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.pool.NullPool)
    engine.connect().close()


_quiet = threading.local()


class _Silence(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not getattr(_quiet, "depth", 0)


def _silence_mlflow() -> None:
    for handler in logging.getLogger("mlflow").handlers:
        if not any(isinstance(present, _Silence) for present in handler.filters):
            handler.addFilter(_Silence())


@contextmanager
def mlflow_calls(purpose: str) -> Iterator[None]:
    """Keep MLflow's log lines off the console, and turn its errors into one line: ``cannot <purpose>: <why>``."""
    _quiet.depth = getattr(_quiet, "depth", 0) + 1
    try:
        yield
    except Exception as error:
        if isinstance(error, TrackingError) or not _is_storage_error(error):
            raise
        raise TrackingError(f"cannot {purpose}: {one_line(str(error) or error)}") from error
    finally:
        _quiet.depth -= 1


_STORAGE_PACKAGES = ("mlflow", "sqlalchemy", "sqlite3", "requests", "urllib3", "alembic")


def _is_storage_error(error: Exception) -> bool:
    package = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError) or package in _STORAGE_PACKAGES


def ui_command(store: Store) -> str:
    """Return the command, for the working folder, that opens the UI on ``store``; for a server its address."""
    if urlsplit(store.uri).scheme in ("http", "https"):
        return without_password(store.uri)
    if store.artifact_root is None:
        return f"the MLflow UI of {without_password(store.uri)}"
    uri = _relative_sqlite(store)
    # A password is not for the console; the shell knows it where the address came from the environment.
    if has_secret(uri) and os.environ.get("MLFLOW_TRACKING_URI") == uri:
        return f'{_mlflow()} ui --backend-store-uri "$MLFLOW_TRACKING_URI"'
    return f"{_mlflow()} ui --backend-store-uri {shlex.quote(without_password(uri))}"


def restore_command(store: Store, experiment_id: str) -> str:
    """Return the command, for the working folder, that restores a deleted experiment."""
    uri = _relative_sqlite(store)
    known = os.environ.get("MLFLOW_TRACKING_URI") == uri
    setting = "" if known else f"MLFLOW_TRACKING_URI={shlex.quote(without_password(uri))} "
    return f"{setting}{_mlflow()} experiments restore -x {experiment_id}"


def has_saved_views(store: Store) -> bool:
    """Return whether the UI of a store opens saved views: that of this MLflow, or of the server's."""
    return _version_of_ui(store.uri) >= OLDEST


@functools.lru_cache(maxsize=8)
def _version_of_ui(uri: str) -> tuple[int, ...]:
    """Return the version of the MLflow that shows a store; nothing where that is not known."""
    import mlflow
    import requests

    version = mlflow.__version__
    if urlsplit(uri).scheme in ("http", "https"):
        try:
            response = requests.get(f"{uri}/version", timeout=(_PROBE_S, _RESPONSE_S))
        except requests.exceptions.RequestException:
            return ()
        version = response.text if response.ok else ""
    found = re.match(r"(\d+)\.(\d+)", version)
    return tuple(map(int, found.groups())) if found else ()


def ui_page(store: Store, experiment_id: str, run_ids: Sequence[str] = (), view: str | None = None) -> str:
    """Return the page of the running UI that lists an experiment's runs, or that compares the named ones.

    Args:
        store: the store.
        experiment_id: the experiment.
        run_ids: the runs to compare; none: all runs are listed.
        view: the key of the saved view that lists them.
    """
    server = store.uri if urlsplit(store.uri).scheme in ("http", "https") else _LOCAL_UI
    page = f"experiments/{experiment_id}/runs?"
    if run_ids:
        runs, experiments = (quote(json.dumps(ids, separators=(",", ":"))) for ids in (list(run_ids), [experiment_id]))
        page = f"compare-runs?runs={runs}&experiments={experiments}&"
    elif view:
        page += f"viewStateShareKey={quote(view)}&"
    # Without it MLflow shows its pages for language-model applications.
    return without_password(f"{server}/#/{page}workflowType=machine_learning")


def _relative_sqlite(store: Store) -> str:
    if store.file is None or not store.file.is_relative_to(Path.cwd()):
        return store.uri
    return sqlite_url(store.file.relative_to(Path.cwd()), store.uri)


def _mlflow() -> str:
    """Return the ``mlflow`` of this Python: by name where the shell finds the same one."""
    own = Path(sys.executable).with_name("mlflow")
    if not own.exists():
        return f"{shlex.quote(sys.executable)} -m mlflow"
    found = shutil.which("mlflow")
    if found is not None and Path(found) == own:
        return "mlflow"
    return shlex.quote(str(own.relative_to(Path.cwd()) if own.is_relative_to(Path.cwd()) else own))
