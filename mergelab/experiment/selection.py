"""Scores of averages of experts, on the examples that select: what a greedy soup is chosen by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import TYPE_CHECKING

from mergelab.engine.registry import get_method
from mergelab.engine.run import merge
from mergelab.errors import ConfigError
from mergelab.evaluation.results import common_direction
from mergelab.tracking import names

if TYPE_CHECKING:
    from mergelab.experiment.evaluator import Evaluator


@dataclass(frozen=True)
class EvaluatorSelection:
    """Measures averages on a evaluator.

    Attributes:
        evaluator: its protocol says which examples select.
        trials: what has been measured: the experts' names, and the score.
        chosen: the experts that the greedy soup is made of, once it is.
    """

    evaluator: Evaluator
    trials: list[tuple[tuple[str, ...], float]] = field(default_factory=list)
    chosen: list[str] = field(default_factory=list)

    def score(self, experts: Sequence[str]) -> float:
        """Measure the uniform average of the named experts: the mean of the tasks' primary scores.

        Scores that are better when they are less are answered with their sign turned.

        Raises:
            ConfigError: some tasks' scores are better when greater, others' when less.
        """
        session = self.evaluator.session
        session.average_heads_of(experts)
        members = tuple(expert for expert in session.aligned.experts if expert.name in experts)
        models = replace(session.aligned, base=None, experts=members)
        backbone = {**session.passed_through, **dict(merge(get_method("soup"), {}, models))}
        title = f"soup of {len(members)}"
        measured = self.evaluator.merged(dict.fromkeys(self.evaluator.data, backbone), title, ())
        if unselected := [name for name, result in measured.scored.items() if not result.select]:
            raise ConfigError(f"method=greedy_soup: no part of {', '.join(unselected)} can be set apart to select on")
        direction = common_direction(measured.results.values())
        if direction is None:
            told = ", ".join(f"{name} {result.primary}" for name, result in measured.scored.items())
            raise ConfigError(
                f"method=greedy_soup: chooses by one score, and of these ({told or 'none'}) some are better when "
                "greater, others when less"
            )
        score = fmean(result.select[result.primary] for result in measured.scored.values())
        self.trials.append((tuple(experts), score))
        return score if direction == "maximize" else -score

    def settle(self, experts: Sequence[str]) -> None:
        """Give the merged model the averaged head of the chosen experts."""
        self.chosen[:] = experts
        self.evaluator.session.average_heads_of(experts)

    def tags(self) -> dict[str, str]:
        """Say for the record what was tried and chosen."""
        tried = "; ".join(f"{'+'.join(experts)}: {score:.4f}" for experts, score in self.trials)
        return {names.CHOSEN_EXPERTS: ", ".join(self.chosen), names.TRIED_SOUPS: tried}
