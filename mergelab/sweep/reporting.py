"""A running trial reports the scores of its examples, and ends early where its pruner says so."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from mergelab.sweep.study import SCORES, STATISTICS

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.study import Study
    from optuna.trial import FrozenTrial

Array = np.ndarray[Any, Any]
CHECKS = 16  # how often most pruners are asked while a trial's examples are measured


class Pruned(Exception):
    """A trial was pruned."""


@dataclass(frozen=True)
class Rival:
    """The best complete trial when another one begins, which that one is compared with.

    Attributes:
        number: the trial's.
        statistics: by metric (n, c), what it needs of each selecting example.
        scores: (n,) score of each example, the better the higher; None where the pruner does not compare examples.
    """

    number: int
    statistics: Mapping[str, Array]
    scores: Array | None


@dataclass
class ScoreReporter:
    """Reports the example scores of one trial, and asks its pruner whether to go on.

    Pruners decide from a trial's intermediate values, of which there are two kinds. A pruner that compares trials
    example by example (Optuna's `WilcoxonPruner`, or a class with ``by_example = True``) gets the score of each example
    under the example's number, in a study of this trial and the best complete one: in the sweep's own study every
    example would be a row of the storage. Any other pruner gets the objective so far, in the sweep's study, under the
    number of the check. There are ``checks`` checks in a trial, if the class has an attribute of that name
    (None: one after every batch), else `CHECKS`.

    Attributes:
        pruner: None where trials are never pruned.
        study, number: the study, and the trial's number in it.
        scores: (n,) float64 score of each selecting example, the better the higher; NaN until it is known.
        objective: computes the objective of the examples reported so far.
        done: number of these.
        rival: the best complete trial on the same examples; None where there is none, or trials are never pruned.
    """

    pruner: BasePruner | None
    study: Study
    number: int
    scores: Array
    objective: Callable[[], float]
    done: int = 0
    rival: Rival | None = field(default=None, init=False)
    _checked: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._by_example = self.pruner is not None and compares_examples(self.pruner)
        if self.pruner is not None:
            self.rival = self._best()
        if self._by_example:
            self._pair = _study_of_best(None if self.rival is None else self.rival.scores)

    def report(self, positions: Array, scores: Array) -> None:
        """Take the scores (b,) of a batch of examples at ``positions`` (b,).

        Raises:
            Pruned: the pruner gives the trial up.
        """
        self.scores[positions] = scores
        self.done += len(positions)
        if self.pruner is None or self.done == len(self.scores) or not self._is_due(self.pruner):
            return
        if self.pruner.prune(*self._seen_by_pruner()):
            raise Pruned

    def finish(self, statistics: Callable[[], Mapping[str, Array]]) -> None:
        """Write what later trials are compared with to the storage: a complete trial's scores.

        Args:
            statistics: computes by metric (n, c), what it needs of each example.
        """
        if self._by_example:
            self._storage.set_trial_user_attr(self._trial_id, SCORES, packed(self.scores))
        if self.pruner is not None:
            self._storage.set_trial_user_attr(self._trial_id, STATISTICS, packed_statistics(statistics()))

    @property
    def _storage(self) -> Any:
        return self.study._storage

    @property
    def _trial_id(self) -> int:
        found: int = self._storage.get_trial_id_from_study_id_trial_number(self.study._study_id, self.number)
        return found

    def _is_due(self, pruner: BasePruner) -> bool:
        if (checks := getattr(pruner, "checks", CHECKS)) is None:
            return True
        before, self._checked = self._checked, self.done * checks // len(self.scores)
        return self._checked > before

    def _seen_by_pruner(self) -> tuple[Study, FrozenTrial]:
        if self._by_example:
            known = np.flatnonzero(~np.isnan(self.scores))
            return self._pair, _frozen(known.tolist(), self.scores[known], None)
        self._storage.set_trial_intermediate_value(self._trial_id, self._checked, self.objective())
        return self.study, self._storage.get_trial(self._trial_id)

    def _best(self) -> Rival | None:
        """Return the best complete trial, the earliest of equals, if it was measured on these examples."""
        best = best_complete(self.study, {STATISTICS, SCORES} if self._by_example else {STATISTICS})
        if best is None:
            return None
        statistics = unpacked_statistics(best.user_attrs[STATISTICS])
        if any(len(rows) != len(self.scores) for rows in statistics.values()):
            return None
        return Rival(best.number, statistics, unpacked(best.user_attrs[SCORES]) if self._by_example else None)


def best_complete(study: Study, needed: set[str]) -> FrozenTrial | None:
    """Return the best complete trial, the earliest of equals, that has the ``needed`` attributes."""
    from optuna.study import StudyDirection
    from optuna.trial import TrialState

    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    sign = -1 if study.direction == StudyDirection.MINIMIZE else 1
    known = [trial for trial in complete if needed <= trial.user_attrs.keys()]
    return max(known, key=lambda trial: (sign * trial.values[0], -trial.number), default=None)


def compares_examples(pruner: BasePruner) -> bool:
    """Return whether a pruner compares trials example by example."""
    from optuna.pruners import WilcoxonPruner

    return bool(getattr(pruner, "by_example", isinstance(pruner, WilcoxonPruner)))


def _study_of_best(scores: Array | None) -> Study:
    """Create a study in memory whose one trial, if there is any, has these example scores (n,)."""
    import optuna

    study = optuna.create_study(direction="maximize")
    if scores is not None:
        study.add_trial(_frozen(range(len(scores)), scores, float(scores.mean())))
    return study


def _frozen(examples: Iterable[int], scores: Array, value: float | None) -> FrozenTrial:
    import optuna

    state = optuna.trial.TrialState.RUNNING if value is None else optuna.trial.TrialState.COMPLETE
    values = dict(zip(examples, scores.tolist(), strict=True))
    return optuna.trial.create_trial(state=state, value=value, intermediate_values=values)


def packed(scores: Array) -> str:
    """Write example scores (n,) as text for a study's storage, in float32."""
    return base64.b64encode(scores.astype("<f4").tobytes()).decode("ascii")


def unpacked(text: str) -> Array:
    """Read what `packed` wrote: (n,) float64."""
    return np.frombuffer(base64.b64decode(text), dtype="<f4").astype(np.float64)


def packed_statistics(statistics: Mapping[str, Array]) -> dict[str, list[Any]]:
    """Write rows (n, c) by metric for a study's storage, in float32; equal rows of several metrics once."""
    found: dict[str, list[Any]] = {}
    for metric, rows in statistics.items():
        text = packed(rows)
        same = next((names for names, (_, known) in found.items() if known == text), None)
        if same is not None:
            found.pop(same)
        found[metric if same is None else f"{same},{metric}"] = [rows.shape[1], text]
    return found


def unpacked_statistics(stored: Mapping[str, Any]) -> dict[str, Array]:
    """Read what `packed_statistics` wrote: (n, c) float64 by metric."""
    return {
        metric: unpacked(text).reshape(-1, columns)
        for names, (columns, text) in stored.items()
        for metric in names.split(",")
    }
