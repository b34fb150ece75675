"""Where studies are stored: SQLite by default, any database that Optuna takes, or its journal in a file."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelab.errors import SweepError
from mergelab.tracking.values import without_password

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

DEFAULT = "outputs/sweeps.db"
_JOURNAL = "journal:"


def storage_url(wanted: str | None, folder: str) -> str:
    """Return the storage's URL, what is relative in it being relative to ``folder``: ``outputs/sweeps.db`` there."""
    url = wanted or f"sqlite:///{DEFAULT}"
    for scheme in (_JOURNAL, "sqlite:///"):
        if url.startswith(scheme) and ":memory:" not in url:
            return f"{scheme}{(Path(folder) / Path(url.removeprefix(scheme)).expanduser()).absolute()}"
    return url


def redacted(url: str) -> str:
    """Write a URL without its password."""
    if url.startswith(_JOURNAL):
        return url
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return without_password(make_url(url).render_as_string(hide_password=True))
    except ArgumentError:
        scheme, separator, _ = url.partition("://")
        return f"{scheme}{separator}…" if separator else url


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
        reason = str(getattr(cause, "orig", None) or cause).strip().splitlines()[0]
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
    # What is read from a file that is no journal can be of any type.
    with storage_errors(url, OSError, RuntimeError, ValueError, LookupError, TypeError), _driver_named(url):
        if url.startswith(_JOURNAL):
            file = Path(url.removeprefix(_JOURNAL))
            file.parent.mkdir(parents=True, exist_ok=True)
            return JournalStorage(JournalFileBackend(str(file)))
        if url.startswith("sqlite:///"):
            Path(url.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
            rdb = optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 60}})
        else:
            rdb = optuna.storages.RDBStorage(url, engine_kwargs={"pool_pre_ping": True})
        return optuna.storages.get_storage(rdb)
