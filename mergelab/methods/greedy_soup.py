"""Greedy soup: experts join the average one by one, as long as it does not get worse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mergelab.engine.method import Substitute, merge_method
from mergelab.engine.registry import check_parameters, get_method
from mergelab.weights.align import AlignedModels


class Selection(Protocol):
    """Scores of averages, on the examples that select."""

    def score(self, experts: Sequence[str]) -> float:
        """Measure the uniform average of the named experts; more is better."""
        ...

    def settle(self, experts: Sequence[str]) -> None:
        """Hear which experts the average is made of."""
        ...


@merge_method(needs=("selection",), family="averages", paper="Wortsman et al. 2022, arXiv:2203.05482")
def greedy_soup(models: AlignedModels, *, examples: Selection, strict: bool = False) -> Substitute:
    """Average those experts of which none makes the average worse when it joins.

    The experts are taken in the order of their own scores, best first; each joins if the average with it scores at
    least as well as without it (Wortsman et al. 2022, arXiv:2203.05482, recipe 1). Scores are on the examples that
    select, never on those that report. Departures: none; experts of equal score are taken in the order of their names.

    Args:
        models: the experts; a base has no part in it.
        examples: scores averages.
        strict: an expert must make the average better to join.

    Returns:
        What to merge instead: the experts by ``soup``, with weight 1 for those that joined and 0 for the others.
    """
    names = sorted(expert.name for expert in models.experts)
    alone = {name: examples.score([name]) for name in names}
    first, *others = sorted(names, key=lambda name: -alone[name])  # stable: equal ones stay in the order of names
    chosen, best = [first], alone[first]
    for name in others:
        score = examples.score([*chosen, name])
        if score > best or (score == best and not strict):
            chosen, best = [*chosen, name], score
    examples.settle(chosen)
    soup = get_method("soup")
    weights = {name: float(name in chosen) for name in names}
    return Substitute(soup, check_parameters(soup, {"weights": weights}), models)
