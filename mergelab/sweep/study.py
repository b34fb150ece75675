"""A study that can be resumed: every trial has one number, is stored whole, and gets one result."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergelab.errors import SweepError, first_line
from mergelab.sweep.samplers import make_sampler, sampler_name
from mergelab.sweep.storage import open_storage, storage_errors

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.study import Study
    from optuna.trial import FrozenTrial

    from mergelab.sweep.config import Direction, SweepConfig
    from mergelab.sweep.space import Space

# Attributes of a trial.
ATTEMPTS, OUTCOME, ERROR = "mergelab:attempts", "mergelab:outcome", "mergelab:error"
# Of a complete trial: the scores of its examples, and what its metrics need of each.
SCORES, STATISTICS = "mergelab:scores", "mergelab:statistics"
# The study attributes that samplers set, stored with each trial so that both are written at once.
_SAMPLER_STATE = "mergelab:sampler"
# Of a trial measured adaptively: its examples' statistics, and below which number the trials are that it learns from.
MEASURED, KNOWN = "mergelab:measured", "mergelab:known"
# Of a study, with the number of a trial that was measured further after it was stopped: what it has since.
LATER = "mergelab:whole:"
_OF = "trials"  # in it: how many the study had then
# Of a study whose trials are measured adaptively: the statistics of the base and the experts.
MODELS = "mergelab:models"
# Attributes of a study.
_DEFINITION, SWEEPER, PARENT = "mergelab:definition", "mergelab:sweeper", "mergelab:parent"
EVALUATION = "sweep.evaluation"  # in a study's definition
# Settings that older studies' definitions do not say, and what their trials were measured with.
_UNSAID = {EVALUATION: "pruned", "eval.engine": "transformers", "eval.max_memory": "null"}
# Of a study and of a trial: changes as long as the process that sweeps or measures it lives.
RENEWED = "mergelab:renewed"


@dataclass(frozen=True)
class Proposal:
    """A trial to run: its number, and its point of the space."""

    number: int
    params: Mapping[str, Any]


class SweepStudy:
    """An Optuna study, opened or created.

    Points are drawn in a copy of the study in memory, each by a new sampler (see `make_sampler`), and a trial reaches
    the storage whole. So a process that is killed at any moment leaves no half-drawn trial behind.

    In the copy, a pruned trial is a complete one whose value is its estimate. Optuna's samplers would make less of it:
    Gaussian processes, NSGA-II and, as it is set, CMA-ES learn from complete trials alone, and where nearly all are
    pruned they learn nothing. TPE takes every complete trial, however bad, for better than every pruned one, and of
    these that for best which saw most examples. QMC, grids and random points depend on no value.

    Args:
        url: of the storage.
        name: of the study.
        space: what is searched.
        config: sampler, seed and points to enqueue.
        directions: one for each objective.
        definition: what all trials share (space, models, task, …); a study with another one is not resumed.

    Raises:
        SweepError: the storage cannot be used, or has a study of that name with another definition.
    """

    def __init__(
        self,
        url: str,
        name: str,
        space: Space,
        config: SweepConfig,
        directions: Sequence[Direction],
        definition: Mapping[str, str],
    ) -> None:
        self.space, self.config, self.directions = space, config, tuple(directions)
        self.enqueued = list(config.enqueue or [])
        self.storage = open_storage(url)
        self.study = self._opened(url, name, dict(definition))
        self.load()

    def load(self) -> None:
        """Copy the study into memory as it is now; from here on nobody else may add trials."""
        import optuna

        self._memory = optuna.storages.InMemoryStorage()
        self._copy = optuna.create_study(
            storage=self._memory, directions=list(self.directions), study_name=self.study.study_name
        )
        for trial in self.trials:
            self._copy.add_trial(_as_sampled(trial))
            self._restore(trial.system_attrs.get(_SAMPLER_STATE, {}))

    def _opened(self, url: str, name: str, definition: dict[str, str]) -> Study:
        import optuna

        with storage_errors(url, OSError):
            study = optuna.create_study(
                storage=self.storage, study_name=name, directions=list(self.directions), load_if_exists=True
            )
            if [direction.name.lower() for direction in study.directions] != list(self.directions):
                raise _other(name, "direction", ",".join(d.name.lower() for d in study.directions), self.directions)
            known: dict[str, str] | None = study.user_attrs.get(_DEFINITION)
            if known is None and study.get_trials(deepcopy=False):
                raise SweepError(f"sweep.study_name={name}: is not a study of mergelab's; choose another name")
            for key in {**known, **definition} if known is not None else ():
                stored = (known or {}).get(key, _UNSAID.get(key))
                if stored != definition.get(key):
                    raise _other(name, key, stored, definition.get(key))
            if known is None:
                study.set_user_attr(_DEFINITION, definition)
            return study

    # ------------------------------------------------------------------------------------------------------ trials

    def pending(self) -> list[FrozenTrial]:
        """List the trials without a result: those of a process that died."""
        from optuna.trial import TrialState

        return self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))

    @property
    def trials(self) -> list[FrozenTrial]:
        """All trials, by number; those measured whole after they were stopped are complete ones."""
        later = self.study.user_attrs
        return [
            _with_later(trial, later.get(later_key(trial.number))) for trial in self.study.get_trials(deepcopy=False)
        ]

    @property
    def count(self) -> int:
        """The number of trials, finished or not."""
        return len(self.trials)

    def ask(self, *, parallel: bool = False, known: int | None = None) -> Proposal:
        """Draw the next trial's point and store the trial.

        Args:
            parallel: whether other trials run at the same time.
            known: the trials below this number have ended, and the trial may learn from them; None: all before it.

        Raises:
            SweepError: another process adds trials to the study.
        """
        from optuna.trial import create_trial

        number = self.count
        self._copy.sampler = make_sampler(
            self.config.sampler,
            self.space,
            seed=self.config.seed,
            number=number,
            objectives=len(self.directions),
            parallel=parallel,
        )
        if number < len(self.enqueued):
            self._copy.enqueue_trial(self.enqueued[number])
        try:
            drawn = self._copy.ask(dict(self.space.distributions)).number
        except Exception as error:  # a sampler of the user's own, or an option of another type, can raise any
            name = sampler_name(self.config.sampler)
            raise SweepError(f"sweep.sampler={name}: cannot draw trial {number}: {first_line(error)}") from error
        frozen = self._copy.get_trials(deepcopy=False)[drawn]
        sampler_state = self._memory.get_study_system_attrs(self._id)
        whole = create_trial(
            state=frozen.state,
            params=frozen.params,
            distributions=frozen.distributions,
            user_attrs={KNOWN: number if known is None else known},
            system_attrs={**frozen.system_attrs, _SAMPLER_STATE: sampler_state},
        )
        self.study.add_trial(whole)
        if self.count != number + 1:
            raise SweepError(f"study {self.study.study_name}: another process adds trials to it")
        return Proposal(number, frozen.params)

    def new_attempt(self, number: int) -> int:
        """Count a trial's start, and return how often it has been started."""
        trial = self.trials[number]
        attempts = int(trial.user_attrs.get(ATTEMPTS, 0)) + 1
        self.storage.set_trial_user_attr(trial._trial_id, ATTEMPTS, attempts)
        return attempts

    def tell(self, number: int, values: Sequence[float] | None, *, estimated_of: int | None = None) -> None:
        """Store a result.

        Args:
            number: the trial's.
            values: the objectives' values; None for a failure.
            estimated_of: of a pruned trial the number of examples that its value is an estimate for: all of them.
        """
        from optuna.trial import TrialState

        trial_id = self.trials[number]._trial_id
        if estimated_of is not None and values is not None:
            state = TrialState.PRUNED
            last = max(self.trials[number].intermediate_values, default=0)  # of the job's own reports
            self.storage.set_trial_intermediate_value(trial_id, max(estimated_of, last), values[0])
        else:
            state = TrialState.FAIL if values is None else TrialState.COMPLETE
        self.study.tell(number, list(values or ()) if state == TrialState.COMPLETE else None, state=state)
        sampled = _as_sampled(self.trials[number])
        for step, value in sampled.intermediate_values.items():
            self._memory.set_trial_intermediate_value(number, step, value)
        self._memory.set_trial_state_values(number, sampled.state, sampled.values)

    def tell_later(self, number: int, outcome: Mapping[str, Any], measured: Mapping[str, Any]) -> None:
        """Store what a trial that was stopped has when it is measured further: outcome, and its examples' statistics.

        Optuna lets no ended trial change, so that the study has it.
        """
        stored = {OUTCOME: outcome, MEASURED: measured, _OF: self.count}
        self.study.set_user_attr(later_key(number), stored)

    def set_attribute(self, number: int, key: str, value: Any) -> None:
        """Store an attribute of a trial."""
        self.storage.set_trial_user_attr(self.trials[number]._trial_id, key, value)

    # ----------------------------------------------------------------------------------------------------- results

    def best(self) -> FrozenTrial | None:
        """Return the best complete trial, the earliest of equals; by the first objective where there are several."""
        from optuna.trial import TrialState

        complete = [trial for trial in self.trials if trial.state == TrialState.COMPLETE]
        sign = -1 if self.directions[0] == "minimize" else 1
        return max(complete, key=lambda trial: (sign * trial.values[0], -trial.number), default=None)

    def outcomes(self) -> list[Mapping[str, Any]]:
        """Return the outcomes of all measurements; a trial that was measured further after it was stopped has two."""
        first = [trial.user_attrs for trial in self.study.get_trials(deepcopy=False)]
        later = [value for key, value in self.study.user_attrs.items() if key.startswith(LATER)]
        return [stored[OUTCOME] for stored in (*first, *later) if OUTCOME in stored]

    def measured_later(self, of: int | None = None) -> list[int]:
        """Return the trials measured further after they were stopped, when the study had ``of`` trials; None: ever."""
        known = {key: value for key, value in self.study.user_attrs.items() if key.startswith(LATER)}
        return [int(key.removeprefix(LATER)) for key, value in known.items() if of is None or value[_OF] == of]

    def as_measured(self) -> Study:
        """Return the study as it is stored; where trials were measured further later, a copy that has them so."""
        import optuna

        if not self.measured_later():
            return self.study
        found = optuna.create_study(directions=list(self.directions), study_name=self.study.study_name)
        found.add_trials(self.trials)
        for key, value in self.study.user_attrs.items():
            found.set_user_attr(key, value)
        return found

    def _restore(self, sampler_state: Mapping[str, Any]) -> None:
        for key, value in sampler_state.items():
            self._memory.set_study_system_attr(self._id, key, value)

    @property
    def _id(self) -> int:
        return self._memory.get_study_id_from_name(self._copy.study_name)


def _as_sampled(trial: FrozenTrial) -> FrozenTrial:
    """Return a trial as samplers see it: a pruned one as complete, with its estimates."""
    from optuna.trial import TrialState, create_trial

    if trial.state != TrialState.PRUNED or not trial.intermediate_values:
        return trial
    _, first = max(trial.intermediate_values.items())
    values = trial.user_attrs.get(OUTCOME, {}).get("values", [first])  # of several objectives Optuna stores one
    if not all(map(math.isfinite, values)):
        return trial
    return create_trial(
        state=TrialState.COMPLETE,
        values=values,
        params=trial.params,
        distributions=trial.distributions,
        user_attrs=trial.user_attrs,
        system_attrs=trial.system_attrs,
        intermediate_values=trial.intermediate_values,
    )


def later_key(number: int) -> str:
    """Name the study's attribute with what a trial has since it was measured further."""
    return f"{LATER}{number}"


def _with_later(trial: FrozenTrial, later: Mapping[str, Any] | None) -> FrozenTrial:
    """Return a trial with what it has ``later``, when it was measured further; where that is all, as complete."""
    from optuna.trial import TrialState

    if later is None:
        return trial
    found = copy(trial)
    if later[OUTCOME]["pruned_at"] is None:
        found.state, found.values = TrialState.COMPLETE, list(later[OUTCOME]["values"])
    found.user_attrs = {**trial.user_attrs, **later}
    return found


def load(url: str, name: str) -> tuple[BaseStorage, Study]:
    """Open a study that a sweeper has created, to report to it from a job."""
    import optuna

    storage = open_storage(url)
    return storage, optuna.load_study(storage=storage, study_name=name)


def _other(name: str, what: str, stored: object, wanted: object) -> SweepError:
    wanted = ",".join(wanted) if isinstance(wanted, tuple) else wanted
    goes_on = f"{EVALUATION}={stored} goes on with it, or " if what == EVALUATION else ""
    return SweepError(
        f"sweep.study_name={name}: the study exists with another {what}: {stored}, not {wanted}; {goes_on}"
        f"choose a new name, such as sweep.study_name={name}-2"
    )
