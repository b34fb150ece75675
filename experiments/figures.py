"""What the figures of the experiments share: panels in a grid, small letters, the same file every time."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def panels(rows: int, columns: int, width: float = 3.2, height: float = 2.6) -> tuple[Any, Any]:
    """Return a figure and its axes (rows, columns), each ``width`` by ``height`` inches."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (width * columns, height * rows)
    return plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")


def describe(axis: Any, title: str, x: str, y: str = "") -> None:
    """Write a panel's title, labels and legend."""
    axis.set_title(title, fontsize=8)
    axis.set_xlabel(x, fontsize=8)
    axis.set_ylabel(y, fontsize=8)
    axis.tick_params(labelsize=7)
    axis.legend(fontsize=6)


def save(figure: Any, file: Path) -> None:
    """Write a figure, without the versions that would make every file another one, and close it."""
    import matplotlib.pyplot as plt

    figure.savefig(file, dpi=110, metadata={"Software": None})
    plt.close(figure)
