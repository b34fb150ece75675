"""Greedy soup: add experts to the average one by one, as long as the score does not get worse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mergelab.engine.method import Substitute, merge_method
from mergelab.engine.registry import check_parameters, get_method
from mergelab.weights.align import AlignedModels


class Selection(Protocol):
    """Scores averages of experts on the selection split."""

    def score(self, experts: Sequence[str]) -> float:
        """Return the score of the uniform average of the named experts; higher is better."""
        ...

    def settle(self, experts: Sequence[str]) -> None:
        """Receive the names of the experts in the final average."""
        ...


@merge_method(
    needs=("selection",),
    family="averages",
    paper="Wortsman et al. 2022, arXiv:2203.05482",
    authors={"strict": True},
    use="several runs on one task, some of them bad, with examples to select on",
)
def greedy_soup(models: AlignedModels, *, examples: Selection, strict: bool = False) -> Substitute:
    """Average the experts that do not make the average's score worse when they are added.

    The experts are tried in the order of their own scores, best first. Each is added if the average with it scores at
    least as well as without it (Wortsman et al. 2022, arXiv:2203.05482, recipe 1). Scores are on the selection split,
    never on reported examples. Departures: an expert that leaves the score as it is joins, as in the paper's algorithm;
    in the authors' code it does not (``strict``). Experts of equal score are tried in the order of their names.

    Args:
        models: the experts; a base is not used.
        examples: scores averages.
        strict: whether an expert must make the score better to be added.

    Returns:
        The merge to run instead: the experts by ``soup``, with weight 1 for those that were added and 0 for the others.
    """
    names = sorted(expert.name for expert in models.experts)
    single = {name: examples.score([name]) for name in names}
    first, *others = sorted(names, key=lambda name: -single[name])  # stable, so ties are in the order of names
    chosen, best = [first], single[first]
    for name in others:
        score = examples.score([*chosen, name])
        if score > best or (score == best and not strict):
            chosen, best = [*chosen, name], score
    examples.settle(chosen)
    soup = get_method("soup")
    weights = {name: float(name in chosen) for name in names}
    return Substitute(soup, check_parameters(soup, {"weights": weights}), models)
