"""What the user sees: a short plan, progress on long steps, and one table at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from mergelab.console.progress import console, say

if TYPE_CHECKING:
    from mergelab.evaluation.results import ExperimentResult, ModelResult

_LONG = 10_000  # scores from here on, as of perplexity, are shown with the digits that say something


def result_table(result: ExperimentResult) -> None:
    """Print base, experts and merged model with their scores; the best score of each column is marked.

    Of tasks without metrics, the texts that the models write are printed side by side.
    """
    from rich.table import Table
    from rich.text import Text

    _texts_tables(result)
    if not any(model.scored for model in result.models):
        say(result.note, result=True)
        return
    table = Table(title=f"{result.title}", title_justify="left", title_style="bold", caption=_caption(result))
    table.caption_justify = "left"
    table.add_column("model", overflow="fold", min_width=12)
    columns = _columns(result)
    less = _minimized(result)
    for name in columns:
        table.add_column(f"{name} ↓" if name in less else name, justify="right", no_wrap=True)
    for name in ("p vs best expert",) * (len(result.tasks) == 1) + ("merge s", "eval s", "peak MB"):
        table.add_column(name, justify="right", no_wrap=True)
    best = {
        name: (min if name in less else max)((cell[0] for m in result.models if (cell := read(m))), default=None)
        for name, read in columns.items()
    }
    for model in result.models:
        row: list[Text | str] = [Text(model.label, style="bold" if model.role == "merged" else "")]
        for name, read in columns.items():
            cell = read(model)
            mark = " *" if cell and cell[0] == best[name] else ""
            value, *interval = cell[1].split("\n") if cell else [""]
            row.append(Text("\n".join([value + mark, *interval]), style="bold green" if mark else ""))
        if len(result.tasks) == 1:
            row.append("" if model.p_value is None else f"{model.p_value:.3f}")
        row += [
            _number(model.merge_seconds),
            _number(model.eval_seconds, cached=model.cached),
            _number(model.peak_mb, 0),
        ]
        table.add_row(*row)
    console().print(table)


def _texts_tables(result: ExperimentResult) -> None:
    from rich.table import Table
    from rich.text import Text

    for task in result.tasks:
        models = [model for model in result.models if task in model.results and model.results[task].texts]
        if not models:
            continue
        table = Table(title=f"{result.title}: {task}", title_justify="left", title_style="bold", show_lines=True)
        table.add_column("prompt", overflow="fold", ratio=2)
        for model in models:
            table.add_column(Text(model.label), overflow="fold", ratio=3)
        for row, (prompt, _) in enumerate(models[0].results[task].texts):
            table.add_row(Text(prompt), *(Text(model.results[task].texts[row][1].strip()) for model in models))
        console().print(table, soft_wrap=False)


def _minimized(result: ExperimentResult) -> set[str]:
    """Name the score columns that are better when they are less."""
    results = [own for model in result.models for own in model.scored.values()]
    if len(result.tasks) == 1:
        found = {name for own in results for name in own.minimized}
        return found | ({"select"} if result.direction == "minimize" else set())
    tasks = {own.task for own in results if own.direction == "minimize"}
    return tasks | ({"average"} if result.direction == "minimize" else set())


Cell = tuple[float, str]


def _columns(result: ExperimentResult) -> Mapping[str, Callable[[ModelResult], Cell | None]]:
    """Name the score columns: every metric of a single task, else each task's primary metric and the averages."""
    columns: dict[str, Callable[[ModelResult], Cell | None]] = {}

    def metric(task: str, name: str, gap: str = " ") -> Callable[[ModelResult], Cell | None]:
        def read(model: ModelResult) -> Cell | None:
            if task not in model.results:
                return None
            score = model.results[task].report[name]
            if max(map(abs, (score.value, score.low, score.high))) >= _LONG:
                return score.value, f"{score.value:.5g}{gap}[{score.low:.4g}, {score.high:.4g}]"
            return score.value, f"{score.value:.4f}{gap}[{score.low:.3f}, {score.high:.3f}]"

        return read

    def single(value: Callable[[ModelResult], float | None]) -> Callable[[ModelResult], Cell | None]:
        def read(model: ModelResult) -> Cell | None:
            found = value(model)
            return None if found is None else (found, f"{found:.4f}" if abs(found) < _LONG else f"{found:.5g}")

        return read

    if len(result.tasks) == 1:
        task = result.tasks[0]
        names = next((list(m.results[task].report) for m in result.models if task in m.results), [])
        for name in names:
            columns[name] = metric(task, name)
        if any(m.select_score is not None for m in result.models):
            columns["select"] = single(lambda model: model.select_score)
        return columns
    for task in result.tasks:
        if primary := next((m.scored[task].primary for m in result.models if task in m.scored), ""):
            columns[task] = metric(task, primary, gap="\n")
    if any(model.average is not None for model in result.models):
        columns["average"] = single(lambda model: model.average)
    if any(model.normalised is not None for model in result.models):
        columns["normalised"] = single(lambda model: model.normalised)
    return columns


def _caption(result: ExperimentResult) -> str:
    best = "* best of its column (↓: less is better)" if _minimized(result) else "* best of its column"
    cached = ["times marked c are from the cache of scores"] if any(model.cached for model in result.models) else []
    return f"{result.note}\n{'; '.join([best, '[95 % bootstrap interval]', *cached])}"


def _number(value: float | None, digits: int = 2, *, cached: bool = False) -> str:
    return "" if value is None else f"{value:.{digits}f}{'c' if cached else ''}"
