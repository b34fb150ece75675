"""Addresses of SQLite files: ``sqlite:///FILE``, for files of any name.

What SQLAlchemy, which MLflow and Optuna use, makes of ``?`` and ``%`` in such an address depends on its version; each
address that is written here has been read back by it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import quote, unquote

from mergelab.config import local_path
from mergelab.errors import ConfigError

_ADDRESS = re.compile(r"(sqlite(?:\+\w+)?):///(?P<rest>.+)", re.DOTALL)
_OPTIONS = re.compile(r"\?(?P<options>[A-Za-z_]\w*=[^?/]*)$")
_ODD = frozenset("?%#")  # letters that have a meaning in an address


def is_sqlite(uri: str) -> bool:
    """Return whether an address is one of SQLite's."""
    return uri.partition(":")[0].partition("+")[0] == "sqlite"


def sqlite_path(uri: str) -> Path:
    """Return the file that an address means.

    A path whose folder exists as it is written is meant as it is written; ``?`` begins options only where ``key=value``
    follows.

    Raises:
        ConfigError: the address names no file.
    """
    found = _ADDRESS.fullmatch(uri)
    path = _OPTIONS.sub("", found["rest"]) if found else ""
    if not path or path == "/" or ":memory:" in path:
        raise ConfigError(f"{uri}: names no file; write sqlite:///FILE, or sqlite:////FOLDER/FILE for an absolute path")
    if path.startswith("file:"):  # SQLite's own form, which `sqlite_url` may write
        return Path(unquote(unquote(path.removeprefix("file:"))))
    if "%" in path and not Path(path).parent.is_dir() and Path(unquote(path)).parent.is_dir():
        return Path(unquote(path))
    return Path(path)


def sqlite_url(path: Path, given: str = "sqlite:///") -> str:
    """Return the address of a file, with the driver and the options that the address ``given`` has.

    Raises:
        ConfigError: the installed SQLAlchemy has no address for a file of that name.
    """
    text = str(path)
    options = found["options"] if (found := _OPTIONS.search(given)) else ""
    scheme, ending = given.partition(":")[0].removesuffix("+pysqlite"), f"?{options}" if options else ""
    if _ODD.isdisjoint(text):
        return f"{scheme}:///{text}{ending}"
    from sqlalchemy import make_url

    # With the driver named, MLflow does not make a folder of what is written here.
    scheme = scheme if "+" in scheme else f"{scheme}+pysqlite"
    quoted = text.translate({ord(letter): quote(letter) for letter in _ODD})
    for candidate in (text, quoted):
        url = make_url(f"{scheme}:///{candidate}")
        if url.database == text and not url.query:
            return f"{scheme}:///{candidate}{ending}"
    if make_url(f"{scheme}:///file:{quoted}").database == f"file:{quoted}":
        return f"{scheme}:///file:{quoted}?uri=true{f'&{options}' if options else ''}"
    raise ConfigError(f"{text}: SQLAlchemy has no address for a file of this name; rename its folder")


def absolute(path: Path, folder: str | os.PathLike[str]) -> Path:
    """Return the file that ``path``, relative to ``folder``, leads to: the same one for every link that leads there."""
    return Path(os.path.realpath(Path(folder) / local_path(str(path), "the store's file")))
