"""What a study's trials have measured, example by example: stored with each trial, read when the next one begins."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mergelab.sweep.reporting import packed_statistics, unpacked_statistics
from mergelab.sweep.space import in_cube
from mergelab.sweep.study import MEASURED, MODELS, OUTCOME, whole_key

if TYPE_CHECKING:
    from optuna.study import Study

    from mergelab.sweep.selecting import SelectingEvaluation

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class MeasuredTrial:
    """The statistics of the examples that a model was measured on.

    Attributes:
        number: the trial's.
        value: its objective, estimated where it was stopped.
        positions: (k,) of the examples, among the selecting ones, in ascending order.
        statistics: (k, c) by metric, as `mergelab.evaluation.metrics.example_statistics` has them.
        count: of all selecting examples.
        whole: whether all were measured. A text without tokens has no statistics of perplexity, so that k may be less.
        point: (d,) of the search space, in the unit cube; d may be 0.
    """

    number: int
    value: float
    positions: Array
    statistics: Mapping[str, Array]
    count: int
    whole: bool
    point: Array = field(default_factory=lambda: np.empty(0))

    def rows(self, metric: str) -> Array:
        """Return the statistics of all examples (n, c); 0 where there are none."""
        found = np.zeros((self.count, self.statistics[metric].shape[1]))
        found[self.positions] = self.statistics[metric]
        return found

    def completed(self, positions: Array, statistics: Mapping[str, Array]) -> MeasuredTrial:
        """Return the trial measured whole, with the statistics of the other examples."""
        order = np.argsort(np.concatenate([self.positions, positions]))
        joined = {metric: np.concatenate([rows, statistics[metric]])[order] for metric, rows in self.statistics.items()}
        everything = np.concatenate([self.positions, positions])[order]
        return replace(self, positions=everything, statistics=joined, whole=True)

    def written(self) -> dict[str, Any]:
        """Return it as JSON takes it."""
        return {
            "positions": base64.b64encode(self.positions.astype("<i4").tobytes()).decode("ascii"),
            "statistics": packed_statistics(self.statistics),
            "count": self.count,
            "whole": self.whole,
        }

    @classmethod
    def read(cls, number: int, value: float, stored: Mapping[str, Any]) -> MeasuredTrial:
        """Read what `written` returned."""
        positions = np.frombuffer(base64.b64decode(stored["positions"]), dtype="<i4").astype(np.int64)
        statistics = unpacked_statistics(stored["statistics"])
        return cls(number, value, positions, statistics, stored["count"], stored["whole"])


def measured_of(evaluation: SelectingEvaluation, number: int, *, whole: bool) -> MeasuredTrial:
    """Return the examples of the only task that a trial was measured on."""
    (name,) = evaluation.evaluator.data
    return MeasuredTrial(number, math.nan, *evaluation.statistics(name), evaluation.count, whole)


def read_history(study: Study, before: int, count: int | None = None) -> list[MeasuredTrial]:
    """Return what the trials with numbers below ``before`` have measured of ``count`` examples, by number.

    Trials that were measured on another number of examples are left out: the data have changed.
    """
    later = study.user_attrs
    found = []
    for trial in study.get_trials(deepcopy=False)[:before]:
        stored = {**trial.user_attrs, **later.get(whole_key(trial.number), {})}
        if trial.state.is_finished() and MEASURED in stored and OUTCOME in stored:
            one = MeasuredTrial.read(trial.number, stored[OUTCOME]["values"][0], stored[MEASURED])
            found.append(replace(one, point=in_cube(trial.params, trial.distributions)))
    return [one for one in found if one.count == (count or found[-1].count)]


def write_models(study: Study, models: Sequence[Mapping[str, Array]]) -> None:
    """Store the statistics (n, c) by metric of the base and the experts, unless these are there."""
    packed = [packed_statistics(rows) for rows in models]
    if study.user_attrs.get(MODELS) != packed:
        study.set_user_attr(MODELS, packed)


def read_models(study: Study) -> list[dict[str, Array]]:
    """Read what `write_models` stored; nothing where there is nothing."""
    return [unpacked_statistics(stored) for stored in study.user_attrs.get(MODELS, ())]
