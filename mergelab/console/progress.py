"""Progress on long steps, warnings, and lines of text."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from mergelab.console.formats import chosen_format
from mergelab.errors import MergeWarning

if TYPE_CHECKING:
    from rich.console import Console

    from mergelab.tracking import Tracker


Progress = Callable[[str, float], None]


QUIET = "MERGELAB_QUIET"
"""The environment variable that ``--quiet`` sets: only results are written to standard output."""

_SHOWN_WARNINGS = 6
_silent: ContextVar[bool] = ContextVar("silent", default=False)


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Write no lines, tables and bars: the caller returns what they would show."""
    token = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(token)


def is_silenced() -> bool:
    """Return whether lines and tables are not written."""
    return _silent.get()


def console(*, error: bool = False) -> Console:
    """Open standard output (or standard error) for writing, where it is no terminal ``COLUMNS`` wide, or 200."""
    from rich.console import Console

    stream = sys.stderr if error else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else 200
    return Console(file=stream, width=width, highlight=False, soft_wrap=not stream.isatty())


def say(text: str, *, result: bool = False, failure: bool = False, to_copy: bool = False) -> None:
    """Write a line to standard output.

    With ``--quiet`` only what is part of the ``result`` is written there; a ``failure`` goes to standard error. With a
    ``--format`` that is no table, both go there. A line ``to_copy`` is not broken at the terminal's end.
    """
    if failure or (not is_silenced() and (result or not _quiet())):
        error = chosen_format() != "table" or (failure and _quiet())
        console(error=error).print(text, markup=False, soft_wrap=True if to_copy else None)


def _quiet() -> bool:
    return is_silenced() or os.environ.get(QUIET, "0") not in ("", "0") or chosen_format() != "table"


def say_where(tracker: Tracker, experiment: str, view: str | None = None) -> None:
    """Write how to see an experiment's runs in the MLflow UI: those of a saved view, or all."""
    say(f"compare runs in the MLflow UI: {tracker.ui_command()}", to_copy=True)
    say(f"then open {tracker.ui_page(experiment, view=view)}", to_copy=True)


def warn(text: str) -> None:
    """Write a warning that cannot be overlooked, to standard error."""
    from rich.panel import Panel
    from rich.text import Text

    panel = Panel(Text(text), title="warning", border_style="yellow", title_align="left", width=100)
    console(error=True).print(panel, soft_wrap=False)


@contextlib.contextmanager
def gathered_warnings() -> Iterator[None]:
    """Gather what methods warn of (`MergeWarning`) and show it at the end, each message once, the first few of many."""
    messages: dict[str, None] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("always", MergeWarning)
        show = warnings.showwarning

        def gather(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, MergeWarning):
                messages[str(message)] = None
            else:
                show(message, category, *where, **more)

        warnings.showwarning = gather
        try:
            yield
        finally:
            if messages:
                shown = list(messages)[:_SHOWN_WARNINGS]
                more = [f"… and {len(messages) - len(shown)} more"] * (len(messages) > len(shown))
                warn("\n".join([*shown, *more]))


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress]:
    """Show a bar that the yielded function moves, ``advance("reading", 0.3)``.

    Nothing is shown where there is no terminal, or with ``--quiet``.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    shown = console(error=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=shown, transient=True, disable=_quiet() or not shown.is_terminal) as bars:
        task = bars.add_task("", total=1.0)

        def advance(message: str, done: float) -> None:
            if done < bars.tasks[task].completed:  # another step begins
                bars.reset(task)
            bars.update(task, description=message, completed=done)

        yield advance
