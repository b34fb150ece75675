"""The results of an experiment: a record for each model, and for the whole."""

from __future__ import annotations

import dataclasses
import json
import resource
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mergelab.evaluation.scoring import Score, TaskResult
from mergelab.tasks.metric import Direction

if TYPE_CHECKING:
    from mergelab.evaluation.scoring import Prediction

RESULT = "result.json"  # in a run's folder
Role = Literal["base", "expert", "merged"]


@dataclass(frozen=True)
class ModelResult:
    """One model's scores on each task that it was measured on, and their cost.

    Times in seconds, memory in MB. ``contents`` are the hashes of the weights that it is computed from, where these are
    on disk.
    ``p_value`` is that of the paired test against the best expert; ``average`` and ``normalised`` are means over a
    suite's primary metrics, the latter divided by each task's own expert's, and ``select_normalised`` is that of the
    selecting examples. ``logged`` has all numbers that are logged of it, by their names in the tracking store.
    """

    label: str
    role: Role
    results: Mapping[str, TaskResult]
    predictions: Mapping[str, Prediction] = field(default_factory=dict, repr=False)
    contents: tuple[str, ...] = ()
    eval_seconds: float | None = None
    cached: bool = False
    merge_seconds: float | None = None
    peak_mb: float | None = None
    p_value: float | None = None
    average: float | None = None
    normalised: float | None = None
    select_normalised: float | None = None
    logged: Mapping[str, float] = field(default_factory=dict)

    @property
    def scored(self) -> dict[str, TaskResult]:
        """Its results on the tasks that have metrics."""
        return {name: result for name, result in self.results.items() if result.report}

    @property
    def score(self) -> float | None:
        """Its primary score: of its one task, or the mean over its tasks; None without any."""
        scores = [result.score.value for result in self.scored.values()]
        return sum(scores) / len(scores) if scores else None

    @property
    def select_score(self) -> float | None:
        """Its primary score on the selecting examples, where the protocol has such."""
        scores = [result.select[result.primary] for result in self.results.values() if result.select]
        return sum(scores) / len(scores) if scores else None


@dataclass(frozen=True)
class ExperimentResult:
    """Everything that the table shows: base, experts, and last the merged model."""

    title: str
    note: str
    tasks: tuple[str, ...]
    models: tuple[ModelResult, ...]

    @property
    def merged(self) -> ModelResult:
        """The merged model's result."""
        return self.models[-1]

    @property
    def direction(self) -> Direction:
        """Whether greater or less of the objective is better; of a normalised average it is greater."""
        return common_direction(self.merged.results.values()) or "maximize"

    @property
    def objective(self) -> float | None:
        """What a sweep selects on: the selection score where the protocol has one, else the reported one.

        Where some tasks' scores are better when greater and others' when less, it is the normalised average; None
        where no task has a score.
        """
        merged = self.merged
        if common_direction(merged.results.values()) is None:
            return merged.normalised if merged.select_normalised is None else merged.select_normalised
        return merged.score if merged.select_score is None else merged.select_score


def common_direction(results: Iterable[TaskResult]) -> Direction | None:
    """Return the direction that the primary scores of all tasks share; None where they do not, or there are none."""
    found = {result.direction for result in results if result.report}
    return found.pop() if len(found) == 1 else None


def write_result(result: ExperimentResult, file: Path) -> None:
    """Write a result, but for its predictions, as JSON."""
    models = [dataclasses.replace(model, predictions={}) for model in result.models]
    content = dataclasses.asdict(dataclasses.replace(result, models=tuple(models)))
    file.write_text(json.dumps(content, indent=1), encoding="utf-8")


def read_result(file: Path) -> ExperimentResult:
    """Read what `write_result` wrote."""

    def task(values: dict[str, Any]) -> TaskResult:
        report = {name: Score(**score) for name, score in values["report"].items()}
        texts = tuple((prompt, text) for prompt, text in values["texts"])
        return TaskResult(**{**values, "report": report, "minimized": tuple(values["minimized"]), "texts": texts})

    def model(values: dict[str, Any]) -> ModelResult:
        return ModelResult(**{**values, "results": {name: task(inner) for name, inner in values["results"].items()}})

    content = json.loads(file.read_text(encoding="utf-8"))
    models = tuple(model(values) for values in content["models"])
    return ExperimentResult(**{**content, "tasks": tuple(content["tasks"]), "models": models})


def peak_memory_mb() -> float:
    """Return this process's peak resident memory so far, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 * 1024 if sys.platform == "darwin" else 1024)
