"""Passwords and tokens in addresses of stores: masked wherever text is shown or written."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import unquote

MASK = "***"

# An address with a host: what is before its last @ is a user's name and, after a colon, the password.
_USERINFO = re.compile(r"(?P<scheme>\b[A-Za-z][\w+.-]*)://(?![/'\"\s])(?P<user>(?:(?!://)[^\s'\"<>])*)@")
_OPTION = re.compile(
    r"(?P<key>[?&;][\w.-]*(?:pass|pwd|token|secret|credential|signature|api[-_]?key)[\w.-]*=)[^&;#\s'\"]+",
    re.IGNORECASE,
)
_SHORT = 4  # a shorter piece of a password is also found in other words
# Where users keep what the stores are reached with.
_VARIABLES = ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")

_known: set[str] = set()


def without_password(text: str) -> str:
    """Mask the passwords and tokens of every address in ``text``, and those that `remember` was given."""
    masked = _OPTION.sub(rf"\g<key>{MASK}", _USERINFO.sub(_masked_userinfo, text))
    for secret in sorted(_known, key=len, reverse=True):
        masked = masked.replace(secret, MASK)
    return masked


def _masked_userinfo(found: re.Match[str]) -> str:
    name, colon, _ = found["user"].partition(":")
    if not colon and (found["scheme"] in ("http", "https") or "@" in name):
        return f"{found['scheme']}://{MASK}@"  # a token in place of a name
    return f"{found['scheme']}://{name}:{MASK}@" if colon else found[0]


def has_secret(text: str) -> bool:
    """Return whether ``text`` has an address with a password or a token."""
    return _OPTION.search(text) is not None or _USERINFO.sub(_masked_userinfo, text) != text


def remember(address: str) -> None:
    """Mask the passwords of this address from now on, also where a message has them without the address.

    A library that cuts an address at another place than it is meant may show a piece of the password.
    """
    users = [found for found in _USERINFO.finditer(address) if _masked_userinfo(found) != found[0]]
    pieces = [found["user"].partition(":")[2] or found["user"] for found in users]
    pieces += [found[0].partition("=")[2] for found in _OPTION.finditer(address)]
    for piece in pieces:
        parts = (piece, unquote(piece), *re.split(r"[@/]", piece))
        _known.update(part for part in parts if len(part) >= _SHORT and part != MASK)


def in_reach(texts: Iterable[str | None] = ()) -> bool:
    """Return whether one of ``texts``, or the environment, has a password or a token of a store."""
    values = [os.environ.get(name) for name in _VARIABLES]
    return any(values[1:]) or any(has_secret(text) for text in (values[0], *texts) if text)


def mask_passwords(folder: Path) -> None:
    """Mask the passwords and tokens in the YAML files of a folder."""
    for file in folder.glob("*.yaml"):
        text = file.read_text(encoding="utf-8")
        if (masked := without_password(text)) != text:
            file.write_text(masked, encoding="utf-8")


def private_folder(folder: Path) -> None:
    """Make a folder, and those above it that do not exist, that nobody else can look into."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    folder.chmod(0o700)


class MaskedFormatter(logging.Formatter):
    """Formats a log's lines without passwords and tokens."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        return without_password(super().format(record))
