"""Stop hopeless trials while they are measured."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from mergelab.errors import SweepError
from mergelab.sweep.samplers import named
from mergelab.sweep.storage import silence
from mergelab.sweep.study import SCORES

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.storages import BaseStorage
    from optuna.study import Study
    from optuna.trial import FrozenTrial

Array = np.ndarray[Any, Any]
PRUNERS = ("futility", "wilcoxon", "median", "halving", "none")
CHECKS = 16  # how often Optuna's pruners are asked while a trial's examples are measured


class Pruned(Exception):
    """A trial was stopped."""


@dataclass(frozen=True)
class Futility:
    """Stops a trial that will hardly end above the best one.

    The examples come in random order, so what has been seen predicts what is to come. With k differences d between the
    scores of the trial and of the best one on the same examples, the r remaining differences add up to about
    N(r·mean(d), r·var(d)·(1 + r/k)): stopping for futility by predictive probability (Spiegelhalter et al. 1986,
    doi:10.1016/0197-2456(86)90003-6). A test of whether two models differ, as Wilcoxon's, does not know that the
    examples come to an end: a trial that is three of them behind, with two to go, is none to it.

    Attributes:
        probability: a trial is stopped that ends above the best one with less than this.
        n_startup_steps: and not before as many examples.
    """

    probability: float = 0.1
    n_startup_steps: int = 32

    def __post_init__(self) -> None:
        if not 0 < self.probability < 0.5:
            raise ValueError(f"probability={self.probability}: must be between 0 and 0.5")

    def is_hopeless(self, scores: Array, rival: Array) -> bool:
        """Return for scores (n,), NaN where not known yet, beside the best trial's (n,)."""
        known = ~np.isnan(scores)
        found = scores[known] - rival[known]
        if len(found) < max(self.n_startup_steps, 2) or not found.any():
            return False
        ahead, left = float(found.sum()), int((~known).sum())
        step = float(np.abs(found[found != 0]).min())  # sums are this far apart where scores are 0 and 1
        expected = ahead + left * float(found.mean())
        spread = math.sqrt(left * float(found.var(ddof=1)) * (1 + left / len(found)))
        if not spread:
            return expected <= 0
        return 0.5 * math.erfc((step / 2 - expected) / spread / math.sqrt(2)) < self.probability


def make_pruner(setting: str | dict[str, Any]) -> BasePruner | Futility | None:
    """Make the pruner of a short name, Optuna's but for ``futility``; None for ``none``.

    Median and halving count in sixteenths of the examples.

    Raises:
        SweepError: there is no such pruner or option.
    """
    import optuna

    silence(optuna)
    name, options = named(setting, "pruner", PRUNERS)
    pruners = optuna.pruners
    try:
        match name:
            case "futility":
                return Futility(**options)
            case "wilcoxon":
                return pruners.WilcoxonPruner(**{"p_threshold": 0.1, "n_startup_steps": 16, **options})
            case "median":
                return pruners.MedianPruner(**{"n_startup_trials": 5, "n_warmup_steps": 2, **options})
            case "halving":
                return pruners.SuccessiveHalvingPruner(**{"min_resource": 2, "reduction_factor": 2, **options})
    except (TypeError, ValueError) as error:
        raise SweepError(f"sweep.pruner={name}: {error}") from None
    return None


def packed(scores: Array) -> str:
    """Write per-example scores (n,) as text for a study's storage."""
    return base64.b64encode(scores.astype("<f4").tobytes()).decode("ascii")


def unpacked(text: str) -> Array:
    """Read what `packed` wrote: (n,) float64."""
    return np.frombuffer(base64.b64decode(text), dtype="<f4").astype(np.float64)


@dataclass
class Watch:
    """Follows one trial's examples and stops it where the pruner says so.

    Attributes:
        pruner, storage, study, number: whose trial it is; the pruner is None where trials are not stopped.
        scores: (n,) score of each selecting example, the better the higher; NaN until it is known.
        value: the objective so far, of the examples with a score.
        done: how many these are.
    """

    pruner: BasePruner | Futility | None
    storage: BaseStorage
    study: Study
    number: int
    scores: Array
    value: Callable[[], float]
    done: int = 0
    _checked: int = 0
    _rival: Array | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        from optuna.pruners import WilcoxonPruner

        self._paired = isinstance(self.pruner, WilcoxonPruner | Futility)
        self._rival = self._best_scores() if self._paired else None

    def see(self, positions: Array, scores: Array) -> None:
        """Take the scores of a batch's examples.

        Raises:
            Pruned: the trial has no hope.
        """
        self.scores[positions] = scores
        self.done += len(positions)
        if self.pruner is None or self.done == len(self.scores):
            return
        if isinstance(self.pruner, Futility):
            if self._rival is not None and self.pruner.is_hopeless(self.scores, self._rival):
                raise Pruned
            return
        step = self.done * CHECKS // len(self.scores)
        if step > self._checked and self._is_hopeless(self.pruner, step):
            raise Pruned
        self._checked = step

    def keep(self) -> None:
        """Leave a finished trial's scores for later ones to be compared with."""
        if self._paired:
            self.storage.set_trial_user_attr(self._trial_id, SCORES, packed(self.scores))

    @property
    def _trial_id(self) -> int:
        return self.storage.get_trial_id_from_study_id_trial_number(self.study._study_id, self.number)

    def _is_hopeless(self, pruner: BasePruner, step: int) -> bool:
        if not self._paired:
            self.storage.set_trial_intermediate_value(self._trial_id, step, self.value())
            return pruner.prune(self.study, self.storage.get_trial(self._trial_id))
        return self._rival is not None and _pruned_in_pairs(pruner, self.scores, self._rival)

    def _best_scores(self) -> Array | None:
        from optuna.study import StudyDirection
        from optuna.trial import TrialState

        complete = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        sign = -1 if self.study.direction == StudyDirection.MINIMIZE else 1
        known = [trial for trial in complete if SCORES in trial.user_attrs]
        best = max(known, key=lambda trial: (sign * trial.values[0], -trial.number), default=None)
        if best is None or len(scores := unpacked(best.user_attrs[SCORES])) != len(self.scores):
            return None
        return scores


def _pruned_in_pairs(pruner: BasePruner, scores: Array, rival: Array) -> bool:
    """Ask Optuna's pruner about two trials that have a value for each example, in a study of these two alone.

    In the real study every example would be a row of the storage, written one by one.
    """
    import optuna

    known = np.flatnonzero(~np.isnan(scores))
    pair = optuna.create_study(direction="maximize")
    pair.add_trial(_trial(range(len(rival)), rival, float(rival.mean())))
    return pruner.prune(pair, _trial(known, scores[known], None))


def _trial(steps: Any, values: Array, value: float | None) -> FrozenTrial:
    import optuna

    found: Mapping[int, float] = {int(step): float(one) for step, one in zip(steps, values, strict=True)}
    state = optuna.trial.TrialState.RUNNING if value is None else optuna.trial.TrialState.COMPLETE
    return optuna.trial.create_trial(state=state, value=value, intermediate_values=dict(found))
