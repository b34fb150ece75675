"""A result as a table that fits the terminal, or in the format that was asked for."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergelab.console.formats import Format, chosen_format, for_a_page, for_a_program
from mergelab.console.progress import console, is_silenced, say
from mergelab.console.scores import Cell, columns, records

if TYPE_CHECKING:
    from rich.table import Table

    from mergelab.evaluation.results import ExperimentResult, ModelResult

_UNLIMITED = 100_000
_TEXT_WIDTH = 24  # from here on texts side by side can be read


@dataclass(frozen=True)
class TableLayout:
    """How a result is laid out.

    Attributes:
        rows: whether each score of a model has a row, not a column.
        stacked: whether intervals stand below their scores.
        intervals: whether there are intervals.
        costs: how many columns there are beside the scores.
    """

    rows: bool = False
    stacked: bool = False
    intervals: bool = True
    costs: int = 4


def result_table(result: ExperimentResult) -> None:
    """Print base, experts and merged model with their scores; the best score of each column is marked.

    Of tasks without metrics, the texts that the models write are printed side by side.
    """
    if is_silenced():
        return
    form = chosen_format()
    if form in ("csv", "json"):
        sys.stdout.write(for_a_program(form, records(result), title=result.title, note=result.note))
        return
    if form in ("markdown", "latex"):
        if any(model.scored for model in result.models):
            sys.stdout.write(_on_a_page(form, result))
        return
    _texts_tables(result)
    if not any(model.scored for model in result.models):
        say(result.note, result=True)
        return
    print_fitting(_table(result, layout) for layout in _layouts(result))


def markdown_table(result: ExperimentResult) -> str:
    """Return the table of a result with scores in Markdown, with its title and note below."""
    return _on_a_page("markdown", result)


def _on_a_page(form: Format, result: ExperimentResult) -> str:
    header, rows = _cells(result, TableLayout())
    note = f"{result.title}\n{_caption(result, TableLayout())}"
    return for_a_page(form, header, [row for _, row in rows], note)


def print_fitting(tables: Iterator[Table]) -> None:
    """Print the first of the tables that fits; the last one in any case, so wide that no name is broken."""
    out = console()
    unlimited = out.options.update(max_width=_UNLIMITED)
    for table in tables:
        width = out.measure(table, options=unlimited).maximum
        if width <= out.width:
            break
    out.width = max(width, out.width)
    out.print(table)


def _layouts(result: ExperimentResult) -> Iterator[TableLayout]:
    """Yield the layouts that come into question, the fullest first."""
    several = len(columns(result)) > 1
    if len(result.tasks) == 1:
        yield TableLayout()
    yield TableLayout(stacked=True)
    if several:
        yield TableLayout(rows=True)
        yield TableLayout(rows=True, stacked=True)
    for costs in range(len(_costs(result)) - 1, -1, -1):
        yield TableLayout(rows=several, stacked=True, costs=costs)
    yield TableLayout(rows=several, intervals=False, costs=0)


def _costs(result: ExperimentResult) -> list[str]:
    """Name the columns beside the scores, the most telling first."""
    return [*["p vs best expert"] * (len(result.tasks) == 1), "merge s", "eval s", "peak MB"]


def _table(result: ExperimentResult, layout: TableLayout) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=result.title, title_justify="left", title_style="bold", caption=_caption(result, layout))
    table.caption_justify = "left"
    header, rows = _cells(result, layout)
    for place, name in enumerate(header):
        table.add_column(Text(name), justify="left" if place < 1 + layout.rows else "right", no_wrap=True)
    for model, row in rows:
        label = Text(row[0], style="bold" if model.role == "merged" else "")
        table.add_row(label, *(Text(cell, style="bold green" if " *" in cell else "") for cell in row[1:]))
    return table


def _cells(result: ExperimentResult, layout: TableLayout) -> tuple[list[str], list[tuple[ModelResult, list[str]]]]:
    """Return the header and the rows of a table as text, each row with its model."""
    shown = columns(result)
    best = {column.name: column.best(result.models) for column in shown}
    costs = _costs(result)[: layout.costs]
    what = ["metric" if len(result.tasks) == 1 else "task", "score"] if layout.rows else [c.title for c in shown]
    rows: list[tuple[ModelResult, list[str]]] = []
    for model in result.models:
        scores = [_score(column.read(model), best[column.name], layout) for column in shown]
        beside = [_cost(model, name) for name in costs]
        if not layout.rows:
            rows.append((model, [model.label, *scores, *beside]))
            continue
        told = [(column, score) for column, score in zip(shown, scores, strict=True) if score] or [(shown[0], "")]
        for number, (column, score) in enumerate(told):
            label, *rest = [model.label, *beside] if number == 0 else [""] * (1 + len(beside))
            rows.append((model, [label, column.title, score, *rest]))
    if layout.stacked or layout.rows:
        costs = [name.replace("best ", "best\n") for name in costs]
    return ["model", *what, *costs], rows


def _score(cell: Cell | None, best: float | None, layout: TableLayout) -> str:
    if cell is None:
        return ""
    mark = " *" if cell.value == best else ""
    if not layout.intervals or not cell.interval:
        return cell.text + mark
    return f"{cell.text}{mark}\n{cell.interval}" if layout.stacked else f"{cell.text} {cell.interval}{mark}"


def _cost(model: ModelResult, name: str) -> str:
    if name == "p vs best expert":
        return "" if model.p_value is None else f"{model.p_value:.3f}"
    if name == "peak MB":
        return _number(model.peak_mb, 0)
    return _number(model.merge_seconds) if name == "merge s" else _number(model.eval_seconds, cached=model.cached)


def _number(value: float | None, digits: int = 2, *, cached: bool = False) -> str:
    return "" if value is None else f"{value:.{digits}f}{'c' if cached else ''}"


def _caption(result: ExperimentResult, layout: TableLayout) -> str:
    shown = columns(result)
    said = ["* best of its column (↓: less is better)" if any(c.less for c in shown) else "* best of its column"]
    if layout.rows:
        said = [said[0].replace("column", "metric" if len(result.tasks) == 1 else "task")]
    said += ["[95 % bootstrap interval]"] * layout.intervals
    if layout.costs > _costs(result).index("eval s") and any(model.cached for model in result.models):
        said.append("times marked c are from the cache of scores")
    left_out = [*["intervals"] * (not layout.intervals), *_costs(result)[layout.costs :]]
    narrow = [f"too narrow for {', '.join(left_out)}; --format=csv has everything"] if left_out else []
    return "\n".join([result.note, "; ".join(said), *narrow])


def _texts_tables(result: ExperimentResult) -> None:
    for task in result.tasks:
        models = [model for model in result.models if task in model.results and model.results[task].texts]
        if models:
            side_by_side = console().width >= _TEXT_WIDTH * (len(models) + 1)
            table = (_texts_beside if side_by_side else _texts_below)(f"{result.title}: {task}", task, models)
            console().print(table, soft_wrap=False)


def _texts_beside(title: str, task: str, models: Sequence[ModelResult]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold", show_lines=True)
    table.add_column("prompt", overflow="fold", ratio=2)
    for model in models:
        table.add_column(Text(model.label), overflow="fold", ratio=3)
    for row, (prompt, _) in enumerate(models[0].results[task].texts):
        table.add_row(Text(prompt), *(Text(model.results[task].texts[row][1].strip()) for model in models))
    return table


def _texts_below(title: str, task: str, models: Sequence[ModelResult]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("model", no_wrap=True)
    table.add_column("text", overflow="fold")
    for row, (prompt, _) in enumerate(models[0].results[task].texts):
        table.add_row("prompt", Text(prompt, style="italic"))
        for model in models:
            table.add_row(Text(model.label), Text(model.results[task].texts[row][1].strip()))
        table.add_section()
    return table
