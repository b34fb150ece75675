"""The errors that mergelab raises for its user: one line each, of what is wrong and what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MergelabError(Exception):
    """Something the user can mend; the command line prints the message as one line and exits with 2."""


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
    """The memory has no room for the models."""


class DataError(MergelabError):
    """Evaluation data, its columns or its labels cannot be used."""


class HubError(MergelabError):
    """The model hub cannot be reached, or does not have what was asked for."""


class TrackingError(MergelabError):
    """The tracking store cannot be used."""


class SweepError(MergelabError):
    """A sweep's study, its storage or its search space cannot be used."""


class MergeWarning(UserWarning):
    """Something about a merge that its user should know; the command line prints the message."""


def nearest(name: str, options: Iterable[str]) -> str | None:
    """Return the option that is spelled most like ``name``; None where none is near."""
    return next(iter(difflib.get_close_matches(str(name), [str(option) for option in options], n=1, cutoff=0.6)), None)


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Return ``"; did you mean 'ties'?"`` for the option nearest to ``name``, or an empty string when none is near."""
    near = nearest(name, options)
    return f"; did you mean {near!r}?" if near else ""


def listed(names: Iterable[str], limit: int = 8) -> str:
    """Join ``names`` with commas, the first ``limit`` of them, and say how many more there are."""
    names = list(names)
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
