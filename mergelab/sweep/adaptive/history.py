"""What a study's trials have measured, example by example: stored with each trial, read when the next one begins."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mergelab.sweep.reporting import packed_statistics, unpacked_statistics
from mergelab.sweep.space import in_cube
from mergelab.sweep.study import MEASURED, MODELS, OUTCOME, later_key

if TYPE_CHECKING:
    from optuna.study import Study

Array = np.ndarray[Any, Any]
Models = Mapping[str, Sequence[Mapping[str, Array]]]


@dataclass(frozen=True)
class MeasuredTask:
    """The statistics of those examples of one task that a model was measured on.

    Attributes:
        positions: (k,) of the examples, among the task's selecting ones, in ascending order.
        statistics: (k, c) by metric, as `mergelab.evaluation.metrics.example_statistics` has them.
        count: of all selecting examples of the task.
    """

    positions: Array
    statistics: Mapping[str, Array]
    count: int

    def rows(self, metric: str) -> Array:
        """Return the statistics of all examples (n, c); 0 where there are none."""
        found = np.zeros((self.count, self.statistics[metric].shape[1]))
        found[self.positions] = self.statistics[metric]
        return found

    def written(self) -> dict[str, Any]:
        """Return it as JSON takes it."""
        return {
            "positions": base64.b64encode(self.positions.astype("<i4").tobytes()).decode("ascii"),
            "statistics": packed_statistics(self.statistics),
            "count": self.count,
        }

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> MeasuredTask:
        """Read what `written` returned."""
        positions = np.frombuffer(base64.b64decode(stored["positions"]), dtype="<i4").astype(np.int64)
        return cls(positions, unpacked_statistics(stored["statistics"]), stored["count"])


@dataclass(frozen=True)
class MeasuredTrial:
    """What a trial was measured on.

    Attributes:
        number: the trial's.
        values: of its objectives, estimated where it was stopped.
        tasks: by name. A task that was not measured at all is missing.
        whole: whether all examples were measured. A text without tokens has no statistics of perplexity, so that its
            task may have less.
        point: (d,) of the search space, in the unit cube; d may be 0.
    """

    number: int
    values: tuple[float, ...]
    tasks: Mapping[str, MeasuredTask]
    whole: bool
    point: Array = field(default_factory=lambda: np.empty(0))

    def written(self) -> dict[str, Any]:
        """Return it as JSON takes it."""
        return {"tasks": {name: one.written() for name, one in self.tasks.items()}, "whole": self.whole}

    @classmethod
    def read(cls, number: int, values: Sequence[float], stored: Mapping[str, Any], only: str) -> MeasuredTrial:
        """Read what `written` returned; what older studies have is of the ``only`` task."""
        tasks = stored.get("tasks") or {only: stored}
        return cls(
            number, tuple(values), {name: MeasuredTask.read(one) for name, one in tasks.items()}, stored["whole"]
        )


def read_history(study: Study, before: int, only: str, counts: Mapping[str, int] | None = None) -> list[MeasuredTrial]:
    """Return what the trials with numbers below ``before`` have measured, by number.

    Trials measured on other numbers of examples than the ``counts`` of the tasks (None: than the last trial) are left
    out: the data have changed. In older studies all is of the ``only`` task.
    """
    later, found = study.user_attrs, []
    for trial in study.get_trials(deepcopy=False)[:before]:
        stored = {**trial.user_attrs, **later.get(later_key(trial.number), {})}
        if trial.state.is_finished() and MEASURED in stored and OUTCOME in stored:
            one = MeasuredTrial.read(trial.number, stored[OUTCOME]["values"], stored[MEASURED], only)
            found.append(replace(one, point=in_cube(trial.params, trial.distributions)))
    if counts is None:
        counts = {name: one.count for name, one in found[-1].tasks.items()} if found else {}
    return [one for one in found if all(task.count == counts.get(name) for name, task in one.tasks.items())]


def write_models(study: Study, models: Models) -> None:
    """Store the statistics (n, c) by metric of the base and the experts on each task, unless these are there."""
    packed = {name: [packed_statistics(rows) for rows in each] for name, each in models.items()}
    if study.user_attrs.get(MODELS) != packed:
        study.set_user_attr(MODELS, packed)


def read_models(study: Study, only: str) -> dict[str, list[dict[str, Array]]]:
    """Read what `write_models` stored; nothing where there is nothing. In older studies all is of the ``only`` task."""
    stored = study.user_attrs.get(MODELS, {})
    stored = {only: stored} if isinstance(stored, list) else stored
    return {name: [unpacked_statistics(rows) for rows in each] for name, each in stored.items()}
