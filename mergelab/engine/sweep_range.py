"""Markers in a parameter's annotation: what a sweep searches where the range of values does not say it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SweepRange:
    """The part of a number's range that ``sweep=<method>`` searches, such as ``Annotated[float, SweepRange(0, 2)]``.

    Attributes:
        low: the smallest value.
        high: the largest value.
        log: whether it is searched on a logarithmic scale.
    """

    low: float
    high: float
    log: bool = False


@dataclass(frozen=True)
class NotSwept:
    """``sweep=<method>`` leaves the number at its default, such as the tolerance of a solver."""
