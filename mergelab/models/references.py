"""References to models: what a user may write for one, and which folder it stands for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from mergelab.errors import ModelError

_HUB_ID = re.compile(r"^[\w.\-]+(/[\w.\-]+)?$")


@dataclass(frozen=True)
class Reference:
    """A model as the user named it: a local folder, or a repository on the hub at a revision."""

    text: str
    folder: Path | None = None
    repository: str | None = None
    revision: str | None = None


def parse_reference(text: str) -> Reference:
    """Read ``org/name``, ``org/name@revision`` or a local folder's path.

    What exists as a folder is that folder; what is written like a path (``./x``, ``/x``, ``~/x``) must be one.

    Raises:
        ModelError: a path without a folder, or text that is neither a path nor a hub id.
    """
    folder = Path(text).expanduser()
    if folder.is_dir():
        return Reference(text, folder=folder.absolute())
    if text.startswith(("/", "./", "../", "~")):
        what = "is a file, not a folder" if folder.is_file() else "does not exist"
        raise ModelError(f"model {text!r}: the folder {what}")
    repository, _, revision = text.partition("@")
    if not _HUB_ID.match(repository) or ("@" in text and not revision):
        raise ModelError(f"model {text!r}: neither a local folder nor a hub id (org/name or org/name@revision)")
    return Reference(text, repository=repository, revision=revision or None)
