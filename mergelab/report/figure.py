"""A figure as Plotly's JSON, and what figures share: plain data, which the page's own copy of Plotly draws.

Colours are names of roles (``"@merged"``), which the page replaces by those of its light or dark design. Names of
models and tasks are escaped: Plotly reads a part of HTML in every text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from mergelab.errors import shortened

_LONG_NAME = 48


@dataclass(frozen=True)
class Figure:
    """A figure: Plotly's ``data`` and ``layout``, a title, and a sentence on how to read it."""

    title: str
    caption: str
    data: Sequence[Mapping[str, Any]]
    layout: Mapping[str, Any] = field(default_factory=dict)
    height: int = 380


def bars(values: Sequence[tuple[float, float | None, float | None]], colour: str) -> dict[str, Any]:
    """Return error bars of scores, each given with its bounds."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [0 if high is None else max(0.0, high - value) for value, _, high in values],
        "arrayminus": [0 if low is None else max(0.0, value - low) for value, low, _ in values],
        "color": colour,
        "thickness": 1.4,
        "width": 3,
    }


def vertical(at: float, text: str, colour: str, dash: str) -> dict[str, Any]:
    """Return a vertical line through the whole figure, as a shape and the annotation above it."""
    line = {"color": colour, "width": 1.3, "dash": dash}
    shape = {"type": "line", "x0": at, "x1": at, "y0": 0, "y1": 1, "yref": "paper", "line": line, "layer": "below"}
    note = {"x": at, "y": 1, "yref": "paper", "yanchor": "bottom", "showarrow": False, "text": text}
    return {"shape": shape, "annotation": {**note, "font": {"size": 11, "color": colour}}}


def shown(label: str) -> str:
    """Return a name as a figure shows it: not too long, escaped."""
    return escape(shortened(label, _LONG_NAME))


def short(key: str) -> str:
    """Return a config key without its group where that is the method."""
    return key.removeprefix("method.")


def sentence(text: str) -> str:
    """Return ``text`` with a capital letter."""
    return text[:1].upper() + text[1:]
