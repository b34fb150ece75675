"""An SQLite store whose folder was moved or copied: its artifacts' locations are made those of today.

MLflow stores every location as an absolute address. A table of mergelab's own remembers the folders in which the store
has been; what lies below one of them has moved with it. What was put elsewhere stays there.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

ARTIFACTS = "mlartifacts"  # the folder of the artifacts, beside the store

_FOLDERS = "mergelab_folders"
_LOCK_S = 60.0
# Columns that hold locations: of what is written later, and of what has been written.
_FUTURE = (("experiments", "artifact_location", ""), ("workspaces", "default_artifact_root", ""))
_WRITTEN = (
    ("runs", "artifact_uri", ""),
    ("logged_models", "artifact_location", ""),
    ("model_versions", "source", ""),
    ("model_versions", "storage_location", ""),
    ("trace_tags", "value", "WHERE key IN ('mlflow.artifactLocation', 'mlflow.trace.archiveLocation')"),
)
_COLUMNS = (*_FUTURE, *_WRITTEN)


def adapt_locations(file: Path) -> None:
    """Make the locations in the store ``file`` those of its present folder, where it has been in others.

    A run's artifacts that are only at the old place, because the database was moved alone, are still found there.

    Raises:
        sqlite3.Error: the store cannot be written to.
    """
    here = file.parent
    with _open(file) as database:
        known = _folders(database)
        if known == {here}:
            return
        if here not in known:
            known |= {here} | _first_folder(database)
        elif not any(_changes(database, here, known)):
            return
        database.execute("BEGIN IMMEDIATE")
        database.execute(f"CREATE TABLE IF NOT EXISTS {_FOLDERS} (folder TEXT PRIMARY KEY)")
        database.executemany(f"INSERT OR IGNORE INTO {_FOLDERS} VALUES (?)", [(str(folder),) for folder in known])
        for (table, column, _), changed in zip(_COLUMNS, list(_changes(database, here, known)), strict=True):
            database.executemany(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", changed)
        database.execute("COMMIT")


def bring(file: Path, run_id: str) -> None:
    """Copy a run's artifacts to the store ``file``, if they lie where the store was: the run is to be written to again.

    Raises:
        OSError, sqlite3.Error: they cannot be copied, or the store cannot be written to.
    """
    with _open(file) as database:
        (uri,) = database.execute("SELECT artifact_uri FROM runs WHERE run_uuid = ?", (run_id,)).fetchone()
        today = _today(uri, file.parent, _folders(database))
        old, new = _path(uri), _path(today)
        if old is None or new is None or today == uri:
            return
        if old.is_dir() and not new.exists():
            shutil.copytree(old, new)
        database.execute("UPDATE runs SET artifact_uri = ? WHERE run_uuid = ?", (today, run_id))


def location_today(file: Path, uri: str) -> Path | None:
    """Return the folder that the location ``uri`` of the store ``file`` means here; None for one on a server.

    Another process may reach the same store by another path at the same time, and adapt its locations to that.
    """
    path = _path(uri)
    if path is None or path.is_relative_to(file.parent):
        return path
    with _open(file) as database:
        return _path(_today(uri, file.parent, _folders(database)))


@contextmanager
def _open(file: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(file, timeout=_LOCK_S, isolation_level=None)) as database:
        yield database


def _folders(database: sqlite3.Connection) -> set[Path]:
    """Return the folders that the store is known to have been in."""
    if not _columns(database, _FOLDERS):
        return set()
    return {Path(folder) for (folder,) in database.execute(f"SELECT folder FROM {_FOLDERS}")}


def _first_folder(database: sqlite3.Connection) -> set[Path]:
    """Return the folder in which mergelab created the store: that of MLflow's default experiment."""
    found = database.execute("SELECT artifact_location FROM experiments WHERE experiment_id = 0").fetchone()
    path = _path(found[0] or "") if found else None
    return {path.parents[1]} if path is not None and path.parent.name == ARTIFACTS else set()


def _columns(database: sqlite3.Connection, table: str) -> set[str]:
    return {row[1] for row in database.execute(f"PRAGMA table_info({table})")}


def _changes(database: sqlite3.Connection, here: Path, folders: set[Path]) -> Iterator[list[tuple[str, int]]]:
    """Yield, for each column of `_COLUMNS`, the locations that are to be rewritten, with their rows."""
    for table, column, condition in _COLUMNS:
        changed = []
        if column in _columns(database, table):  # this version of MLflow has it
            renewed = _today if (table, column, condition) in _FUTURE else _found
            for row, uri in database.execute(f"SELECT rowid, {column} FROM {table} {condition}"):
                if uri and (new := renewed(uri, here, folders)) != uri:
                    changed.append((new, row))
        yield changed


def _path(uri: str) -> Path | None:
    """Return the path of a location on this machine; None of others."""
    if uri.startswith("file:"):
        return Path(url2pathname(urlsplit(uri).path))
    return Path(uri) if os.path.isabs(uri) else None


def _today(uri: str, here: Path, folders: Iterable[Path]) -> str:
    """Return a location as seen from the store's present folder; one that did not lie beside the store as it is."""
    path = _path(uri)
    above = [folder for folder in {*folders, here} if path is not None and path.is_relative_to(folder)]
    if path is None or not above:
        return uri
    nearest = max(above, key=lambda folder: len(folder.parts))
    return uri if nearest == here else (here / path.relative_to(nearest)).as_uri()


def _found(uri: str, here: Path, folders: Iterable[Path]) -> str:
    """Return the location of today, or the old one where the artifacts are there and not here."""
    new = _today(uri, here, folders)
    old, now = _path(uri), _path(new)
    return uri if old is not None and now is not None and old.exists() and not now.exists() else new
