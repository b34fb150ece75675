"""Nested values as MLflow takes them: flat names, short strings, numbers that stay numbers."""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import Container, OmegaConf

from mergelab.errors import MergelabError
from mergelab.tracking.secrets import without_password

MAX_NAME = 250  # MLflow's limits, in characters
MAX_PARAM = 6000
MAX_TAG = 5000


def flatten(values: Mapping[str, Any] | Container) -> dict[str, str]:
    """Flatten a nested config to ``{"method.density": "0.2", ...}``.

    A list that holds numbers or nested values gets one entry per element (``method.weights.0``), so that the UI can
    plot each; a list of plain strings stays one entry. ``None`` is ``null``, as in the YAML it came from.
    """
    if isinstance(values, Container):
        values = OmegaConf.to_container(values, resolve=True)  # type: ignore[assignment]
    flat: dict[str, str] = {}
    for name, value in _leaves("", values):
        name = unique(tidy_name(name), flat)
        flat[name] = shortened(_text(value), MAX_PARAM)
    return flat


def _leaves(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(f"{prefix}.{key}" if prefix else str(key), inner)
    elif isinstance(value, list | tuple) and any(not isinstance(item, str | bool) for item in value):
        for index, inner in enumerate(value):
            yield from _leaves(f"{prefix}.{index}", inner)
    else:
        yield prefix, value


def _text(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping | Sequence) and not isinstance(value, str):
        return without_password(json.dumps(value, ensure_ascii=False))
    return without_password(str(value))


def tidy_name(name: str) -> str:
    """Make ``name`` one that MLflow accepts for a parameter or metric: word characters and ``-. :/``, no odd path."""
    name = re.sub(r"[^\w\-. :/]", "_", name)
    if posixpath.normpath(name) != name or name.startswith(("/", "..")):
        name = name.replace("/", "_").strip(".") or "_"
    return shortened(name, MAX_NAME, mark="_")


def unique(name: str, taken: Mapping[str, Any]) -> str:
    """Return ``name``, numbered if it is taken."""
    if name not in taken:
        return name
    return next(f"{name}_{number}" for number in range(2, len(taken) + 3) if f"{name}_{number}" not in taken)


def shortened(text: str, limit: int, mark: str = "… sha256 ") -> str:
    """Cut ``text`` to ``limit`` characters; what is cut ends in the whole text's hash, so that texts stay apart."""
    if len(text) <= limit:
        return text
    ending = mark + hashlib.sha256(text.encode()).hexdigest()[:16]
    return text[: limit - len(ending)] + ending


def one_line(error: BaseException | str) -> str:
    """Return the first line of an error's message, with its type where the message alone would not say what it is."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    if isinstance(error, BaseException) and not isinstance(error, MergelabError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return shortened(without_password(text), 500)
