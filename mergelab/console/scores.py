"""What a result's table holds: its columns of scores, and each model's cells in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergelab.evaluation.results import ExperimentResult, ModelResult

_LONG = 10_000  # scores from here on, as of perplexity, are shown with the digits that say something


@dataclass(frozen=True)
class Cell:
    """A score as it is shown, its interval apart; ``low`` and ``high`` bound the interval, where there is one."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def text(self) -> str:
        """The score's digits."""
        return f"{self.value:.5g}" if self._is_long else f"{self.value:.4f}"

    @property
    def interval(self) -> str:
        """The interval in brackets; empty where there is none."""
        if self.low is None or self.high is None:
            return ""
        digits = ".4g" if self._is_long else ".3f"
        return f"[{self.low:{digits}}, {self.high:{digits}}]"

    @property
    def _is_long(self) -> bool:
        return max(abs(each) for each in (self.value, self.low, self.high) if each is not None) >= _LONG


@dataclass(frozen=True)
class Column:
    """A column of scores; ``less`` says that less is better."""

    name: str
    less: bool
    read: Callable[[ModelResult], Cell | None]

    @property
    def title(self) -> str:
        """Its name, with an arrow where less is better."""
        return f"{self.name} ↓" if self.less else self.name

    def best(self, models: Sequence[ModelResult]) -> float | None:
        """Return the best of the models' scores; None where no model has one."""
        values = (cell.value for model in models if (cell := self.read(model)))
        return (min if self.less else max)(values, default=None)


def columns(result: ExperimentResult) -> list[Column]:
    """List the columns of scores: every metric of a single task, else each task's primary metric and the averages."""
    less = _minimized(result)
    return [Column(name, name in less, read) for name, read in _readers(result)]


def records(result: ExperimentResult) -> list[dict[str, Any]]:
    """List a row for each model as plain numbers: scores with their bounds, p-value, seconds, MB.

    Where no task has scores, it is a row for each text that a model wrote.
    """
    if not any(model.scored for model in result.models):
        return [
            {"task": task, "prompt": prompt, "model": model.label, "text": text}
            for task in result.tasks
            for model in result.models
            for prompt, text in (model.results[task].texts if task in model.results else ())
        ]
    found = []
    for model in result.models:
        row: dict[str, Any] = {"model": model.label, "role": model.role}
        for column in columns(result):
            cell = column.read(model)
            row[column.name] = cell and cell.value
            if any((other := column.read(each)) and other.low is not None for each in result.models):
                row |= {f"{column.name}_low": cell and cell.low, f"{column.name}_high": cell and cell.high}
        row |= {"p_value": model.p_value} if len(result.tasks) == 1 else {}
        row |= {"merge_seconds": model.merge_seconds, "eval_seconds": model.eval_seconds, "cached": model.cached}
        found.append(row | {"peak_mb": model.peak_mb})
    return found


def _minimized(result: ExperimentResult) -> set[str]:
    """Name the score columns that are better when they are less."""
    results = [own for model in result.models for own in model.scored.values()]
    if len(result.tasks) == 1:
        found = {name for own in results for name in own.minimized}
        return found | ({"select"} if result.direction == "minimize" else set())
    tasks = {own.task for own in results if own.direction == "minimize"}
    return tasks | ({"average"} if result.direction == "minimize" else set())


Reader = Callable[["ModelResult"], "Cell | None"]


def _readers(result: ExperimentResult) -> Iterator[tuple[str, Reader]]:
    if len(result.tasks) == 1:
        task = result.tasks[0]
        for name in next((list(m.results[task].report) for m in result.models if task in m.results), []):
            yield name, _metric(task, name)
        if any(m.select_score is not None for m in result.models):
            yield "select", _single(lambda model: model.select_score)
        return
    for task in result.tasks:
        if primary := next((m.scored[task].primary for m in result.models if task in m.scored), ""):
            yield task, _metric(task, primary)
    if any(model.average is not None for model in result.models):
        yield "average", _single(lambda model: model.average)
    if any(model.normalised is not None for model in result.models):
        yield "normalised", _single(lambda model: model.normalised)


def _metric(task: str, name: str) -> Reader:
    def read(model: ModelResult) -> Cell | None:
        if task not in model.results:
            return None
        score = model.results[task].report[name]
        return Cell(score.value, score.low, score.high)

    return read


def _single(value: Callable[[ModelResult], float | None]) -> Reader:
    def read(model: ModelResult) -> Cell | None:
        found = value(model)
        return None if found is None else Cell(found)

    return read
