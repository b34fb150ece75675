"""Define the records that every grammar draws."""

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
    """Unlabelled text: two consecutive sentences, and a sentence from a similar document that does not follow.

    A document of one sentence has an empty ``second`` and ``unrelated``.
    """

    first: str
    second: str = ""
    unrelated: str = ""
