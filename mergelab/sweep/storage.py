"""Where studies are stored: SQLite by default, any database that Optuna takes, or its journal in a file."""

from __future__ import annotations

import contextlib
import functools
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelab.errors import ConfigError, SweepError, TrackingError
from mergelab.tracking.locks import one_process
from mergelab.tracking.secrets import remember, without_password
from mergelab.tracking.sqlite_urls import absolute, is_sqlite, sqlite_path, sqlite_url

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

DEFAULT = "outputs/sweeps.db"
_JOURNAL, _MEMORY = "journal:", ":memory:"
# What Optuna raises about a file that is no journal.
_OF_JOURNALS = (ValueError, LookupError, TypeError, AttributeError, AssertionError)
_TRIES = 5
_BUSY_S = 60.0  # how long SQLite waits for another process's write


def storage_url(wanted: str | None, folder: str) -> str:
    """Return the storage's URL, what is relative in it being relative to ``folder``: ``outputs/sweeps.db`` there.

    Raises:
        SweepError: it is an SQLite address without a file.
    """
    url = wanted or f"sqlite:///{DEFAULT}"
    remember(url)
    if url.startswith(_JOURNAL):
        return f"{_JOURNAL}{absolute(Path(url.removeprefix(_JOURNAL)), folder)}"
    if not is_sqlite(url) or url.endswith(_MEMORY):
        return url
    try:
        return sqlite_url(absolute(sqlite_path(url), folder), url)
    except ConfigError as error:
        raise SweepError(f"sweep.storage={error}") from None


def storage_file(url: str) -> Path | None:
    """Return the file of a storage; None for one on a server or in memory."""
    if url.startswith(_JOURNAL):
        return Path(url.removeprefix(_JOURNAL))
    return sqlite_path(url) if is_sqlite(url) and not url.endswith(_MEMORY) else None


@contextlib.contextmanager
def one_process_at(url: str) -> Iterator[None]:
    """Keep other processes that use the same storage out of the same block.

    Raises:
        SweepError: another process has been in it for minutes.
    """
    try:
        with one_process(url, storage_file(url)):
            yield
    except TrackingError as error:
        raise SweepError(f"sweep.storage: {error}") from None


def redacted(url: str) -> str:
    """Write a URL without its password."""
    return url if url.startswith(_JOURNAL) else without_password(url)


def silence(optuna: Any) -> None:
    """Silence Optuna on standard error: mergelab reports the same itself; and its warnings of experimental features."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


@contextlib.contextmanager
def storage_errors(url: str, *others: type[Exception]) -> Iterator[None]:
    """Turn the errors of a study's storage, and ``others`` that can only be its, into one line.

    Raises:
        SweepError: it cannot be reached, or went away.
    """
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    caught: tuple[type[Exception], ...] = (SQLAlchemyError, StorageInternalError, *others)
    try:
        yield
    except caught as error:
        cause = error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ else error
        reason = without_password((str(getattr(cause, "orig", None) or cause).strip() or repr(cause)).splitlines()[0])
        raise SweepError(f"sweep.storage={redacted(url)}: cannot be used: {reason}") from None


@contextlib.contextmanager
def _driver_named(url: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        driver = error if isinstance(error, ModuleNotFoundError) else error.__cause__
        if not isinstance(driver, ModuleNotFoundError):
            raise
        raise SweepError(
            f"sweep.storage={redacted(url)}: the driver {driver.name!r} is not installed; "
            "for PostgreSQL: pip install 'mergelab[postgres]' and postgresql+psycopg://…"
        ) from None


@functools.lru_cache(maxsize=4)
def open_storage(url: str) -> BaseStorage:
    """Open a storage, once per process.

    Args:
        url: ``sqlite:///FILE``, ``postgresql+psycopg://USER:PASSWORD@HOST/DATABASE``, ``journal:FILE``.

    Raises:
        SweepError: it cannot be reached, or its driver is not installed.
    """
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    silence(optuna)
    _check_host(url)
    file = storage_file(url)
    others = (OSError, RuntimeError, *(_OF_JOURNALS if url.startswith(_JOURNAL) else ()))
    with storage_errors(url, *others), _driver_named(url):
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
        if url.startswith(_JOURNAL):
            return JournalStorage(JournalFileBackend(str(file)))
        arguments = {"connect_args": {"timeout": _BUSY_S}} if file is not None else {"pool_pre_ping": True}
        with one_process_at(url):
            return optuna.storages.get_storage(_with_tables(url, arguments))


def _check_host(url: str) -> None:
    """Refuse an address that SQLAlchemy cuts within its password, which it would then show as the host.

    Raises:
        SweepError: the password has an @, or it is no address.
    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    if url.startswith(_JOURNAL):
        return
    try:
        host = make_url(url).host or ""
    except (ArgumentError, ValueError):
        raise SweepError(
            f"sweep.storage={redacted(url)}: is not an address; write sqlite:///FILE, "
            "postgresql+psycopg://USER:PASSWORD@HOST/DATABASE or journal:FILE"
        ) from None
    if "@" in host:
        raise SweepError(f"sweep.storage={redacted(url)}: the password has an @: write it as %40")


def _with_tables(url: str, arguments: dict[str, Any]) -> BaseStorage:
    """Open a database; where it is new, processes of other machines may create its tables at the same time."""
    import optuna
    from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError

    url = url.replace("{", "{{").replace("}", "}}")  # Optuna fills its version into {SCHEMA_VERSION}
    for _ in range(_TRIES - 1):
        try:
            return optuna.storages.RDBStorage(url, engine_kwargs=arguments)
        except (IntegrityError, ProgrammingError, OperationalError) as error:
            if "database is locked" in str(error):
                raise  # it was waited for
        time.sleep(0.2)
    return optuna.storages.RDBStorage(url, engine_kwargs=arguments)
