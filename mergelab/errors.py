"""The errors that mergelab raises for its user: one line each, naming what is wrong and what would be right."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable

LONGEST_LINE = 400
_LONGEST_LIST, _LONGEST_NAME, _FEW = 160, 80, 3


class MergelabError(Exception):
    """Base of all errors that a user can fix; the command line prints the message and exits with 2.

    The message is one printable line, whatever goes into it. The command line cuts it to `LONGEST_LINE` characters.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(str(message), sys.maxsize))


class ConfigError(MergelabError):
    """A configuration key, value or combination is not usable."""


class ModelError(MergelabError):
    """A model reference, folder or checkpoint cannot be used."""


class KeyMismatch(ModelError):
    """Models do not have the same tensor names."""


class ShapeMismatch(ModelError):
    """A tensor's shape or dtype differs between models."""


class NonFinite(ModelError):
    """A tensor holds NaN or infinity."""


class InsufficientMemoryError(ModelError):
    """The models do not fit into memory."""


class DataError(MergelabError):
    """Evaluation data, its columns or its labels cannot be used."""


class HubError(MergelabError):
    """The model hub cannot be reached, or lacks the requested repository or file."""


class TrackingError(MergelabError):
    """The tracking store cannot be used."""


class SweepError(MergelabError):
    """A sweep's study, its storage or its search space cannot be used."""


class MergeWarning(UserWarning):
    """A caution about a merge that succeeds; the command line prints the message."""


def nearest(name: str, options: Iterable[str]) -> str | None:
    """Return the option that is spelled most like ``name``; None where none is near."""
    return next(iter(difflib.get_close_matches(str(name), [str(option) for option in options], n=1, cutoff=0.6)), None)


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Return ``"; did you mean 'ties'?"`` for the option closest to ``name``, or an empty string when none is close."""
    near = nearest(name, options)
    return f"; did you mean {near!r}?" if near else ""


def listed(names: Iterable[str], limit: int = 8) -> str:
    """Join the first ``limit`` of ``names`` with commas, the first three where that is long; append how many follow."""
    names = [shortened(name, _LONGEST_NAME) for name in names]
    head = ", ".join(names[:limit])
    if len(head) > _LONGEST_LIST and len(names) > _FEW:
        limit = min(limit, _FEW)
        head = ", ".join(names[:limit])
    return head if len(names) <= limit else f"{head} and {len(names) - limit} more"


def shortened(value: object, limit: int = 60) -> str:
    """Return the printable text of ``value``; of a long one, the beginning and the end, an ellipsis between them."""
    text = _printable(str(value))
    if len(text) <= limit:
        return text
    end = (limit - 1) // 3
    return f"{text[: limit - 1 - end]}…{text[-end:]}"


def one_line(text: str, limit: int = LONGEST_LINE) -> str:
    """Return ``text`` as one printable line of at most ``limit`` characters; what is cut out is in the middle."""
    return shortened(" ".join(line.strip() for line in text.splitlines() if line.strip()), limit)


def _printable(text: str) -> str:
    """Show as escapes what controls a terminal: names may come from files that anyone has written."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type when the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
