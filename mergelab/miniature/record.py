"""The records that every grammar makes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """A labelled example: one or two sentences, a class number or a score, and the phenomenon that it shows."""

    texts: tuple[str, ...]
    label: float
    kind: str


@dataclass(frozen=True)
class Document:
    """Unlabelled text: two sentences that belong together, and one from a similar document that does not follow.

    A document of one sentence leaves ``second`` and ``stranger`` empty.
    """

    first: str
    second: str = ""
    stranger: str = ""
