"""Scores of averages of experts, on the examples that select: what a greedy soup is chosen by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import TYPE_CHECKING

from mergelab.methods.engine import merge
from mergelab.methods.registry import get_method

if TYPE_CHECKING:
    from mergelab.measuring import Bench


@dataclass(frozen=True)
class BenchSelection:
    """Measures averages on a bench.

    Attributes:
        bench: its protocol says which examples select.
        trials: what has been measured: the experts' names, and the score.
        chosen: the experts that the greedy soup is made of, once it is.
    """

    bench: Bench
    trials: list[tuple[tuple[str, ...], float]] = field(default_factory=list)
    chosen: list[str] = field(default_factory=list)

    def score(self, experts: Sequence[str]) -> float:
        """Measure the uniform average of the named experts: the mean of the tasks' primary scores."""
        session = self.bench.session
        session.average_heads_of(experts)
        members = tuple(expert for expert in session.aligned.experts if expert.name in experts)
        models = replace(session.aligned, base=None, experts=members)
        backbone = {**session.passed_through, **dict(merge(get_method("soup"), {}, models))}
        title = f"soup of {len(members)}"
        measured = self.bench.merged(dict.fromkeys(self.bench.data, backbone), title, ())
        score = fmean(result.select[result.primary] for result in measured.results.values())
        self.trials.append((tuple(experts), score))
        return score

    def settle(self, experts: Sequence[str]) -> None:
        """Give the merged model the averaged head of the chosen experts."""
        self.chosen[:] = experts
        self.bench.session.average_heads_of(experts)

    def tags(self) -> dict[str, str]:
        """Say for the record what was tried and chosen."""
        tried = "; ".join(f"{'+'.join(experts)}: {score:.4f}" for experts, score in self.trials)
        return {"greedy_soup.chosen": ", ".join(self.chosen), "greedy_soup.tried": tried}
