"""Texts that leave this machine, without its paths and secrets: folders are called by their names."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mergelab.tracking.secrets import MASK, without_password

# A path from the root, from a home, or from the folders around the working one; what follows a scheme is an address.
_PATH = re.compile(r"(?<![\w.~/}])(?!//)(?:~[\w-]*|\.{1,2})?/[^\s'\",;|\[\](){}]+")
_SQLITE = re.compile(r"(?P<scheme>sqlite:/{3,4}|file:/{2,3})(?P<path>[^\s'\",;?]+)")


def is_local_path(text: str) -> bool:
    """Return whether a text is written like a path, or has several parts and is one of a file here."""
    if "\n" in text or len(text) < 2:
        return False
    if text.startswith(("/", "~", "./", "../")):
        return True
    try:
        return os.sep in text and Path(text).exists()
    except (OSError, ValueError):
        return False


def name_of(path: str) -> str:
    """Return the last part of a path."""
    return Path(os.path.abspath(os.path.expanduser(path))).name or "folder"


class LocalPaths:
    """Replaces the local paths in texts by names.

    Args:
        config: nested values whose paths are known as such, also relative ones.
    """

    def __init__(self, config: Any) -> None:
        self._names = {path: name_of(path) for path in _texts(config) if is_local_path(path)}

    def masked(self, text: str) -> str:
        """Return a text without paths of this machine, passwords and the token of the hub."""
        if self._names:
            longest_first = sorted(self._names, key=len, reverse=True)
            known = re.compile(rf"(?<![\w./-])(?:{'|'.join(map(re.escape, longest_first))})(?![\w-])")
            text = known.sub(lambda found: self._names[found[0]], text)
        text = _SQLITE.sub(lambda found: f"{found['scheme']}{name_of(found['path'])}", text)
        text = _PATH.sub(lambda found: name_of(found[0]), text)
        if token := _hub_token():
            text = text.replace(token, MASK)
        return without_password(text)

    def of_values(self, values: Any) -> Any:
        """Return nested values with all their texts masked, keys included."""
        if isinstance(values, Mapping):
            return {self.of_values(key): self.of_values(value) for key, value in values.items()}
        if isinstance(values, list | tuple):
            return [self.of_values(value) for value in values]
        if isinstance(values, str):
            return self._names.get(values) or self.masked(values)
        return values


def _hub_token() -> str | None:
    """Return the token of the hub; ``None`` where there is none, or none that this user can read."""
    from huggingface_hub import get_token

    with contextlib.suppress(OSError):
        return get_token()
    return None


def _texts(values: Any) -> Iterator[str]:
    if isinstance(values, Mapping):
        for value in values.values():
            yield from _texts(value)
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _texts(value)
    elif isinstance(values, str):
        yield values
