"""Compute SHA-256 digests of weight files, and cache them between runs."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from mergelab.cache import cache_dir
from mergelab.weights.unfinished import unfinished_file


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as hex digits.

    The digest is cached in ``<cache>/sha256.json`` by the file's resolved path, with its size and modification times. A
    file whose size and times are unchanged is not read again. A cache folder that cannot be written is no error.
    """
    path = path.resolve()
    status = path.stat()
    stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    known = _read_digests().get(str(path))
    if isinstance(known, dict) and known.get("stamp") == stamp and isinstance(known.get("sha256"), str):
        return str(known["sha256"])
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    _store_digest(str(path), {"stamp": stamp, "sha256": digest})
    return digest


def joint_sha256(digests: Sequence[str]) -> str:
    """Return a single digest itself, or the SHA-256 of several in their order."""
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _digests_file() -> Path:
    return cache_dir() / "sha256.json"


def _read_digests() -> dict[str, object]:
    try:
        content = json.loads(_digests_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _store_digest(path: str, entry: dict[str, object]) -> None:
    """Add an entry and drop those of deleted files; of two processes at once, one may lose its entry."""
    with suppress(OSError):
        digests = _digests_file()
        digests.parent.mkdir(parents=True, exist_ok=True)
        entries = {known: value for known, value in _read_digests().items() if os.path.exists(known)}
        with unfinished_file(digests) as temporary:
            temporary.write_text(json.dumps(entries | {path: entry}, indent=1), encoding="utf-8")
